r"""What a number format did to an operand: underflow, saturation, signal to noise, range, and a histogram of exponents.

Of an operand :math:`x`, such as a layer's weight, and what it was quantized to, :math:`q`, over its finite entries:

- underflow: the share of the entries with :math:`x \ne 0` that became :math:`q = 0`;
- saturation: the share of the entries that lie beyond the largest value that the format has at their scale, and were
  cut to it; 0 by construction where the scale is fitted to the largest entry;
- SQNR, the ratio of signal to quantization noise, :math:`10 \log_{10} \bigl(\sum x^2 / \sum (x - q)^2\bigr)` in
  decibels, about 6 for each bit; infinite where nothing was lost;
- absmax: :math:`\max |x|`, in the operand's unit;
- how many nonzero entries there are for each :math:`\lfloor \log_2 |x| \rfloor` from -126 to 127, and below.

All are counts and sums but for absmax, so that statistics of micro-batches, steps and processes merge into those of
them together, and nothing has to be read from the device before they are reported. Shares of underflow and overflow
and the error of each tensor are what the debug statistics of NVIDIA's Transformer Engine report of its own kernels;
the definitions here are ours. ``e4m3`` for operands and ``e5m2`` for gradients: arXiv 2209.05433.
"""

import math

import torch
from torch import Tensor

from lightning_stable.functional._formats import exponent_bias
from lightning_stable.functional._scales import grid_scale, group, ungroup
from lightning_stable.functional.quantize import Quantizer

__all__ = [
    "MEASURES",
    "OPERANDS",
    "SIZE",
    "add_statistics",
    "can_saturate",
    "count_nonfinite",
    "empty_statistics",
    "exponent_histogram",
    "measure",
    "merge_statistics",
    "operand_statistics",
    "saturated",
    "statistics_dtype",
]

OPERANDS = ("weights", "activations", "gradients")
MEASURES = ("underflow", "saturation", "sqnr", "absmax")

# Places of the counts and sums in a vector of statistics; the histogram follows.
_ELEMENTS, _NONFINITE, _NONZERO, _UNDERFLOW, _SATURATED, _SIGNAL, _NOISE, _ABSMAX, _HISTOGRAM = range(9)
# The exponent's bits in float32: 0 for what is below the normal numbers, 255 for what is no number.
_BINS = 255
_LOWEST = -127

SIZE = _HISTOGRAM + _BINS
"""Numbers in a vector of statistics."""


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of statistics on a device: float64, in which counts are exact, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def empty_statistics(rows: int, device: torch.device) -> Tensor:
    """Return the statistics of nothing, of shape (rows, SIZE)."""
    return torch.zeros(rows, SIZE, dtype=statistics_dtype(device), device=device)


@torch.no_grad()
def operand_statistics(exact: Tensor, quantized: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the statistics of one operand, on its device, without reading any of them.

    Args:
        exact: The operand, of any shape; of a floating-point dtype. For scales of blocks the matrix whose rows they
            run over.
        quantized: What it became, of the same shape.
        quantizer: How.

    Returns:
        Tensor of shape (SIZE,).
    """
    wide = statistics_dtype(exact.device)
    if exact.numel() == 0:
        return torch.zeros(SIZE, dtype=wide, device=exact.device)
    lost = saturated(exact, quantized, quantizer)
    narrow = torch.promote_types(exact.dtype, torch.float32)
    finite = exact.isfinite()
    x, q = (torch.where(finite, part, 0).to(narrow) for part in (exact, quantized))
    absmax = x.abs().amax()
    # Squares of small gradients would be 0 in float32.
    unit = torch.where(absmax > 0, absmax, 1.0)
    energies = [(part / unit).square_().sum(dtype=wide) for part in (x, x - q)]
    counts = [~finite, x != 0, (x != 0) & (q == 0), lost & finite]
    return torch.cat(
        [
            torch.stack([torch.full((), float(exact.numel()), dtype=wide, device=exact.device)]),
            torch.stack([mask.sum(dtype=wide) for mask in counts]),
            torch.stack(energies) * unit.to(wide).square(),
            absmax.to(wide).reshape(1),
            _histogram(x).to(wide),
        ]
    )


def can_saturate(quantizer: Quantizer) -> bool:
    """Tell whether any entry can lie beyond the largest value of its grid.

    None can where a scale is fitted to the largest entry. Without scales there is an end of the grid, the scales of
    blocks are rounded, and the level of binary and ternary is a mean.
    """
    return quantizer.layout == "none" or quantizer.spec.block > 0 or quantizer.spec.kind in ("binary", "ternary")


@torch.no_grad()
def saturated(exact: Tensor, quantized: Tensor, quantizer: Quantizer) -> Tensor:
    """Tell which entries lie beyond the largest value of their grid, and were not kept as they are.

    Args:
        exact: As in :func:`operand_statistics`.
        quantized: What it became.
        quantizer: How.

    Returns:
        Boolean tensor of the shape of ``exact``.
    """
    spec = quantizer.spec
    if not can_saturate(quantizer):
        return torch.zeros_like(exact, dtype=torch.bool)
    if spec.kind in ("binary", "ternary"):
        return (exact.abs() > quantized.abs()) & (quantized != 0)
    if spec.block:
        return (exact.abs() > _block_limit(exact, quantizer)) & (exact != quantized)
    bias = quantizer.exponent_bias
    limit = spec.largest * (1.0 if bias is None else 2.0 ** (exponent_bias(spec) - bias))
    return (exact.abs() > limit) & (exact != quantized)


def add_statistics(total: Tensor, new: Tensor) -> None:
    """Add the statistics of further entries, in place.

    Args:
        total: Shape (SIZE,).
        new: Shape (SIZE,).
    """
    absmax = torch.maximum(total[_ABSMAX], new[_ABSMAX])
    total.add_(new)
    total[_ABSMAX] = absmax


def merge_statistics(parts: Tensor) -> Tensor:
    """Return the statistics of several sets of entries together.

    Args:
        parts: Shape (n, ..., SIZE).

    Returns:
        Tensor of shape (..., SIZE).
    """
    merged = parts.sum(0)
    merged[..., _ABSMAX] = parts[..., _ABSMAX].amax(0)
    return merged


def measure(statistics: Tensor) -> Tensor:
    """Return :data:`MEASURES` of statistics of shape (..., SIZE), of shape (..., 4); not a number where there are none.

    Shares are in [0, 1], the ratio of signal to noise is in decibels, absmax in the operand's unit.
    """
    s = statistics.double() if statistics.device.type != "mps" else statistics
    finite = s[..., _ELEMENTS] - s[..., _NONFINITE]
    # Nothing that is not zero cannot become zero.
    underflow = s[..., _UNDERFLOW] / s[..., _NONZERO].clamp(min=1)
    sqnr = 10.0 * torch.log10(s[..., _SIGNAL] / s[..., _NOISE])
    found = torch.stack([underflow, s[..., _SATURATED] / finite, sqnr, s[..., _ABSMAX]], -1)
    return torch.where((finite > 0).unsqueeze(-1), found, math.nan)


def count_nonfinite(statistics: Tensor) -> Tensor:
    """Return how many entries of statistics of shape (..., SIZE) are no finite numbers, of shape (...)."""
    return statistics[..., _NONFINITE]


def exponent_histogram(statistics: Tensor) -> tuple[int, list[int]]:
    """Return the histogram of one vector of statistics, without the empty ends.

    Returns:
        The lowest exponent, -127 for all that is below the normal numbers of float32, and the counts from there on;
        0 and no counts if there is no nonzero entry.
    """
    counts = [int(count) for count in statistics[_HISTOGRAM:].tolist()]
    places = [place for place, count in enumerate(counts) if count]
    if not places:
        return 0, []
    return _LOWEST + places[0], counts[places[0] : places[-1] + 1]


def _histogram(x: Tensor) -> Tensor:
    """Count the nonzero entries by their exponent."""
    exponents = (x.float().view(torch.int32) >> 23) & 0xFF
    # Zeros go where infinities would be, and are left out with them.
    places = torch.where(x == 0, _BINS, exponents).flatten().long()
    counts = torch.bincount(places, minlength=_BINS + 1) if x.device.type == "cpu" else _scattered_counts(places)
    return counts[:_BINS]


def _scattered_counts(places: Tensor) -> Tensor:
    """Count as a bincount does, without waiting for the device to learn how many bins there are."""
    counts = torch.zeros(_BINS + 1, dtype=torch.int64, device=places.device)
    return counts.scatter_add_(0, places, counts.new_ones(()).expand_as(places))


def _block_limit(exact: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the largest value at the scale of each entry's block."""
    work = exact.to(torch.promote_types(exact.dtype, torch.float32))
    groups = group(work, quantizer.layout, quantizer.size, quantizer.padding)
    values = groups.values
    if quantizer.keep_outliers:
        # The scale is that of the others.
        kept = values.abs().topk(min(quantizer.keep_outliers, values.shape[1]), dim=1, sorted=False).indices
        values = values.scatter(1, kept, 0.0)
    limit = grid_scale(values, quantizer.spec, quantizer.layout, quantizer.size) * quantizer.spec.largest
    return ungroup(limit.expand_as(groups.values), groups)
