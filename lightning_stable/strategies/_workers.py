"""Who exchanges with whom, over process groups of their own, and errors that name who is missing.

A worker makes steps of its own between two exchanges. It is one process, or one node, whose processes average their
gradients at each step and then each exchange a slice of the weights with their like on the other nodes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stable.strategies._flat import FlatBuffers
from lightning_stable.strategies._roll_call import GRACE_SECONDS, RollCall

__all__ = ["Exchange", "LostWorkerError", "Workers", "node_size"]

# How many numbers are averaged with one flat copy, where there is no buffer for all.
_NUMBERS_AT_ONCE = 2**24


class LostWorkerError(RuntimeError):
    """A rank died, stalled or went another way, so that an exchange could not be made."""


class Exchange:
    """A mean over the workers that is under way, in the buffers that were given."""

    def __init__(self, workers: "Workers", buffers: FlatBuffers, works: Sequence[Any]) -> None:
        self._workers = workers
        self._buffers = buffers
        self._works = works

    def wait(self) -> None:
        """Wait until the buffers hold the mean, on every rank."""
        with self._workers.guard():
            for work in self._works:
                work.wait()
            self._workers.complete(self._buffers)

    def abandon(self, seconds: float) -> None:
        """Wait a while for what is under way, and forget it: after a failure nothing more is known of the others."""
        for work in self._works:
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=seconds))


class Workers:
    """The workers of a run: their number, their groups, and where this rank is among them.

    Attributes:
        count: Number of workers.
        node_group: The ranks of this rank's worker; ``None`` where a worker is a single process.
        slices: Into how many slices the ranks of a worker divide what they exchange.
        position: What this rank is about to take part in, for the error that another rank's absence causes.

    Args:
        owner: Name of the strategy, for messages.
        worker_size: Number of processes that make up a worker.
        timeout: How long an exchange may take, from the first rank that comes to it.
        host: Address of rank 0, where the ranks tell each other that they are there.
        device: Where small messages of this rank have to lie.
    """

    def __init__(self, owner: str, worker_size: int, timeout: timedelta, host: str, device: torch.device) -> None:
        self.owner = owner
        self._device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.slices = worker_size
        self.count = self.world_size // worker_size
        self.position = "the start of training"
        self.finished_rounds = 0
        grace = min(GRACE_SECONDS, timeout.total_seconds() / 4)
        limit = timedelta(seconds=timeout.total_seconds() - grace)
        self._groups: list[Any] = []
        worker, place = divmod(self.rank, worker_size)
        everyone = range(self.world_size)
        # Every rank has to make every group, in one order.
        outer = [self._new_group(everyone[index::worker_size], limit) for index in range(worker_size)]
        self._outer_group = outer[place]
        self._place = place
        self._world_group = self._outer_group if worker_size == 1 else self._new_group(everyone, limit)
        inner = [self._new_group(everyone[i * worker_size : (i + 1) * worker_size], limit) for i in range(self.count)]
        self.node_group = inner[worker] if worker_size > 1 else None
        self._roll_call = RollCall(host, grace)

    def launch(self, buffers: FlatBuffers) -> Exchange:
        """Begin to replace the buffers' values by their mean over the workers.

        The ranks of one worker hold equal values; each sends one slice of them.
        """
        with self.guard():
            works = [
                dist.all_reduce(self._slice(flat), group=self._outer_group, async_op=True) for flat in buffers.flats
            ]
        return Exchange(self, buffers, works)

    def complete(self, buffers: FlatBuffers) -> None:
        """Turn the sums in this rank's slices into means, and fetch the slices of the worker's other ranks."""
        for flat in buffers.flats:
            own = self._slice(flat).div_(self.count)
            if self.node_group is not None:
                dist.all_gather(list(flat.chunk(self.slices)), own.clone(), group=self.node_group)

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their mean over all ranks, and wait for it."""
        for part in _parts(tensors):
            # What optimizers keep on the CPU cannot be sent from there by every backend.
            buffers = FlatBuffers(part, device=self._device)
            buffers.read(part)
            for flat in buffers.flats:
                # First, since the sum of the largest numbers is none.
                flat.div_(self.world_size)
                with self.guard():
                    dist.all_reduce(flat, group=self._world_group)
            buffers.write(part)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over all ranks."""
        found = torch.tensor(values, dtype=torch.float64, device=self._device)
        with self.guard():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._world_group)
        return [float(value) for value in found]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks."""
        values: list[Any] = [None] * self.world_size
        with self.guard():
            dist.all_gather_object(values, value, group=self._world_group)
        return values

    def from_rank_zero(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returns on rank 0, which alone calls it."""
        values = [make() if self.rank == 0 else None]
        with self.guard():
            dist.broadcast_object_list(values, 0, group=self._world_group)
        return values[0]

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by rank 0's."""
        with self.guard():
            dist.broadcast(tensor, 0, group=self._world_group)

    @contextmanager
    def guard(self, position: str | None = None) -> Iterator[None]:
        """Turn the failure of a collective into an error that names the ranks that are missing.

        Args:
            position: What the ranks take part in, if not :attr:`position`.

        Raises:
            LostWorkerError: If a collective fails, or takes longer than the timeout.
        """
        try:
            yield
        except LostWorkerError:
            raise
        except RuntimeError as error:
            self.position = position or self.position
            explanation = self._explain(error)
            if explanation is None:
                raise
            raise LostWorkerError(explanation) from error

    def close(self) -> None:
        """Give the groups back. Ranks that are out of step would fail in it, and have nothing to give back."""
        for group in self._groups:
            with suppress(RuntimeError, ValueError):
                dist.destroy_process_group(group)
        self._groups = []
        del self._roll_call

    def _new_group(self, ranks: Sequence[int], limit: timedelta) -> Any:
        group = dist.new_group(list(ranks), timeout=limit)
        if self.rank in ranks:
            self._groups.append(group)
        return group

    def _slice(self, flat: Tensor) -> Tensor:
        return flat if self.slices == 1 else flat.chunk(self.slices)[self._place]

    def _explain(self, error: RuntimeError) -> str | None:
        """Say who is missing; ``None`` if nobody is, so that the error has another cause."""
        there, found = self._roll_call.take(self.position)
        cure = "It died, stalled or lost its link: its own output says more."
        if not found:
            if len(set(there.values())) == 1:
                return None
            where = "; ".join(f"rank {rank} at {position}" for rank, position in there.items())
            found = f"every rank is there, but not at the same place: {where}"
            cure = "Usually ranks had different numbers of batches: give each the same number."
        return (
            f"{self.owner}: {found}, and {self.position} could not be done on rank {self.rank}. "
            f"The last finished round is {self.finished_rounds}. {cure} "
            f"Start again from the last checkpoint. ({str(error).splitlines()[0]})"
        )


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide tensors, in their order, so that a flat copy of each part stays small beside the model."""
    part: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if part and numbers + tensor.numel() > _NUMBERS_AT_ONCE:
            yield part
            part, numbers = [], 0
        part.append(tensor)
        numbers += tensor.numel()
    if part:
        yield part


def node_size(owner: str, world_size: int, nodes: int) -> int:
    """Return of how many processes a node is made.

    Raises:
        ValueError: If nodes would be of different sizes.
    """
    if world_size % nodes:
        raise ValueError(
            f"{owner} with workers='node' cannot split {world_size} processes into {nodes} nodes of the same size. "
            "Start as many processes on every node, or set workers='process'."
        )
    return world_size // nodes
