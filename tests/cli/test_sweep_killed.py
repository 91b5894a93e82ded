"""Sweeps that are killed in the middle and go on, and sweeps of real runs."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from sweep_fixtures import CONFIG, TWELVE

from lightning_stable.cli import sweep
from lightning_stable.cli._sweep_grid import read_json
from lightning_stable.cli._sweep_pool import Ended
from lightning_stable.cli.main import main

KILLED = """
import sys
from lightning_stable.cli import sweep
from lightning_stable.cli.main import main
RUN = '''
import json, pathlib, sys, time
time.sleep(0.15)
folder = pathlib.Path(sys.argv[1])
record = {"metric": "val_loss", "steps": 1, "initial": 2.0, "best": 1.0, "final": 1.0, "curve": [[1, 1.0]]}
(folder / "record.json").write_text(json.dumps(record))
'''
sweep.command_of = lambda run, folder, *rest: [sys.executable, "-c", RUN, str(folder)]
sys.exit(main(["sweep", *sys.argv[1:]]))
"""


def test_a_sweep_that_was_killed_goes_on(here):
    command = [sys.executable, "-c", KILLED, *TWELVE, "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    results = here / "runs/sweep/runs"
    end = time.monotonic() + 60
    while len(list(results.glob("*/result.json"))) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 4 <= len(before) < 12
    assert not (here / "runs/sweep/table.md").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 12 runs in runs/sweep have ended before." in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(results.glob("*/result.json"))) == 12
    assert (here / "runs/sweep/heatmap.png").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_runs_and_a_line_says_how_to_go_on(number, code, here):
    patient = KILLED.replace("time.sleep(0.15)", "(pathlib.Path(sys.argv[1]) / 'begun').touch(); time.sleep(600)")
    command = [sys.executable, "-c", patient, *TWELVE, "--jobs", "2"]
    # A shell may have told whatever it starts behind its back to ignore Ctrl-C.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    wait_for(lambda: len(list(here.glob("runs/sweep/runs/*/begun"))) == 2, 60)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == "lightning-stable: interrupted; the same command goes on. 0 of 12 runs have ended.\n"
    assert len(list(here.glob("runs/sweep/runs/*/begun"))) == 2, "no other run was started"


def test_real_runs_of_digits_in_this_process(here, monkeypatch, capsys):
    config = yaml.safe_load(CONFIG)
    config["trainer"]["callbacks"] = [{"class_path": "NumericsMonitor", "init_args": {"every_n_steps": 5}}]
    (here / "mine.yaml").write_text(yaml.safe_dump(config))

    def run_them(jobs, count):
        for place, job in enumerate(jobs):
            assert job.command[1:3] == ["-m", "lightning_stable.cli.main"]
            yield Ended(place, main(job.command[3:]), 1.0)

    monkeypatch.setattr(sweep, "run_here", run_them)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    interrupt = signal.getsignal(signal.SIGINT)
    options = ["--config", "mine.yaml", "--seeds", "1", "--lr", "0.01", "1e4", "--precision", "32-true", "e8m3"]
    try:
        assert main(["sweep", *options, "--trainer.max_steps", "5"]) == 0, capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, interrupt)
    everything = json.loads((here / "runs/sweep/sweep.json").read_text())
    found = {(run["precision"], run["lr"]): run for run in everything["runs"]}
    assert {key[1] for key, run in found.items() if run["diverged"]} == {1e4}
    calm = [found["32-true", 0.01], found["e8m3", 0.01]]
    assert all(1.5 < run["final"] < run["initial"] and run["steps"] == 5 for run in calm)
    assert calm[0]["final"] != calm[1]["final"]
    assert calm[0]["initial"] == pytest.approx(calm[1]["initial"], abs=0.1)
    for name in ("32-true", "e8m3"):
        assert (here / f"runs/sweep/runs/{name}-lr0.01-seed0/logs/config.yaml").is_file()
        watched = (here / f"runs/sweep/runs/{name}-lr0.01-seed0/logs/numerics.jsonl").is_file()
        assert watched is (name == "e8m3"), "in high precision there is nothing to watch, and no error"


HOLDING = """
import os, time
from pathlib import Path
from lightning.pytorch import Callback

class Hold(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if os.environ["PL_GLOBAL_SEED"] == "1" and batch_idx == 1 and Path("hold").exists():
            Path("held").touch()
            while Path("hold").exists():
                time.sleep(0.05)
"""


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_real_runs_go_on_after_a_kill_between_two_steps(here, capsys):
    config = yaml.safe_load(CONFIG)
    config["trainer"]["callbacks"] = [{"class_path": "holding.Hold"}]
    (here / "mine.yaml").write_text(yaml.safe_dump(config))
    (here / "holding.py").write_text(HOLDING)
    (here / "hold").touch()
    first, second = (here / f"runs/sweep/runs/e8m3-lr0.01-seed{seed}" for seed in (0, 1))
    options = ["sweep", "--config", "mine.yaml", "--seeds", "2", "--lr", "0.01", "--precision", "e8m3"]
    command = [sys.executable, "-m", "lightning_stable.cli.main", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for((here / "held").exists)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        (here / "hold").unlink()
    assert (first / "result.json").is_file()
    wait_for(lambda: "The sweep that started this run is gone" in (second / "log.txt").read_text())
    assert not (second / "record.json").exists()
    before = (first / "result.json").stat().st_mtime_ns
    assert main(options) == 0, capsys.readouterr().err
    assert "1 of 2 runs in runs/sweep have ended before." in capsys.readouterr().out
    assert (first / "result.json").stat().st_mtime_ns == before
    runs = json.loads((here / "runs/sweep/sweep.json").read_text())["runs"]
    assert [(run["seed"], run["status"], run["steps"], run["diverged"]) for run in runs] == [
        (0, "ended", 3, False),
        (1, "ended", 3, False),
    ]
    assert runs[0]["final"] != runs[1]["final"]
    assert read_json(second / "result.json")["final"] == runs[1]["final"]
    assert "SimulatedPrecision: 3 layers converted" in (second / "log.txt").read_text()
