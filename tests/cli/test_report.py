"""``lightning-stable report``: the page, where it is, and what is wrong in one line."""

import os
import subprocess
import sys

import pytest
from report.report_runs import write_csv, write_run

from lightning_stable.cli.main import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(["old", "new"]):
        write_run(tmp_path / "runs" / name / "v0", steps=40, spikes=())
        os.utime(tmp_path / "runs" / name / "v0" / "metrics.csv", (1000 + place, 1000 + place))
    return tmp_path


def test_the_page_of_a_run_lies_in_its_folder(here, capsys):
    assert main(["report", "runs/old/v0"]) == 0
    assert capsys.readouterr().out == "Page: runs/old/v0/report.html\n"
    assert "old/v0" in (here / "runs/old/v0/report.html").read_text()


def test_of_a_folder_above_the_newest_run_is_taken(here, capsys):
    assert main(["report", "runs", "--output", "page", "--pngs"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == ["Read runs/new/v0, the newest", "There are also runs/old/v0", "Page: page.html"]
    assert out[3].endswith("PNGs in page_pictures")
    assert len(list((here / "page_pictures").glob("*.png"))) == int(out[3].split()[1])


def test_several_runs_are_one_page_here(here, capsys):
    assert main(["report", "runs/old/v0", "runs/new/v0", "runs/new"]) == 0
    assert "Page: comparison.html" in capsys.readouterr().out
    text = (here / "comparison.html").read_text()
    assert "2 runs compared" in text
    assert "new/v0" in text


def test_runs_of_one_name_are_told_apart(here):
    for name in ("a", "b"):
        write_run(here / name / "same" / "v0", steps=40, spikes=())
    assert main(["report", "a/same/v0", "b/same/v0", "--output", "."]) == 0
    text = (here / "comparison.html").read_text()
    assert "a/same/v0" in text
    assert "b/same/v0" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["RUN_DIR", "report --help"]),
        (["gone"], ["There is no folder gone", "runs/quickstart/version_0"]),
        (["empty"], ["empty holds no run", "metrics.csv", "stability_report.json", "StabilityReport"]),
        (["runs/old/v0/metrics.csv"], ["metrics.csv is a file", "runs/old/v0"]),
        (["hollow"], ["nothing to read in hollow", "metrics.csv holds no values"]),
        (["runs/old/v0", "--output", "gone/page.html"], ["there is no folder gone. Create it"]),
        (["runs/old/v0", "--output", "page.pdf"], ["page.pdf: the page is .html, not .pdf"]),
        (["runs/old/v0", "--png"], ["--png"]),
    ],
    ids=lambda value: " ".join(value) if not value or value[0].islower() else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, parts, here, capsys):
    (here / "empty").mkdir()
    write_csv(here / "hollow", [], head=["step", "loss"])
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lightning-stable: error: ")
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert not list(here.rglob("*.html"))


def test_it_needs_no_torch(here):
    code = (
        "import sys; from lightning_stable.cli.main import main\n"
        "code = main(['report', 'runs/old/v0'])\n"
        "sys.exit(code or bool({'torch', 'lightning', 'jsonargparse', 'omegaconf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
