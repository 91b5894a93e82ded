"""Groups of gloo processes for tests that two processes cannot show: more workers, several nodes, deaths and stalls.

Each process stands where torchrun would have put it, so a Trainer in it takes it for a rank and starts none itself.
"""

import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple

from lightning_stable.testing.serving import Place, free_port, launch, received

__all__ = ["Answer", "Group"]

# A rank that waits for another one forever is a failed test, not a hung suite.
_TIMEOUT_SECONDS = 180.0
_LARGEST = 5


class Answer(NamedTuple):
    """What became of a job on one rank.

    Attributes:
        outcome: ``"done"``, ``"failed"`` (it raised), ``"died"`` (its process is gone) or ``"silent"`` (no answer in
            time).
        value: What the job returned, or the text of the traceback; ``None`` without an answer.
        seconds: From the start of the job to its answer or its process' end, or to the moment of giving up.
    """

    outcome: str
    value: Any
    seconds: float


class Group:
    """Several long-lived processes that run the same job at the same time, as the ranks of one gloo group.

    A job is a function named ``module:function`` that all can import; what it returns has to be savable by torch. The
    processes are started by the first job. After a job that failed, died or stayed silent they are replaced, since
    their collectives may be out of step. Use it as a context manager, from a fixture of module scope::

        @pytest.fixture(scope="module")
        def three() -> Iterator[Group]:
            with Group(3) as group:
                yield group

    Args:
        size: Processes, 2 to 5.
        nodes: Nodes that they are spread over evenly, as the environment tells it; a Trainer then needs
            ``num_nodes=nodes, devices=size // nodes``.
    """

    def __init__(self, size: int, nodes: int = 1) -> None:
        if not 2 <= size <= _LARGEST:
            raise ValueError(f"Group(size={size}): 2 to {_LARGEST} processes are allowed.")
        if nodes < 1 or size % nodes:
            raise ValueError(f"Group(size={size}, nodes={nodes}): the nodes have to share the processes evenly.")
        self.size = size
        self.nodes = nodes
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._began = 0.0
        self._job = ""

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, job: str, *, timeout: float = _TIMEOUT_SECONDS, **arguments: Any) -> list[Any]:
        """Run ``job`` on every rank and return what they returned, rank 0 first; raise if one did not return."""
        self.start(job, **arguments)
        answers = self.collect(timeout)
        wrong = [(rank, answer) for rank, answer in enumerate(answers) if answer.outcome != "done"]
        told = "\n".join(f"rank {r} {a.outcome} after {a.seconds:.1f} s\n{a.value or ''}" for r, a in wrong)
        assert not wrong, f"{job}: {told}"
        return [answer.value for answer in answers]

    def start(self, job: str, **arguments: Any) -> None:
        """Begin ``job`` on every rank and return at once; `collect` has the answers."""
        if not self._processes:
            self._launch()
        self._job = job
        self._began = time.monotonic()
        for pipe in self._pipes:
            pipe.send((job, arguments))

    def kill(self, rank: int) -> None:
        """End one process without warning, as a lost machine would."""
        self._processes[rank].kill()
        self._processes[rank].join()

    def collect(self, timeout: float = _TIMEOUT_SECONDS, ranks: Sequence[int] | None = None) -> list[Answer]:
        """Wait for the ranks' answers, at most so many seconds from now, and return all, rank 0 first.

        With ``ranks`` only those are waited for: a rank that is known to hang costs no time.
        """
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            if not set(range(self.size) if ranks is None else ranks) - answers.keys():
                deadline = 0.0
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                answers[waiting[pipe]] = self._receive(pipe)
            if not ready:
                answers |= {rank: Answer("silent", None, self._elapsed()) for rank in waiting.values()}
        if any(answer.outcome != "done" for answer in answers.values()):
            self.stop()
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End all processes, also those that hang."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _receive(self, pipe: Connection) -> Answer:
        outcome, value = received(pipe)
        return Answer("failed" if outcome == "asserted" else outcome, value, self._elapsed())

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _launch(self) -> None:
        port = free_port()
        started = launch([_place(rank, self.size, self.nodes, port) for rank in range(self.size)])
        self._processes, self._pipes = [process for process, _ in started], [pipe for _, pipe in started]


def _place(rank: int, size: int, nodes: int, port: str) -> Place:
    """Return what torchrun would set in the environment of one process."""
    on_a_node = size // nodes
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % on_a_node),
        "GROUP_RANK": str(rank // on_a_node),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(on_a_node),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
