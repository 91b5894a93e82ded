"""One pair of long-lived gloo processes that every two-process test shares, so that start-up is paid once."""

import os
import time
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch.distributed as dist

from lightning_stable.testing.serving import free_port, launch, received

__all__ = ["Pair", "of_all_ranks", "of_rank_zero", "processes"]

# What tells a process that it is one of a pair.
_RUN = "contracts"

# A rank that waits for another one forever is a failed test, not a hung suite.
_TIMEOUT_SECONDS = 180
# How long a rank is waited for when the other has failed.
_SECONDS_AFTER_A_FAILURE = 20


def processes() -> int:
    """Return in how many processes what is called here runs: two in a job of a pair."""
    return 2 if os.environ.get("TORCHELASTIC_RUN_ID") == _RUN else 1


def of_rank_zero(value: Any) -> Any:
    """Return what rank 0 has there, on both ranks; in one process the value itself."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def of_all_ranks(value: Any) -> list[Any]:
    """Return what each rank has there, rank 0 first; in one process the value alone."""
    values = [value]
    if processes() > 1:
        values = [None] * processes()
        dist.all_gather_object(values, value)
    return values


class Pair:
    """Two processes that run the same job at the same time, as ranks 0 and 1 of a gloo group.

    A job is a function named ``module:function`` that both import; what it returns has to be savable by torch. After
    a job that failed or hung the processes are replaced, since their collectives may be out of step; not so where an
    assertion failed on both, which is where they compare what is over.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Run ``job`` on both ranks and return what they returned, rank 0 first."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((job, arguments))
        answers = self._answers()
        bad = {rank: text for rank, (kind, text) in sorted(answers.items()) if kind != "done"}
        failed = [f"rank {rank} failed in {job}:\n{text or 'the process died'}" for rank, text in bad.items()]
        if len(answers) < len(self._pipes) or any(kind in ("failed", "died") for kind, _ in answers.values()):
            silent = [rank for rank in range(len(self._pipes)) if rank not in answers]
            failed += [f"rank {rank} gave no answer to {job} in time" for rank in silent]
            self.stop()
        elif 0 < len(failed) < len(answers):
            self.stop()
        if failed:
            raise AssertionError("\n".join(failed))
        return [answers[rank][1] for rank in sorted(answers)]

    def _answers(self) -> dict[int, tuple[str, Any]]:
        """Return what the ranks say, by rank; where one has failed, the other may wait for it and say nothing."""
        answers: dict[int, tuple[str, Any]] = {}
        end = time.monotonic() + _TIMEOUT_SECONDS
        while len(answers) < len(self._pipes) and time.monotonic() < end:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = cast("list[Connection]", wait(list(waiting), max(0.0, end - time.monotonic())))
            for pipe in ready:
                answers[waiting[pipe]] = received(pipe)
                if answers[waiting[pipe]][0] != "done":
                    end = min(end, time.monotonic() + _SECONDS_AFTER_A_FAILURE)
        return answers

    def stop(self) -> None:
        """End both processes, also where the host's handler takes the signal for a wish."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(1)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        port = free_port()
        # The host then takes each for a rank and starts none itself.
        places = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": _RUN,
            }
            for rank in range(2)
        ]
        started = launch(places)
        self._processes, self._pipes = [process for process, _ in started], [pipe for _, pipe in started]
