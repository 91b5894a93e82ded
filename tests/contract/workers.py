"""One pair of long-lived gloo processes that every two-process test shares, so that start-up is paid once."""

import io
import os
import socket
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

__all__ = ["Pair"]

# A rank that waits for another one forever is a failed test, not a hung suite.
_TIMEOUT_SECONDS = 180


class Pair:
    """Two processes that run the same job at the same time, as ranks 0 and 1 of a gloo group.

    A job is a function named ``module:function`` that both import; what it returns has to be savable by torch. After
    a job that failed or hung the processes are replaced, since their collectives may be out of step.
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
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT_SECONDS):
                self.stop()
                raise AssertionError(f"rank {rank} gave no answer to {job} within {_TIMEOUT_SECONDS} s")
            answers.append(pipe.recv())
            if answers[-1][0] == "failed":
                self.stop()
                raise AssertionError(f"rank {rank} failed in {job}:\n{answers[-1][1]}")
        return [torch.load(io.BytesIO(content), weights_only=False) for _, content in answers]

    def stop(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.terminate()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, port), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, rank: int, port: int) -> None:
    """Answer jobs until the pipe closes."""
    import importlib

    # What torchrun would set: the host then takes this process for a rank and starts none itself.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "contracts",
    }
    torch.set_num_threads(1)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            module, _, name = job.partition(":")
            content = io.BytesIO()
            torch.save(getattr(importlib.import_module(module), name)(**arguments), content)
            pipe.send(("done", content.getvalue()))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
