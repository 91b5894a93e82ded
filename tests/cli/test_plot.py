"""``lightning-stable plot``: the table, the picture and where it is, and what is wrong in one line."""

import json
import os
import subprocess
import sys

import pytest
from callbacks.gap_records import make_record

from lightning_stable.callbacks._gap_record import FILE_NAME, summary_table, write_record
from lightning_stable.cli.main import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run with a record, and the current directory two folders above it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "version_0"
    write_record(make_record(), folder / FILE_NAME)
    return folder


@pytest.mark.parametrize("source", [f"runs/version_0/{FILE_NAME}", "runs/version_0"], ids=["file", "folder"])
def test_it_prints_the_table_and_writes_the_picture_beside_the_record(source, run, capsys):
    assert main(["plot", source]) == 0
    out, err = capsys.readouterr()
    assert out == summary_table(make_record()) + "Picture: runs/version_0/stability_gap.png\n"
    assert err == ""
    assert (run / "stability_gap.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / FILE_NAME).is_file()


@pytest.mark.parametrize(
    ("output", "written", "begins"),
    [
        ("gap.png", "gap.png", b"\x89PNG"),
        ("runs/gap.svg", "runs/gap.svg", b"<?xml"),
        ("gap.pdf", "gap.pdf", b"%PDF"),
        ("gap", "gap.png", b"\x89PNG"),
        (".", "stability_gap.png", b"\x89PNG"),
    ],
    ids=["file", "another format", "a third one", "no suffix", "folder"],
)
def test_the_picture_goes_where_it_is_told(output, written, begins, run, tmp_path, capsys):
    assert main(["plot", str(run), "--output", output]) == 0
    assert capsys.readouterr().out.endswith(f"\nPicture: {written}\n")
    assert (tmp_path / written).read_bytes().startswith(begins)
    assert not (run / "stability_gap.png").exists()


def test_wherever_the_picture_goes_it_names_the_run(run, tmp_path):
    assert main(["plot", str(run), "--output", "gap.svg"]) == 0
    assert "Stability gap: runs/version_0" in (tmp_path / "gap.svg").read_text()


def test_of_a_folder_above_the_newest_record_is_taken_and_the_others_are_named(run, tmp_path, monkeypatch, capsys):
    assert main(["plot", "."]) == 0
    table = summary_table(make_record())
    picture = "Picture: runs/version_0/stability_gap.png\n"
    assert capsys.readouterr().out == f"Read runs/version_0/{FILE_NAME}\n{table}{picture}"
    for place, folder in enumerate(["runs/a/version_0", "runs/b/version_1", *(f"runs/c/d/{i}" for i in range(4))]):
        write_record(make_record(), tmp_path / folder / FILE_NAME)
        os.utime(tmp_path / folder / FILE_NAME, (100 - place, 100 - place))
    os.utime(tmp_path / "runs" / "b" / "version_1" / FILE_NAME, (2**31, 2**31))
    assert main(["plot", "runs", "--output", "gap.png"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"Read runs/b/version_1/{FILE_NAME}, the newest"
    named = [f"runs/{folder}/{FILE_NAME}" for folder in ("version_0", "a/version_0", "c/d/0", "c/d/1")]
    assert second == f"There are also {', '.join(named)}, and 2 more"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["plot"], ["PATH", "plot --help"]),
        (["plot", "gone"], ["There is no file or folder gone", FILE_NAME]),
        (["plot", "empty"], [f"empty holds no {FILE_NAME}", "StabilityGap"]),
        (["plot", "metrics.csv"], ["metrics.csv is no file of StabilityGap", f"Give a {FILE_NAME}"]),
        (["plot", "runs/version_0/metrics.csv"], [f"There is one beside it: runs/version_0/{FILE_NAME}"]),
        (["plot", "runs/version_0", "--output", "gap.doc"], ["gap.doc: a picture is .png, .svg or .pdf, not .doc."]),
        (["plot", "runs/version_0", "--output", "gone/gap.png"], ["there is no folder gone. Create it"]),
        (["plot", "runs/version_0", "--format", "png"], ["--format"]),
        (["plot", "text.json"], ["text.json is not JSON"]),
        (["plot", "other.json"], ["other.json: 'format' is missing"]),
        (["plot", "runs/version_0", "--output", "text.json/gap.png"], ["text.json"]),
        (["plot", "empty.json"], ["no picture to draw", "empty.json"]),
    ],
    ids=lambda value: " ".join(value) if value[0] == "plot" else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, parts, run, tmp_path, capsys):
    (tmp_path / "text.json").write_text("no JSON")
    write_record(make_record(series={}), tmp_path / "empty.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "metrics.csv").touch()
    (run / "metrics.csv").touch()
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("lightning-stable: error: ")
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "gone").exists()


def test_the_help_and_the_message_name_the_same_formats(run, capsys):
    assert main(["plot", "--help"]) == 0
    assert ".png, .svg or .pdf" in " ".join(capsys.readouterr().out.split())


def test_without_matplotlib_it_prints_the_table_and_says_how_to_get_the_picture(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    assert main(["plot", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == summary_table(make_record())
    assert "lightning-stable[plots]" in err


def test_it_needs_no_torch(run):
    code = (
        "import sys; from lightning_stable.cli.main import main\n"
        f"code = main(['plot', {str(run)!r}])\n"
        "sys.exit(code or bool({'torch', 'lightning', 'jsonargparse', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
