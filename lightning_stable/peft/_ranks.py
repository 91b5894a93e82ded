"""The processes of a run while adapters are made: sums over them, values of rank 0, failures of one shared by all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

__all__ = ["Ranks"]

_T = TypeVar("_T")


class Ranks:
    """The processes that train together; one process is a group of its own.

    Args:
        trainer: Whose processes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._several = trainer.world_size > 1 and dist.is_available() and dist.is_initialized()
        self._device = trainer.strategy.root_device
        self.size = dist.get_world_size() if self._several else 1
        self.rank = dist.get_rank() if self._several else 0

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, where the tensor is."""
        if not self._several:
            return tensor
        moved = tensor.to(self._device, copy=True)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def of_first(self, tensor: Tensor) -> Tensor:
        """Return what rank 0 has there; of equal shape and dtype on all."""
        if not self._several:
            return tensor
        moved = tensor.to(self._device, copy=True, memory_format=torch.contiguous_format)
        dist.broadcast(moved, 0)
        return moved.to(tensor.device)

    def every(self, value: Any) -> list[Any]:
        """Return the small value of each process, rank 0 first."""
        if not self._several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def same(self, module: nn.Module) -> None:
        """Give all processes the weights and buffers of rank 0, as wrapping the module does later."""
        if self._several:
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.data.copy_(self.of_first(tensor.data))

    def together(self, action: Callable[[], _T]) -> _T:
        """Return what ``action`` returns, and fail on all processes if it fails on one, so that none waits for ever."""
        result, failure = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        told = self.every(None if failure is None else f"{failure}")
        if failure is not None:
            raise failure
        others = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if others:
            raise ValueError(f"Adapters could not be made on another process. {others[0]}")
        return result  # type: ignore[return-value]  # set where nothing failed
