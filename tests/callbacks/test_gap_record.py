"""``stability_gap.json``: written whole, read with every field checked, summed up as a table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from gap_records import make_record

from lightning_stable.callbacks import _gap_record
from lightning_stable.callbacks._gap_record import FILE_NAME, read_record, recovery_share, summary_table, write_record


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "runs" / "version_0" / FILE_NAME
    write_record(make_record(), path)
    assert read_record(path) == make_record()
    assert read_record(str(path)) == make_record()
    write_record(make_record(every_n_steps=5), path)
    assert read_record(path)["every_n_steps"] == 5
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]


def test_a_record_without_gradients_is_whole(tmp_path):
    record = make_record()
    del record["gradients"]
    write_record(record, tmp_path / FILE_NAME)
    assert read_record(tmp_path / FILE_NAME) == record


def test_the_share_of_a_recovery_is_nine_tenths_where_the_file_is_silent(tmp_path):
    assert recovery_share(make_record()) == 0.9
    write_record(make_record(recovery_share=0.5), tmp_path / FILE_NAME)
    assert recovery_share(read_record(tmp_path / FILE_NAME)) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(value, tmp_path):
    record = make_record()
    record["series"]["live"][0]["scores"][1] = value
    record["summary"]["live"][0]["average_accuracy"] = value
    write_record(record, tmp_path / FILE_NAME)
    read = read_record(tmp_path / FILE_NAME)
    assert read["series"]["live"][0]["scores"][1] is None
    assert read["summary"]["live"][0]["average_accuracy"] is None
    assert record["series"]["live"][0]["scores"][1] is value, "the caller's record stays as it is"


def test_tuples_are_lists(tmp_path):
    write_record(make_record(windows=(10, 100)), tmp_path / FILE_NAME)
    assert read_record(tmp_path / FILE_NAME)["windows"] == [10, 100]


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / FILE_NAME
    write_record(make_record(), path)
    monkeypatch.setattr(_gap_record.Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_record(make_record(every_n_steps=5), path)
    monkeypatch.undo()
    assert read_record(path) == make_record()
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


def test_a_wrong_record_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"'windows' is missing"):
        write_record({name: value for name, value in make_record().items() if name != "windows"}, tmp_path / FILE_NAME)
    assert not list(tmp_path.iterdir())


def test_no_file_and_no_json_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        read_record(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match=r"cut\.json is not JSON"):
        read_record(tmp_path / "cut.json")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture\.json is not JSON"):
        read_record(tmp_path / "picture.json")


def live(record):
    return record["series"]["live"][0]


@pytest.mark.parametrize(
    ("spoil", "field", "problem"),
    [
        (lambda r: r.pop("format"), "'format'", "is missing"),
        (lambda r: r.update(format=2), "'format'", "is 2, and this version reads format 1"),
        (lambda r: r.update(format="one"), "'format'", "'one', not a number"),
        (lambda r: r.update(score=3), "'score'", "is 3, not a text"),
        (lambda r: r.update(higher_is_better=1), "'higher_is_better'", "not true or false"),
        (lambda r: r.update(recovery_share=0), "'recovery_share'", "is 0, not a share above 0 and up to 1"),
        (lambda r: r.update(recovery_share=None), "'recovery_share'", "is None, not a share"),
        (lambda r: r.update(recovery_share="all"), "'recovery_share'", "is 'all', not a number"),
        (lambda r: r.update(every_n_steps=0), "'every_n_steps'", "is 0, below 1"),
        (lambda r: r.update(every_n_steps=True), "'every_n_steps'", "not a whole number"),
        (lambda r: r.update(windows=10), "'windows'", "is 10, not a list"),
        (lambda r: r.update(windows=[10, 2.5]), "'windows'", "holds 2.5"),
        (lambda r: r["tasks"][1].update(task=0), "'tasks'", "names a task twice"),
        (lambda r: r["tasks"][1].pop("name"), "'tasks[1].name'", "is missing"),
        (lambda r: r["tasks"].append("two"), "'tasks[2]'", "is 'two', not an object"),
        (lambda r: r["switches"][1].update(task=7), "'switches[1].task'", "is 7, which 'tasks' does not name"),
        (lambda r: r["switches"][0].update(step=9), "'switches'", "not in the order of their steps"),
        (lambda r: r.update(series=[]), "'series'", "is [], not an object"),
        (lambda r: r["series"].update(slow=[]), "'series.slow'", "is no weight set: there are live and ema"),
        (lambda r: live(r).update(task=3), "'series.live[0].task'", "is 3"),
        (lambda r: live(r)["steps"].pop(), "'series.live[0].scores'", "has 7 entries, and 'steps' beside it has 6"),
        (lambda r: live(r)["steps"].reverse(), "'series.live[0].steps'", "go back"),
        (lambda r: live(r)["scores"].__setitem__(0, "x" * 99), "'series.live[0].scores'", "holds 'xxx"),
        (lambda r: live(r)["scores"].__setitem__(0, True), "'series.live[0].scores'", "holds True"),
        (lambda r: r["summary"]["live"][0].pop("step"), "'summary.live[0].step'", "is missing"),
        (lambda r: r["summary"]["live"][0].update(forgetting="no"), "'summary.live[0].forgetting'", "not a number"),
        (lambda r: r["gradients"].pop("cosine"), "'gradients.cosine'", "is missing"),
        (lambda r: r["gradients"]["stability"].pop(), "'gradients.stability'", "has 1 entries"),
        (lambda r: r.update(gradients=3), "'gradients'", "is 3, not an object"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_field(spoil, field, problem, tmp_path):
    record = make_record()
    spoil(record)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"stability_gap\.json") as caught:
        read_record(path)
    assert field in str(caught.value)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 220


def test_a_list_is_no_record(tmp_path):
    (tmp_path / FILE_NAME).write_text("[1]")
    with pytest.raises(ValueError, match="the whole is"):
        read_record(tmp_path / FILE_NAME)


def test_the_table_has_a_row_for_each_weight_set_and_task():
    title, head, *rows = summary_table(make_record()).splitlines()
    assert title == "Stability gap: accuracy in %; every step evaluated; recovery in steps"
    assert head.split("  ")[0] == "weights"
    assert head.endswith("WC-ACC  WF10  WF100  WP10  WP100  gap depth  recovery  recovered")
    assert head.split()[3:7] == ["step", "ACC", "FORG", "min-ACC"]
    assert [row.split("  ")[0] for row in rows] == ["live", "live", "EMA"]
    assert "0: classes 0, 1" in rows[0]
    cells = rows[1].split()
    assert cells[-12:-7] == ["8", "93.8", "0.0", "25.0", "56.2"], "no minus before a zero"
    assert cells[-7:] == ["75.0", "75.0", "87.5", "87.5", "75.0", "4.0", "100%"]
    assert rows[0].split()[-12:] == ["4", "100.0", "-", "-", "-", "0.0", *["-"] * 6]
    assert rows[2].split()[-11:] == ["-"] * 11
    assert {len(line) for line in (head, *rows)} == {len(head)}, "aligned to the last column"


def test_the_table_of_another_score_has_plain_numbers():
    record = make_record(score="val_loss", higher_is_better=False, every_n_steps=5, windows=[3])
    record["summary"]["live"][1].update(average_accuracy=1234.5678, windowed_forgetting_3=0.03125)
    title, head, *rows = summary_table(record).splitlines()
    assert title == "Stability gap: val_loss, lower is better; every 5 steps evaluated; recovery in steps"
    assert head.split()[-10:-4] == ["mean", "FORG", "max", "WC", "WF3", "WP3"]
    assert "1235" in rows[1].split()
    assert "0.03125" in rows[1].split()


def test_the_table_without_a_row_says_so():
    assert "No task has ended yet." in summary_table(make_record(summary={"live": []}))


def test_reading_needs_no_torch():
    code = (
        "import sys; import lightning_stable.callbacks._gap_record, lightning_stable.callbacks._gap_picture\n"
        "sys.exit(bool({'torch', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.cwd(), check=False).returncode == 0
