"""Which parameters are in which bucket, so that what is kept for a bucket is found again when DDP lays them out anew.

DDP puts gradients into buckets, and a hook sees one bucket at a time. After the first backward pass, and so after every
start and resume too, the buckets are laid out anew in the order in which gradients became ready. What a hook keeps for
each entry of a gradient therefore belongs to a parameter's name, not to a bucket's number.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Bucket", "Kept", "Layout", "Layouts", "layout_of", "to_cpu"]

# Tensors by what they are ("error"), by stream of passes, and by the name of the parameter.
Kept = defaultdict[str, defaultdict[int, dict[str, Tensor]]]


class Bucket(Protocol):
    """What of torch's ``GradBucket`` is used here: torch gives it no types."""

    def index(self) -> int: ...
    def is_last(self) -> bool: ...
    def buffer(self) -> Tensor: ...
    def parameters(self) -> list[Tensor]: ...


class Layout(NamedTuple):
    """What is in a bucket.

    Attributes:
        names: The parameters' names, in the bucket's order.
        shapes: Their shapes.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> list[int]:
        """The entries of each parameter."""
        return [shape.numel() for shape in self.shapes]


def layout_of(bucket: Bucket, names: Mapping[Tensor, str]) -> Layout:
    """Return what is in a bucket.

    Raises:
        ValueError: If its gradients are sparse.
    """
    parameters = bucket.parameters()
    found = tuple(names[parameter] for parameter in parameters)
    if bucket.buffer().is_sparse:
        raise ValueError(
            f"CompressedDDPStrategy cannot compress the sparse gradient of {', '.join(map(repr, found))}. Build the "
            "embedding with sparse=False."
        )
    return Layout(found, tuple(parameter.shape for parameter in parameters))


def to_cpu(kept: Kept) -> None:
    """Move all tensors to the CPU."""
    for streams in kept.values():
        for tensors in streams.values():
            tensors.update({name: tensor.cpu() for name, tensor in tensors.items()})


class Layouts:
    """Remembers the layout of every bucket and finds out which of them are no longer."""

    def __init__(self) -> None:
        self._known: defaultdict[int, dict[int, Layout]] = defaultdict(dict)
        self._in_this_pass: set[int] = set()

    def arrive(self, stream: int, index: int, layout: Layout) -> tuple[bool, dict[int, Layout]]:
        """Note that a bucket has come, and return whether it is as it was, and which others' layouts are void.

        Those that came before it in the same pass are not: their messages may still be under way.

        Args:
            stream: Which of several passes within a batch it is.
            index: The bucket's number; 0 begins a pass.
            layout: What is in it.
        """
        if index == 0:
            self._in_this_pass.clear()
        known = self._known[stream]
        same = known.get(index) == layout
        void = {} if same else {i: known.pop(i) for i in list(known) if i not in self._in_this_pass}
        known[index] = layout
        self._in_this_pass.add(index)
        return same, void

    def forget(self) -> None:
        """Forget all layouts."""
        self._known.clear()

    def now(self) -> list[tuple[int, int, Layout]]:
        """Return stream, number and layout of all buckets."""
        return [(stream, i, layout) for stream, known in self._known.items() for i, layout in known.items()]
