"""Every benchmark runs as a smoke test, from any directory, and writes no result."""

import os
import sys
from pathlib import Path

import pytest

from lightning_stable.testing.serving import fork

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# Over 30 seconds each on a loaded machine of two cores: they take long because of what they measure, fresh
# interpreters (import_time) and whole training runs (wsd). `make bench-NAME` runs them.
TOO_LONG = {"import_time", "wsd"}
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def run_script(path, folder, said):
    """Run a script as a command line would, in a process that has the libraries already; print to a file."""
    os.chdir(folder)
    with Path(said).open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = [path, "--quick"]
    sys.path.insert(0, str(FOLDER))
    main = sys.modules["__main__"]
    main.__name__, main.__file__, main.__spec__ = "__main__", path, None  # for processes of its own
    exec(compile(Path(path).read_text(encoding="utf-8"), path, "exec"), vars(main))  # noqa: S102  our own script


def test_what_is_left_out_is_there():
    assert set(NAMES) >= TOO_LONG
    assert set(NAMES) > TOO_LONG, "nothing would be run"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOO_LONG])
def test_a_benchmark_passes_its_smoke_test(name, tmp_path):
    results = FOLDER / "results"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    said = tmp_path / "said.txt"
    process = fork(run_script, str(FOLDER / f"{name}.py"), str(tmp_path), str(said))
    process.join()
    printed = said.read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    assert "no result written" in printed
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before
