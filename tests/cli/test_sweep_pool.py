"""Running the runs of a sweep: side by side, ended early, and by Ray."""

import os
import signal
import sys
import threading
import time
import types

import pytest
from sweep_fixtures import TWELVE

from lightning_stable.cli._sweep_pool import Job, make_slots, run_here, run_one
from lightning_stable.cli.main import main


def test_who_stops_taking_results_ends_the_runs(tmp_path):
    jobs = []
    for place, seconds in enumerate([0, 60, 60, 60]):
        (tmp_path / str(place)).mkdir()
        jobs.append(Job([sys.executable, "-c", f"import time; time.sleep({seconds})"], str(tmp_path / str(place)), {}))
    begin = time.monotonic()
    results = run_here(jobs, 2)
    assert next(results)[:2] == (0, 0)
    results.close()
    assert time.monotonic() - begin < 15
    assert not (tmp_path / "3" / "log.txt").exists()


def test_runs_side_by_side_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert make_slots(1) == [{}]
    assert make_slots(4) == [{"OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert make_slots(1) == [{}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in make_slots(3)] == ["4", "6", "4"]


def fake_ray(seen):
    """A stand-in for Ray that runs its tasks when they are asked for; the third is lost with its machine."""

    class Task:
        def __init__(self, function):
            self.function = function

        def remote(self, job):
            seen["jobs"].append(job)
            return job.folder

    def get(folder):
        place = next(place for place, job in enumerate(seen["jobs"]) if job.folder == folder)
        if place == 2:
            raise OSError("the machine is gone")
        return seen["run"](seen["jobs"][place])

    module = types.ModuleType("ray")
    module.is_initialized = lambda: False
    module.init = lambda: seen.update(init=True)
    module.remote = lambda **options: lambda function: (seen.update(options=options), Task(function))[1]
    module.wait = lambda folders, num_returns: (folders[-1:], folders[:-1])
    module.get = get
    module.cancel = lambda folder: None
    return module


def test_ray_runs_what_the_machine_would(here, stand_in, monkeypatch, capsys):
    seen = {"jobs": [], "run": stand_in}
    monkeypatch.setitem(sys.modules, "ray", fake_ray(seen))
    assert main(["sweep", *TWELVE, "--ray", "--gpus-per-run", "0.5"]) == 1
    out, err = capsys.readouterr()
    assert seen["init"]
    assert seen["options"] == {"num_cpus": 1, "num_gpus": 0.5, "max_retries": 0}
    assert len(seen["jobs"]) == 12
    assert "1 of 12 runs failed" in err
    assert "Ray: the machine is gone" in err
    assert "50% of 2" in out or "100% of 2" in out


def test_without_ray_it_says_how_to_get_it(stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", *TWELVE, "--ray"]) == 2
    assert "pip install ray" in capsys.readouterr().err


class CancelledTask(BaseException):
    """As Ray and a keyboard interrupt do: no ``Exception``."""


def test_a_run_that_is_cancelled_ends(tmp_path):
    def cancel(number, frame):
        raise CancelledTask

    def note(process):
        processes.append(process)
        timer.start()

    processes = []
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, cancel)
    try:
        with pytest.raises(CancelledTask):
            run_one(Job([sys.executable, "-c", "import time; time.sleep(60)"], str(tmp_path), {}), note)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert [process.returncode for process in processes] == [-signal.SIGTERM]
