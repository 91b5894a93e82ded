"""Two worker processes that run the same job at the same time, each at one end of a link or both on the loopback.

The processes live as long as the ``with`` block, so that start-up is paid once. A job is a function ``module:function``
that both import; arguments and results travel as JSON lines over the standard streams. Started as a program, this file
is such a worker.
"""

import importlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from _namespaces import Link
from typing_extensions import Self

__all__ = ["Pair"]

_DEADLINE = 600.0  # seconds of a job
_SHOWN = 3000  # characters of what a worker that ended had said
_PORT = 29511  # in namespaces, where no one else listens


class Pair:
    """Two workers.

    Args:
        link: Where they run: one at each end. None: both here, on the loopback, which has no limit.
        deadline: Seconds that a job may take.

    Raises:
        RuntimeError: From :meth:`run`, when a job fails or takes too long.
    """

    def __init__(self, link: Link | None = None, deadline: float = _DEADLINE) -> None:
        self._link, self._deadline = link, deadline
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        port = _PORT if self._link else _free_port()
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(2):
            where = self._link.command(rank) if self._link else []
            address = self._link.addresses[rank] if self._link else "127.0.0.1"
            settings = {
                "MASTER_ADDR": self._link.addresses[0] if self._link else "127.0.0.1",
                "MASTER_PORT": str(port),
                "NODE_RANK": str(rank),
                "GLOO_SOCKET_IFNAME": self._link.devices[rank] if self._link else "lo",
                "OMP_NUM_THREADS": "1",
                "WORKER_ADDRESS": address,
                "WORKER_DEVICE": self._link.devices[rank] if self._link else "",
            }
            with self._log(rank).open("wb") as log:
                process = subprocess.Popen(
                    [*where, sys.executable, __file__],
                    env={**os.environ, **settings},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
                )
            self._processes.append(process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._folder.cleanup()

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """Run a job on both workers.

        Args:
            job: The function, as ``module:function``.
            arguments: What both are called with.

        Returns:
            What they returned, rank 0 first.
        """
        answers: list[Any] = [None, None]

        def ask(rank: int) -> None:
            process = self._processes[rank]
            assert process.stdin is not None, "the stream is piped"  # noqa: S101
            assert process.stdout is not None, "the stream is piped"  # noqa: S101
            process.stdin.write(json.dumps([job, arguments]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            answers[rank] = (
                json.loads(line) if line else {"error": f"it ended with {process.wait()}\n{self._said(rank)}"}
            )

        threads = [threading.Thread(target=ask, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + self._deadline
        # One that failed leaves the other waiting for it: the first error ends the job.
        while any(thread.is_alive() for thread in threads) and not _errors(answers):
            if time.monotonic() > until:
                raise RuntimeError(f"{job} took more than {self._deadline:.0f} seconds.")
            time.sleep(0.02)
        if errors := _errors(answers):
            raise RuntimeError(f"{job} failed on worker {errors[0][0]}:\n{errors[0][1]}")
        return [answer["result"] for answer in answers]

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name, f"worker-{rank}")

    def _said(self, rank: int) -> str:
        """Return the end of what a worker said beside its answers."""
        log = self._log(rank)
        return log.read_text(errors="replace")[-_SHOWN:] if log.exists() else ""


def _errors(answers: list[Any]) -> list[tuple[int, str]]:
    return [(rank, answer["error"]) for rank, answer in enumerate(answers) if answer and "error" in answer]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve() -> None:
    """Answer jobs until the input closes."""
    # Jobs print what they like, and so do libraries: answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    while True:
        job, arguments = json.loads(jobs.get())
        module, _, name = job.partition(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(**arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _read(jobs: "queue.SimpleQueue[str]") -> None:
    """Pass on what comes in. Where nothing more will, the parent is gone: end, in the middle of a job too."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve()
