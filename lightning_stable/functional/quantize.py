r"""Quantization simulated exactly: any number format, scaling and rounding, on any device, in the tensor's own dtype.

.. math:: Q(x) = s \cdot q(x / s)

with :math:`q` the rounding onto the values of the format (``value_table``) and :math:`s` the scale that entries
share; 1 without scaling, else their largest magnitude over the format's largest value. Values have the unit of
:math:`x`. The work is done in float32, in float64 for float64; where a result times its scale is no number of the
tensor's dtype it is rounded to one.

Float formats: OCP 8-bit floating point and Microscaling 1.0, IEEE 754 from five bits of exponent on. ``int`` formats
are symmetric, and asymmetric ones span from the lowest to the highest entry, zero always among the levels. ``shift``
has the values of DenseShift (arXiv 2208.09708), without its training. ``ternary`` is TWN (arXiv 1605.04711): the
entries beyond 0.7 times the mean magnitude become plus or minus their own mean magnitude. ``binary`` is the sign
times the mean magnitude (XNOR-Net, arXiv 1603.05279). ReSTE (arXiv 2308.06689) gives binary a gradient; as in the
released code the gradient is multiplied by the scale, but unlike there none flows through the scale. A real-valued
exponent bias and its search are LLM-FP4's (arXiv 2310.16836); there the search minimises the error of a layer's
output (:mod:`.exponent_bias`), here that of the tensor, and formats whose highest codes are not numbers keep them so.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_stable.functional._formats import Format, exponent_bias, parse_format, value_table
from lightning_stable.functional._quantizer import ESTIMATORS, Quantizer
from lightning_stable.functional._rounding import ROUNDINGS, round_saturated
from lightning_stable.functional._scales import (
    grid_scale,
    group,
    largest_entries,
    quantize_codes,
    quantize_signs,
    ungroup,
)
from lightning_stable.functional._settings import check_count
from lightning_stable.functional.exponent_bias import bias_candidates, bias_errors

__all__ = [
    "ESTIMATORS",
    "ROUNDINGS",
    "Format",
    "Quantizer",
    "parse_format",
    "quantize",
    "quantize_gradient",
    "reste_exponent",
    "search_exponent_bias",
    "straight_through",
    "value_table",
]

# ReSTE: the gradient is constant within the first magnitude and nothing beyond the second.
RESTE_INNER, RESTE_OUTER = 0.1, 1.5


@torch.no_grad()
def quantize(x: Tensor, quantizer: Quantizer, *, generator: torch.Generator | None = None) -> Tensor:
    """Return ``x`` rounded onto the grid of ``quantizer``, without a gradient.

    Args:
        x: A floating-point tensor of any shape, also empty.
        quantizer: Format, scaling and rounding.
        generator: Where the numbers of stochastic rounding come from, on the device of ``x``; ``None`` for torch's own.

    Returns:
        A new tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``x`` is not floating-point, or a group does not divide its width and ``padding`` is false.
    """
    return _quantize(x, quantizer, generator)[0]


def straight_through(
    x: Tensor,
    quantizer: Quantizer,
    *,
    generator: torch.Generator | None = None,
    reste_exponent: float = 1.0,
) -> Tensor:
    r"""Quantize with a gradient, exactly the values of ``quantize``.

    The gradient passes as it is; with ``passes_saturated=False`` only where the value was within its grid. With
    ``estimator="reste"`` it is multiplied by the scale and, with o the exponent, by

    .. math:: \tfrac1o |x|^{(1 - o)/o} \text{ for } 0.1 < |x| \le 1.5, \qquad 0.1^{1/o} / 0.1 \text{ below},
        \qquad 0 \text{ beyond.}

    Args:
        x: A floating-point tensor of any shape.
        quantizer: Format, scaling, rounding and gradient.
        generator: As in ``quantize``.
        reste_exponent: ReSTE's o, from 1 (a clipped identity) on; see the function of that name.

    Raises:
        ValueError: As ``quantize``, and if ``reste_exponent`` is not from 1 on.
    """
    if not reste_exponent >= 1.0:
        raise ValueError(f"reste_exponent={reste_exponent!r} is below 1, where ReSTE begins. Give 1 to 3.")
    with torch.no_grad():
        quantized, beyond = _quantize(x, quantizer, generator, bounds=not quantizer.passes_saturated)
        factor = beyond
        if quantizer.estimator == "reste":
            slope = quantized.abs() * _reste_slope(x, reste_exponent)
            factor = slope if beyond is None else slope.masked_fill(beyond, 0.0)
    passed: Tensor = _StraightThrough.apply(x, quantized, factor)  # type: ignore[no-untyped-call]
    return passed


def quantize_gradient(x: Tensor, quantizer: Quantizer, *, generator: torch.Generator | None = None) -> Tensor:
    """Return ``x`` as it is, and quantize the gradient that flows back through it.

    A second derivative passes the quantized gradient as ``straight_through`` does.

    Raises:
        ValueError: In the backward pass, as ``quantize``.
    """
    passed: Tensor = _QuantizeGradient.apply(x, quantizer, generator)  # type: ignore[no-untyped-call]
    return passed


def reste_exponent(progress: float, final: float = 3.0) -> float:
    r"""Return ReSTE's exponent :math:`o = 1 + (1 - \cos(\pi p / 2))(o_{end} - 1)` after a share p of training.

    Args:
        progress: p, the share of training that is done, from 0 to 1.
        final: :math:`o_{end}`, the exponent at the end, from 1 on.

    Raises:
        ValueError: If either is out of its range.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress!r} is not in [0, 1]: it is the share of training that is done.")
    if not 1.0 <= final < math.inf:
        raise ValueError(f"final={final!r} is not a finite number from 1 on: it is the exponent at the end.")
    return 1.0 + (1.0 - math.cos(math.pi * progress / 2.0)) * (final - 1.0)


@torch.no_grad()
def search_exponent_bias(x: Tensor, format: str, candidates: int = 100) -> float:  # noqa: A002
    """Return the real-valued exponent bias with the least squared error on ``x``.

    The candidates put the largest value of the format at even steps from 0.01 to 1.2 times the largest magnitude of
    ``x``. Of equal ones the first is taken. Waits for the device once; meant for the first batches, not for each step.

    Args:
        x: A floating-point tensor of any shape. Without any finite entry but zeros the format's own bias is returned.
        format: A float format ``eXmY``.
        candidates: How many to try.

    Raises:
        ValueError: If ``format`` is not a plain float format, ``candidates`` is below 1, or ``x`` not floating-point.
    """
    check_count("candidates", candidates, 1, "biases to try")
    work = _as_work(x)
    biases = bias_candidates(work, format, candidates)
    return biases[int(bias_errors(work, format, biases).argmin())]


class _StraightThrough(torch.autograd.Function):
    """Forward exactly the quantized values, which ``x + (q - x)`` would round; backward the gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        if factor is None:
            return gradient, None, None
        # Filled, for an infinite gradient times nothing would be NaN.
        return gradient.masked_fill(factor, 0.0) if factor.dtype is torch.bool else gradient * factor, None, None


class _QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, generator: torch.Generator | None) -> Tensor:
        ctx.quantizer, ctx.generator = quantizer, generator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return straight_through(gradient, ctx.quantizer, generator=ctx.generator), None, None


def _as_work(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"A tensor of {x.dtype} cannot be quantized: it is not floating-point. Convert it first.")
    return x if x.dtype is torch.float64 else x.to(torch.float32)


def _reste_slope(x: Tensor, exponent: float) -> Tensor:
    size = _as_work(x).abs()
    slope = size.clamp(min=RESTE_INNER).pow((1.0 - exponent) / exponent) / exponent
    slope = torch.where(size <= RESTE_INNER, RESTE_INNER ** (1.0 / exponent) / RESTE_INNER, slope)
    return torch.where(size > RESTE_OUTER, 0.0, slope).to(x.dtype)


def _quantize(
    x: Tensor, q: Quantizer, generator: torch.Generator | None, bounds: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the quantized tensor and, if ``bounds`` and any can, which entries lie beyond the grid."""
    work = _as_work(x)
    if not work.numel():
        return x.clone(), None
    if q.layout == "none" and not q.keep_outliers:
        rounded, beyond = _round_scaled(work, q, generator, bounds)
        return rounded.to(x.dtype), beyond
    groups = group(work, q.layout, q.size, q.padding)
    values, counts = groups.values, groups.counts
    kept = largest_entries(values, q.keep_outliers) if q.keep_outliers else None
    if kept is not None:
        values, counts = values.scatter(-1, kept, 0.0), counts - q.keep_outliers
    beyond = None
    if q.spec.kind in ("binary", "ternary") and q.layout != "none":
        rounded, level = quantize_signs(values, counts, q.spec)
        beyond = values.abs() > level if bounds else None
    elif q.asymmetric:
        rounded = quantize_codes(values, q.spec, q.rounding, generator)
    else:
        rounded, beyond = _round_scaled(values, q, generator, bounds)
    if kept is not None:
        rounded.scatter_(-1, kept, groups.values.gather(-1, kept))
    return ungroup(rounded, groups).to(x.dtype), None if beyond is None else ungroup(beyond, groups)


def _round_scaled(
    values: Tensor, q: Quantizer, generator: torch.Generator | None, bounds: bool
) -> tuple[Tensor, Tensor | None]:
    if q.layout == "none":
        if q.exponent_bias is None:
            beyond = values.abs() > q.spec.largest if bounds else None
            return round_saturated(values, q.spec, q.rounding, generator), beyond
        scale = values.new_full((), 2.0 ** (exponent_bias(q.spec) - q.exponent_bias))
    else:
        scale = grid_scale(values, q.spec, q.layout, q.size)
    # A block scale of nvfp4 can be 0: its block becomes zeros, NaN stays.
    scaled = values / torch.where(scale == 0, 1.0, scale)
    loose = q.layout == "none" or q.spec.block > 0
    beyond = scaled.abs() > q.spec.largest if bounds and loose else None
    return round_saturated(scaled, q.spec, q.rounding, generator, own=True).mul_(scale), beyond
