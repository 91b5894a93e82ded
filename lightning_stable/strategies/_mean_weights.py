"""The mean of the workers' weights, in the module for the length of a validation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stable.strategies._workers import Workers

__all__ = ["MeanWeights"]


class MeanWeights:
    """Puts the mean over all ranks into tensors, and each rank's own values back."""

    def __init__(self) -> None:
        self._own: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def put_in(self, tensors: Sequence[Tensor], workers: Workers) -> None:
        """Replace the tensors by their mean, and keep their own values."""
        self._own = [(tensor, tensor.clone()) for tensor in tensors]
        workers.mean(tensors)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the tensors their own values again; nothing if they have them."""
        if self._own:
            torch._foreach_copy_([tensor for tensor, _ in self._own], [value for _, value in self._own])
        self._own = []
