r"""Rounding onto the values of a format: nearest with ties to even, stochastic, or towards zero.

All work is on float32 or float64, bit-exact on each device, without a loop or a table. Between two powers of two a
float format has even steps. The step :math:`s` is a power of two and follows from the bits of the exponent of :math:`x`
alone, so that

.. math:: q(x) = s \cdot \operatorname{round}(x / s), \qquad s = 2^{\max(\lfloor\log_2|x|\rfloor,\; e_{min}) - Y}

where both products are exact. In float32 the formats with 8 bits of exponent share float32's own range; there the low
bits of the mantissa are rounded off or masked in place, so that also their subnormal values are right.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._formats import Format, lowest_exponent

__all__ = ["ROUNDINGS", "binary_exponent", "divide", "magnitude_bits", "power_of_two", "round_saturated", "round_steps"]

ROUNDINGS = ("nearest", "stochastic", "truncate")


class _Layout(NamedTuple):
    integer: torch.dtype
    mantissa: int
    bias: int


_LAYOUTS = {
    torch.float32: _Layout(torch.int32, 23, 127),
    torch.float64: _Layout(torch.int64, 52, 1023),
}
# Formats that torch has itself, with the same values and the same ties: two casts are the fastest way there. Not under
# torch.compile, whose simplifications take a cast there and back for nothing and drop it.
_CASTS = {"e8m7": torch.bfloat16, "e5m10": torch.float16}


def magnitude_bits(x: Tensor) -> Tensor:
    """Return the bits of ``|x|`` as integers."""
    layout = _LAYOUTS[x.dtype]
    return x.view(layout.integer).bitwise_and(torch.iinfo(layout.integer).max)


def binary_exponent(x: Tensor) -> Tensor:
    r"""Return :math:`\lfloor\log_2|x|\rfloor` as integers, from the bits; one less than the lowest for subnormals."""
    layout = _LAYOUTS[x.dtype]
    return (magnitude_bits(x) >> layout.mantissa) - layout.bias


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2 to the power of integers from -127 to 127, exact in ``dtype``."""
    layout = _LAYOUTS[dtype]
    normal = exponent.clamp(min=-126)
    power = ((normal + layout.bias).to(layout.integer) << layout.mantissa).view(dtype)
    # 2^-127 is a subnormal float32: half of the smallest normal one.
    return torch.where(exponent < -126, power * 0.5, power)


def divide(x: Tensor, divisor: float) -> Tensor:
    """Return ``x / divisor``, rounded once: by a plain number some devices multiply with its inverse."""
    return x / x.new_full((), divisor)


def round_steps(x: Tensor, rounding: str, generator: torch.Generator | None) -> Tensor:
    """Round to whole numbers, in place.

    Args:
        x: Float32 or float64; overwritten.
        rounding: One of ``ROUNDINGS``. Stochastic rounding goes up with the probability of the part behind the point,
            to a resolution of 2^-24 (float32) or 2^-53 (float64).
        generator: Where the random numbers come from.
    """
    if rounding == "nearest":
        return x.round_()
    if rounding == "truncate":
        # The same as trunc, which takes ten times as long on a CPU.
        return x.abs().floor_().copysign_(x)
    down = x.floor()
    draws = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    # The part behind the point less a draw lies above -1: rounded up it is 1 where the draw is smaller, else 0.
    return down.add_(x.sub_(down).sub_(draws).ceil_())


def round_saturated(
    x: Tensor, spec: Format, rounding: str, generator: torch.Generator | None, own: bool = False
) -> Tensor:
    """Round to the nearest, a random or the lower neighbour among the values of an element.

    Values beyond the largest become the largest, infinities too. NaN stays NaN.

    Args:
        x: Float32 or float64, of any shape.
        spec: The format.
        rounding: One of ``ROUNDINGS``; of no effect on binary, which has only signs.
        generator: Where random numbers come from.
        own: Whether ``x`` may be overwritten.

    Returns:
        A tensor of the same shape and dtype; a new one unless ``own``.
    """
    if spec.kind == "binary":
        # Adding zero makes the negative zero a positive one; adding nothing brings back NaN.
        return torch.copysign(x.new_ones(()), x + 0.0).add_(x.clamp(-1.0, 1.0), alpha=0)
    if spec.kind == "power":
        # Adding zero makes the negative zero a positive one.
        return _round_power(x.add_(0.0) if own else x + 0.0, spec, rounding, generator)
    if spec.kind == "float" and x.dtype is torch.float32:
        if rounding == "nearest" and spec.name in _CASTS and not torch.compiler.is_compiling():
            return x.to(_CASTS[spec.name]).to(x.dtype).clamp_(-spec.largest, spec.largest)
        if rounding == "truncate" and spec.exponent_bits == 8 and spec.mantissa_bits:
            return _truncate_bits(x, spec)
    x = x.clamp_(-spec.largest, spec.largest) if own else x.clamp(-spec.largest, spec.largest)
    if spec.kind != "float":
        return round_steps(x, rounding, generator)
    if spec.exponent_bits == 8 and x.dtype is torch.float32:
        return _round_bits(x, spec.mantissa_bits, rounding, generator)
    if spec.mantissa_bits or rounding != "nearest":
        return _round_even_steps(x, spec, rounding, generator)
    # Without a mantissa the even one of two neighbours is the one with the even exponent code.
    normal = _round_bits(x, 0, rounding, generator)
    return torch.where(
        x.abs() < 2.0 ** lowest_exponent(spec), _round_even_steps(x.clone(), spec, rounding, None), normal
    )


def _truncate_bits(x: Tensor, spec: Format) -> Tensor:
    # The product turns each NaN into one whose highest bit of the mantissa is set, which the mask keeps.
    cut = x.mul(1.0)
    cut.view(torch.int32).bitwise_and_(-1 << (23 - spec.mantissa_bits))
    return cut.clamp_(-spec.largest, spec.largest)


def _round_even_steps(x: Tensor, spec: Format, rounding: str, generator: torch.Generator | None) -> Tensor:
    """Round a saturated tensor in place, by its exponents' steps."""
    layout = _LAYOUTS[x.dtype]
    # The bits of the exponent alone are a power of two; two biases less them are its inverse.
    inverse = x.view(layout.integer).bitwise_and((2 * layout.bias + 1) << layout.mantissa)
    inverse.clamp_(min=(lowest_exponent(spec) + layout.bias) << layout.mantissa)
    inverse.neg_().add_((2 * layout.bias + spec.mantissa_bits) << layout.mantissa)
    scale = inverse.view(x.dtype)
    return round_steps(x.mul_(scale), rounding, generator).div_(scale)


def _round_bits(
    x: Tensor, mantissa: int, rounding: str, generator: torch.Generator | None, odd: bool = False
) -> Tensor:
    """Round off the low bits of the mantissa of a saturated tensor; ``odd``: a tie goes to the odd exponent code."""
    layout = _LAYOUTS[x.dtype]
    bits = x.view(layout.integer)
    cut = layout.mantissa - mantissa
    if rounding == "nearest":
        rounded = (bits >> cut).bitwise_and_(1)
        if odd:
            rounded.neg_().add_(1)
        rounded.add_(bits).add_((1 << (cut - 1)) - 1)
    elif rounding == "stochastic":
        draws = torch.randint(0, 1 << cut, x.shape, generator=generator, device=x.device, dtype=layout.integer)
        rounded = draws.add_(bits)
    else:
        rounded = bits.clone()
    rounded.bitwise_and_(-1 << cut)
    # Adding nothing keeps every number and its sign, and brings back a NaN whose bits have run over.
    return rounded.view(x.dtype).add_(x, alpha=0)


def _round_power(x: Tensor, spec: Format, rounding: str, generator: torch.Generator | None) -> Tensor:
    # The code of an exponent is 127 less than float32's bits (1023 in float64): even codes have odd bits.
    size = _round_bits(x.abs().clamp_(1.0, spec.largest), 0, rounding, generator, odd=True)
    return size.copysign_(x)
