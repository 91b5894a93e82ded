"""Running the runs of a sweep: some subprocesses side by side, or tasks of Ray on many machines."""

import importlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stable.cli._sweep_grid import LOG_NAME
from lightning_stable.cli.locate import CommandError

__all__ = [
    "PARENT_VARIABLE",
    "Ended",
    "Job",
    "Terminated",
    "make_slots",
    "run_here",
    "run_on_ray",
    "run_one",
    "terminable",
]

PARENT_VARIABLE = "LIGHTNING_STABLE_SWEEP_PARENT"

# How long a run may take to end after it was told to.
_SECONDS_TO_END = 20


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a sweep as Ctrl-C does."""


class Job(NamedTuple):
    """A subprocess to be.

    Attributes:
        command: Its command line.
        folder: Where its output goes; it exists.
        environment: Variables that it gets besides.
    """

    command: list[str]
    folder: str
    environment: dict[str, str]


class Ended(NamedTuple):
    """A subprocess that is over.

    Attributes:
        place: Its number among the jobs.
        code: Its exit code.
        seconds: How long it took.
    """

    place: int
    code: int
    seconds: float


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`, so that whoever runs jobs can end them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_one(job: Job, started: Callable[["subprocess.Popen[bytes]"], None] | None = None) -> tuple[int, float]:
    """Run a job to its end; return its exit code and how many seconds it took.

    Where this call is interrupted, as Ray does with a task that it cancels, the subprocess ends too.
    """
    begin = time.monotonic()
    environment = {**os.environ, **job.environment, PARENT_VARIABLE: str(os.getpid())}
    with (Path(job.folder) / LOG_NAME).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  the command's own program, without a shell
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            if started is not None:
                started(process)
            code = process.wait()
        except BaseException:
            _end({process})
            raise
    return code, time.monotonic() - begin


def make_slots(count: int) -> list[dict[str, str]]:
    """Return what runs that are side by side get of this machine, as environment variables.

    Several share the processors, unless ``OMP_NUM_THREADS`` is set, and the devices of ``CUDA_VISIBLE_DEVICES``, if it
    names several.
    """
    share = {}
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    if count == 1 or len(devices) < 2:
        return [share] * count
    return [{**share, "CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} for slot in range(count)]


def run_here(jobs: Sequence[Job], count: int) -> Generator[Ended, None, None]:
    """Run jobs on this machine, so many at a time; yield each as it ends.

    Whoever stops taking them ends those that are running.

    Args:
        jobs: The jobs.
        count: How many run side by side.
    """
    running: set[subprocess.Popen[bytes]] = set()
    stopped = threading.Event()
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in make_slots(count):
        slots.put(slot)

    def note(process: "subprocess.Popen[bytes]") -> None:
        running.add(process)
        if stopped.is_set():
            process.terminate()  # it was started while the others were ended

    def run(place: int) -> Ended | None:
        if stopped.is_set():
            return None
        slot = slots.get()
        try:
            job = jobs[place]
            code, seconds = run_one(job._replace(environment={**slot, **job.environment}), note)
        finally:
            slots.put(slot)
        return Ended(place, code, seconds)

    with ThreadPoolExecutor(count) as pool:
        futures = {pool.submit(run, place) for place in range(len(jobs))}
        try:
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                yield from (ended for future in done if (ended := future.result()) is not None)
        finally:
            stopped.set()
            _end(running)


def _end(processes: set["subprocess.Popen[bytes]"]) -> None:
    """End those of some processes that are still running."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    for process in alive:
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()


def run_on_ray(jobs: Sequence[Job], gpus: float = 0.0) -> Generator[Ended, None, None]:
    """Run jobs as tasks of Ray; yield each as it ends.

    All machines have to see the folders of the jobs and the files that their commands name.

    Args:
        jobs: The jobs.
        gpus: GPUs of each run.

    Raises:
        CommandError: If Ray is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise CommandError(
            "--ray needs Ray, which is missing. Get it by: pip install ray. Without --ray the runs are on this machine."
        ) from error
    if not ray.is_initialized():
        ray.init()
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_one)
    places = {task.remote(job): place for place, job in enumerate(jobs)}
    try:
        while places:
            done, _ = ray.wait(list(places), num_returns=1)
            for future in done:
                place = places.pop(future)
                try:
                    code, seconds = ray.get(future)
                except Exception as error:  # of the machine or of Ray: its own classes are known to Ray only
                    with (Path(jobs[place].folder) / LOG_NAME).open("a", encoding="utf-8") as log:
                        log.write(f"\nRay: {error}\n")
                    code, seconds = 1, 0.0
                yield Ended(place, code, seconds)
    finally:
        for future in places:
            ray.cancel(future)
