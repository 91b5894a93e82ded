"""The runs of a benchmark, spread over processes, with a line for each that is done."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

__all__ = ["run_jobs"]

_Job = TypeVar("_Job")
_Found = TypeVar("_Found")


def run_jobs(
    train: Callable[[_Job], tuple[_Job, _Found, float]],
    jobs: Iterable[_Job],
    processes: int | None,
    tell: Callable[[_Job, _Found], str],
) -> dict[_Job, _Found]:
    """Run jobs, and return what each has found, by job and in their order.

    Args:
        train: Runs a job, and returns it with what it found and its seconds; a function of a module, which new
            processes find by its name.
        jobs: The jobs, hashable.
        processes: How many run at once, each in a process of its own; ``None`` for one a core, at most 1 for this
            process.
        tell: What to print of a job and of what it found, before its seconds.
    """
    found: dict[_Job, _Found] = {}
    alone = processes is not None and processes <= 1
    workers = None if alone else ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    with workers or nullcontext():
        for job, numbers, seconds in map(train, jobs) if workers is None else workers.map(train, jobs):
            found[job] = numbers
            print(f"{tell(job, numbers)} ({seconds:.0f} s)", flush=True)
    return found
