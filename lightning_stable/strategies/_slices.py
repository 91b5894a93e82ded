"""Tensors of all workers, cut into as many slices as there are workers: each worker holds the same slice of everyone's.

What is made coordinate by coordinate, or of sums over coordinates, can then be made by all workers together: one sends
each other worker its slice, sums what every slice gives, and gathers the results. The traffic is that of an all-reduce.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stable.functional.robust_ddp import RobustPlan, apply_plan, gram_matrix
from lightning_stable.strategies._flat import FlatBuffers

__all__ = ["WorkerSlices"]


class WorkerSlices:
    """One slice of the tensors of every worker.

    Every worker has to make it at the same time, of tensors of the same shapes. Half precisions travel as float32.

    Args:
        like: Floating-point tensors on one device: what each worker has.
        values: For each, what this worker has there; ``None`` stands for zeros.
    """

    def __init__(self, like: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
        workers = dist.get_world_size()
        self._buffers = FlatBuffers(like, multiple=workers)
        pairs = [(view, value) for view, value in zip(self._buffers.views, values, strict=True) if value is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [value for _, value in pairs])
        self._slices: list[Tensor] = []
        for flat in self._buffers.flats:
            received = torch.empty_like(flat)
            dist.all_to_all_single(received, flat)
            self._slices.append(received.view(workers, -1))

    def gram(self, device: torch.device, *, pairs: bool) -> Tensor:
        """Return what these slices add to the Gram matrix of the workers' tensors, (workers, workers) in float64."""
        workers = dist.get_world_size()
        total = torch.zeros(workers, workers, dtype=torch.float64, device=device)
        for part in self._slices:
            total += gram_matrix(part, pairs=pairs)
        return total

    def combine(self, plan: RobustPlan) -> list[Tensor]:
        """Return the aggregated tensors, in the order and shapes given, with the same bits on every worker."""
        for flat, part in zip(self._buffers.flats, self._slices, strict=True):
            dist.all_gather_into_tensor(flat, apply_plan(part, plan))
        self._slices = []
        return self._buffers.views
