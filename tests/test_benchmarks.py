"""Every benchmark runs as a smoke test, from any directory, and writes no result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# Over 30 seconds each on a loaded machine of two cores: they take long because of what they measure, fresh
# interpreters (import_time) and whole training runs (wsd). `make bench-NAME` runs them.
TOO_LONG = {"import_time", "wsd"}
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def test_what_is_left_out_is_there():
    assert set(NAMES) >= TOO_LONG
    assert set(NAMES) > TOO_LONG, "nothing would be run"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOO_LONG])
def test_a_benchmark_passes_its_smoke_test(name, tmp_path):
    results = FOLDER / "results"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no result written" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before
