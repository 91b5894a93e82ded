r"""Compressed gradients: top-k, scaled sign with one bit an entry, and three ways to make up for what is left out.

Worker :math:`i` of :math:`N` has the gradient :math:`g_i` and sends :math:`c_i = C(x_i)`. From the mean
:math:`\bar c = \frac1N \sum_i c_i` each worker gets the same :math:`\hat g`, the gradient to step with:

.. math::

    \text{EF:}\quad & x_i = g_i + e_i, \quad e_i \leftarrow x_i - c_i, \quad \hat g = \bar c \
    \text{EF21:}\quad & x_i = g_i - h_i, \quad h_i \leftarrow h_i + c_i, \quad
        \hat g = \bar h \leftarrow \bar h + \bar c \
    \text{EControl:}\quad & x_i = g_i - h_i + \eta e_i, \quad e_i \leftarrow e_i + g_i - h_i - c_i, \quad
        h_i \leftarrow h_i + c_i, \quad \hat g = \bar h \leftarrow \bar h + \bar c

:math:`e_i` is what a worker has not sent yet, :math:`h_i` what the others know of its gradient, :math:`\bar h` the mean
of the :math:`h_i`; all have the shape and the unit of a gradient. :math:`\eta \in (0, 1]` has no unit. The compressors,
on a tensor :math:`x` of :math:`d` entries: top-k keeps the :math:`k` entries of largest size; the scaled sign is
:math:`\frac{\lVert x \rVert_1}{d} \operatorname{sign}(x)`, with :math:`\operatorname{sign}(0) = 1`.

EF21: arXiv 2106.05203. It may start from zero or from full gradients; its released code (read, not run) does the
latter, and takes the largest entries of all tensors together, where :func:`top_k` takes those of one. EControl: arXiv
2311.05645; its equations are from memory: unverified. It starts from :math:`h_i = 0` here and, as we know it, from the
first gradient in the paper (unverified). EF, from 1-bit SGD, and its scaled sign: arXiv 1901.09847 (from memory:
unverified). There the error is kept of the update, here of the gradient: with a changing learning rate the two
differ.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ERRORS",
    "Memory",
    "init_memory",
    "pack_signs",
    "sign_scale",
    "top_k",
    "top_k_count",
    "unpack_signs",
    "update_memory",
    "what_to_send",
]

ERRORS = ("ef", "ef21", "econtrol")


class Memory(NamedTuple):
    r"""What a worker remembers of its messages; what a method does without is ``None``.

    Attributes:
        error: What was not sent yet, :math:`e_i`. EF and EControl.
        estimate: What the others know of this worker's gradient, :math:`h_i`. EF21 and EControl.
        mean: The mean of all workers' estimates, :math:`\bar h`, the same on all. EF21 and EControl.
    """

    error: Tensor | None
    estimate: Tensor | None
    mean: Tensor | None


def top_k_count(entries: int, ratio: float) -> int:
    """Return how many of a tensor's entries are sent: the share ``ratio``, rounded up, and at least one."""
    # A share such as 0.07 of 100 is not to become 8 by a rounding error.
    return min(entries, max(1, math.ceil(round(entries * ratio, 6))))


def top_k(tensor: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` entries of largest size of a flat tensor, (count,), and where they are, int32 (count,)."""
    places = torch.topk(tensor.abs(), count, sorted=False).indices
    return tensor[places], places.to(torch.int32)


def sign_scale(tensor: Tensor) -> Tensor:
    """Return the mean size of a tensor's entries, without dimensions: what one sign stands for."""
    return tensor.abs().sum() / max(1, tensor.numel())


def pack_signs(tensor: Tensor) -> Tensor:
    """Return the signs of a flat tensor of ``d`` entries, eight in a byte: uint8 of shape (ceil(d / 8),).

    Bit ``j`` of byte ``i`` is 1 if entry ``8 i + j`` is 0 or more.
    """
    bits = torch.nn.functional.pad(tensor >= 0, (0, -tensor.numel() % 8)).view(-1, 8)
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=tensor.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, entries: int) -> Tensor:
    """Return the first ``entries`` signs that :func:`pack_signs` packed, as bool: true for 0 or more."""
    bits = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).view(-1)[:entries].to(torch.bool)


def init_memory(error: str, like: Tensor) -> Memory:
    """Return a memory that starts at zero.

    Args:
        error: "ef", "ef21" or "econtrol".
        like: A tensor of the gradient's shape, in the precision of the memory.

    Raises:
        ValueError: If ``error`` is unknown.
    """
    if error not in ERRORS:
        raise ValueError(f"error={error!r} is unknown. Choose one of {', '.join(map(repr, ERRORS))}.")
    new = torch.zeros_like
    return Memory(
        None if error == "ef21" else new(like),
        None if error == "ef" else new(like),
        None if error == "ef" else new(like),
    )


def what_to_send(memory: Memory, gradient: Tensor, eta: float = 1.0) -> Tensor:
    r"""Return :math:`x_i`, of which a worker sends the compressed form.

    Args:
        memory: The worker's memory.
        gradient: Its gradient.
        eta: Weight of what was not sent yet: 1 for EF, :math:`\eta` for EControl, without meaning for EF21.
    """
    x = gradient if memory.estimate is None else gradient - memory.estimate
    return x if memory.error is None else torch.add(x, memory.error, alpha=eta)


@torch.no_grad()
def update_memory(memory: Memory, gradient: Tensor, own: Tensor, mean: Tensor, counts: Tensor | None = None) -> Tensor:
    r"""Note what was sent, in place, and return :math:`\hat g`, the gradient to step with.

    What is returned may be a tensor of the memory.

    Args:
        memory: The worker's memory. Changed in place.
        gradient: Its gradient.
        own: What the others made of its message, :math:`c_i`.
        mean: The mean of all workers' messages, :math:`\bar c`.
        counts: Where it is false, the memory stays as if nothing had been sent. ``None``: true everywhere.
    """
    error, estimate, average = memory
    left = gradient - own if estimate is None else gradient - estimate - own
    if counts is not None:
        zero = torch.zeros((), dtype=own.dtype, device=own.device)
        left, own, mean = (torch.where(counts, value, zero) for value in (left, own, mean))
    if error is not None:
        error.add_(left)
    if estimate is None or average is None:
        return mean
    estimate.add_(own)
    return average.add_(mean)
