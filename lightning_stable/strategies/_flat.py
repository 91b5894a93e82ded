"""Flat buffers: many tensors laid end to end, so that one collective and one fused operation serve them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["FlatBuffers", "wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which tensors of this one are averaged: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class FlatBuffers:
    """Room for a copy of some tensors: one flat tensor for each precision, and views of the tensors' shapes into it.

    Half precisions get room in float32, since a mean or a momentum of theirs would lose small movements.

    Attributes:
        flats: One tensor of one dimension for each precision. What is left of it after the tensors is zero.
        lengths: How much of each flat tensor the tensors take.
        views: For each tensor, in the order given, its part of a flat tensor, in its shape.

    Args:
        tensors: Floating-point tensors, of any shapes.
        multiple: The length of each flat tensor is a multiple of this, so that so many ranks can each take a slice.
        dtype: One precision for all, instead of each tensor's own, widened.
        device: Where the buffers are; ``None`` for where the tensors are.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        multiple: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        dtypes = [dtype or wide_dtype(tensor.dtype) for tensor in tensors]
        self.flats: list[Tensor] = []
        self.lengths: list[int] = []
        views: dict[int, Tensor] = {}
        for kind in dict.fromkeys(dtypes):
            members = [index for index, found in enumerate(dtypes) if found == kind]
            sizes = [tensors[index].numel() for index in members]
            length = -(-sum(sizes) // multiple) * multiple
            flat = torch.zeros(length, dtype=kind, device=device or tensors[members[0]].device)
            self.flats.append(flat)
            self.lengths.append(sum(sizes))
            parts = torch.split(flat[: sum(sizes)], sizes)
            views |= {i: part.view(tensors[i].shape) for i, part in zip(members, parts, strict=True)}
        self.views = [views[index] for index in range(len(tensors))]

    @torch.no_grad()
    def read(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors' values into the buffers."""
        if tensors:
            torch._foreach_copy_(self.views, list(tensors))

    @torch.no_grad()
    def write(self, tensors: Sequence[Tensor]) -> None:
        """Copy the buffers' values into the tensors."""
        if tensors:
            torch._foreach_copy_(list(tensors), self.views)
