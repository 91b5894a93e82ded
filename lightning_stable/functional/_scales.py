r"""Scales of quantization: which entries share one, and how it follows from them.

Entries that share a scale are brought into one row of a matrix, ``group``; ``ungroup`` undoes it. A scale maps the
largest magnitude of its entries onto the largest value of the format; where all are zero it is 1. An infinity makes its
scale the highest there is, so that the others of its group fall to zero; a NaN makes its whole group NaN, as in a
kernel that takes the maximum first. In ``nvfp4`` and ``shift:N``, whose scales depend on the largest magnitude of all,
either one reaches the whole tensor.

The block scales are those of OCP Microscaling 1.0, :math:`2^{\lfloor\log_2 absmax\rfloor - e_{max}}` with
:math:`e_{max}` the exponent of the largest element value, and of NVIDIA's NVFP4: a float32 scale a tensor,
:math:`absmax/(6 \cdot 448)`, times a scale a block rounded to e4m3. ``shift:N`` is ShiftQuant's grouping of channels
(arXiv 2411.10948) in our reconstruction, unverified: with :math:`r_c` the largest magnitude of channel c and r that of
all, :math:`k_c = clip(\lfloor\log_2(r/r_c)\rfloor, 0, N - 1)` and the scale is :math:`r\,2^{-k_c}` over the largest
value.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightning_stable.functional._formats import Format, parse_format
from lightning_stable.functional._rounding import (
    binary_exponent,
    divide,
    magnitude_bits,
    power_of_two,
    round_saturated,
    round_steps,
)

__all__ = ["Groups", "grid_scale", "group", "largest_entries", "quantize_codes", "quantize_signs", "ungroup"]

# TWN: entries beyond this share of the mean magnitude are not zero.
TERNARY_THRESHOLD = 0.7


class Groups(NamedTuple):
    """Entries by the scale they share.

    Attributes:
        values: ``(groups, members)``; for channels in powers of two ``(before, channels, behind)``.
        counts: How many members of each group are entries of the tensor and not padding, ``(groups, 1)`` or a number.
        shape: The tensor's own shape.
        width: Entries of a row before padding; 0 if nothing was padded.
    """

    values: Tensor
    counts: Tensor | float
    shape: torch.Size
    width: int


def group(x: Tensor, scaling: str, size: int, padding: bool) -> Groups:
    """Bring the entries that share a scale into one row.

    Args:
        x: A tensor of any shape that is not empty.
        scaling: ``"tensor"``, ``"channel"``, ``"row"``, ``"group"`` or ``"shift"``; ``"none"`` counts as one group.
        size: For ``"group"`` how many entries in a run share a scale. Runs go along the last dimension; for a tensor of
            four or more dimensions (convolutions) along all dimensions but the first, flattened.
        padding: Whether a last run that is too short is filled with zeros.

    Raises:
        ValueError: If the width is no multiple of ``size`` and ``padding`` is false.
    """
    shape = x.shape
    x = x if x.dim() else x.reshape(1)
    if scaling in ("none", "tensor"):
        return Groups(x.reshape(1, -1), float(x.numel()), shape, 0)
    if scaling == "channel":
        return Groups(x.reshape(x.shape[0], -1), x.numel() / x.shape[0], shape, 0)
    if scaling == "row":
        return Groups(x.reshape(-1, x.shape[-1]), float(x.shape[-1]), shape, 0)
    if scaling == "shift":
        channel = 1 if x.dim() >= 4 else x.dim() - 1
        return Groups(x.reshape(math.prod(x.shape[:channel]), x.shape[channel], -1), 1.0, shape, 0)
    return _runs(x, size, padding, shape)


def _runs(x: Tensor, size: int, padding: bool, shape: torch.Size) -> Groups:
    rows = x.flatten(1) if x.dim() >= 4 else x.reshape(-1, x.shape[-1])
    width = rows.shape[1]
    missing = -width % size
    if not missing:
        return Groups(rows.reshape(-1, size), float(size), shape, 0)
    if not padding:
        raise ValueError(
            f"The width {width} of a tensor of shape {tuple(shape)} is no multiple of the {size} entries that share a "
            "scale. Choose a size that divides it, or padding=True to fill the last run with zeros."
        )
    counts = torch.full((rows.shape[0], -(-width // size)), float(size), dtype=x.dtype, device=x.device)
    counts[:, -1] -= missing
    return Groups(functional.pad(rows, (0, missing)).reshape(-1, size), counts.reshape(-1, 1), shape, width)


def ungroup(values: Tensor, groups: Groups) -> Tensor:
    """Bring values in the order of ``groups`` back into the tensor's shape."""
    if not groups.width:
        return values.reshape(groups.shape)
    padded = groups.width + -groups.width % values.shape[1]
    return values.reshape(-1, padded)[:, : groups.width].reshape(groups.shape)


def _finite(x: Tensor) -> Tensor:
    """Return ``x`` with infinities at the end of the finite range; NaN stays."""
    limits = torch.finfo(x.dtype)
    # A little below the end, so that a scale times the largest value is not rounded to infinity again.
    top = limits.max * (1.0 - 4.0 * limits.eps)
    return x.clamp(-top, top)


def _absmax(values: Tensor, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """Return the largest magnitude over ``dims``, finite; NaN where there is one."""
    # Without their sign, bits are ordered as the numbers, NaN last; integers are compared faster than numbers.
    return _finite(magnitude_bits(values).amax(dims, keepdim=True).view(values.dtype))


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def largest_entries(values: Tensor, count: int) -> Tensor:
    """Return where the ``count`` entries of largest magnitude are in each row; NaN counts as the largest."""
    return values.abs().topk(min(count, values.shape[-1]), dim=-1, sorted=False).indices


def grid_scale(values: Tensor, spec: Format, layout: str, size: int) -> Tensor:
    """Return the scale of each row: a block format's own, a channel's halving, or the largest magnitude's."""
    if spec.block:
        return _block_scale(values, spec)
    if layout == "shift":
        return _shift_scale(values, spec, size)
    return _usable(divide(_absmax(values), spec.largest))


def _shift_scale(values: Tensor, spec: Format, levels: int) -> Tensor:
    ranges = _absmax(values, (0, 2))
    top = ranges.amax()
    # A channel of zeros has an infinite ratio, whose exponent lies beyond the last level.
    halvings = binary_exponent(top / ranges).clamp(0, levels - 1)
    return _usable(divide(top * power_of_two(-halvings, values.dtype), spec.largest))


def _block_scale(values: Tensor, spec: Format) -> Tensor:
    absmax = _absmax(values)
    if spec.block_scale == "e8m0":
        # Less the exponent of the largest value of an element; e8m0 holds -127 to 127.
        exponents = binary_exponent(absmax) - (math.frexp(spec.largest)[1] - 1)
        scale = power_of_two(exponents.clamp(-127, 127), values.dtype)
        return torch.where(absmax.isnan(), absmax, scale)
    stored = parse_format(spec.block_scale)
    tensor_scale = _usable(divide(absmax.amax(), spec.largest * stored.largest).float()).to(values.dtype)
    return round_saturated(absmax / (spec.largest * tensor_scale), stored, "nearest", None, own=True) * tensor_scale


def quantize_signs(values: Tensor, counts: Tensor | float, spec: Format) -> tuple[Tensor, Tensor]:
    """Return each row as binary or ternary values times their mean magnitude, and that magnitude."""
    size = values.abs()
    counts = counts.clamp(min=1.0) if isinstance(counts, Tensor) else max(counts, 1.0)
    mean = _finite(size.sum(-1, keepdim=True) / counts)
    if spec.kind == "binary":
        # Adding zero makes the negative zero a positive one.
        return torch.copysign(mean, values + 0.0), mean
    # 1 above the threshold, else 0: products of numbers are several times faster than choices on a CPU.
    above = size.sub(TERNARY_THRESHOLD * mean).sign_().relu_()
    chosen = _finite(size.mul_(above).sum(-1, keepdim=True) / above.sum(-1, keepdim=True).clamp(min=1.0))
    # A NaN lies above nothing: it is put back, and makes its whole group NaN.
    chosen = torch.where(mean.isnan(), mean, chosen)
    return above.mul_(values.sign()).mul_(chosen), chosen


def quantize_codes(values: Tensor, spec: Format, rounding: str, generator: torch.Generator | None) -> Tensor:
    """Return each row in all codes of an integer from its lowest to its highest entry, zero always among them."""
    codes = 2.0 ** (spec.mantissa_bits + 1) - 1.0
    low = _finite(values.amin(-1, keepdim=True).clamp(max=0.0))
    high = _finite(values.amax(-1, keepdim=True).clamp(min=0.0))
    scale = _usable(divide(_finite(high - low), codes))
    zero = (-low / scale).round_().clamp_(0.0, codes)
    shifted = round_steps(values / scale, rounding, generator).add_(zero)
    return shifted.clamp_(0.0, codes).sub_(zero).mul_(scale)
