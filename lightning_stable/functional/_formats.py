r"""Number formats of few bits: their names, the range of their exponents, and all their values.

A float format ``eXmY`` has a sign, X bits of exponent and Y bits of mantissa. With the exponent bias
:math:`B = 2^{X-1} - 1` its values are

.. math::

    \pm 2^{e - B}\,(1 + m\,2^{-Y}) \;\text{for } e \ge 1, \qquad \pm 2^{1 - B}\, m\, 2^{-Y} \;\text{for } e = 0

with :math:`e` the code of the exponent and :math:`m` that of the mantissa, from 0 to :math:`2^Y - 1`. From X = 5 on
the highest code of the exponent stands for infinity and NaN, as in IEEE 754: ``e8m7`` is bfloat16, ``e5m10`` float16,
``e8m10`` the grid of TF32. Up to X = 4 every code is a number; of ``e4m3`` alone the one highest is NaN (OCP 8-bit
floating point: largest value 448). The block formats ``mx*`` are those of OCP Microscaling 1.0; ``nvfp4`` is
NVIDIA's. ``e8m0`` here is a signed float format with a zero, which the scale of the same name in the block formats is
not.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Format", "exponent_bias", "lowest_exponent", "parse_format", "value_table"]

HIGHEST_MANTISSA = 10
_FLOAT = re.compile(r"e([1-8])m(\d|10)")
_INTEGER = re.compile(r"int([2-8])")
_POWER = re.compile(r"shift([2-8])")
_BLOCKS = {
    "mxfp8": ("e4m3", 32, "e8m0"),
    "mxfp8_e5m2": ("e5m2", 32, "e8m0"),
    "mxfp6": ("e3m2", 32, "e8m0"),
    "mxfp6_e2m3": ("e2m3", 32, "e8m0"),
    "mxfp4": ("e2m1", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
}


class Format(NamedTuple):
    """What a format's name stands for.

    Attributes:
        name: The name.
        kind: ``"float"``, ``"integer"``, ``"power"`` (powers of two without a zero), ``"binary"`` or ``"ternary"``.
        exponent_bits: Bits of the exponent of an element.
        mantissa_bits: Bits of its mantissa; for an integer all bits but the sign.
        largest: Greatest value of an element, before any scale.
        block: Elements that share a scale the format brings with it; 0 if it brings none.
        block_scale: What that scale is stored as: ``"e8m0"`` (a power of two), ``"e4m3"``, or "" for none.
    """

    name: str
    kind: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    block: int = 0
    block_scale: str = ""


def exponent_bias(spec: Format) -> int:
    """Return the exponent bias of a float format."""
    return int(2 ** (spec.exponent_bits - 1)) - 1


def lowest_exponent(spec: Format) -> int:
    """Return the power of two of a float format's smallest normal value; below it the steps are even."""
    return 1 - exponent_bias(spec)


def parse_format(name: str) -> Format:
    """Return what the format called ``name`` is.

    Args:
        name: ``"eXmY"`` with X from 1 to 8 and Y from 0 to 10, ``"int2"`` to ``"int8"`` (symmetric, so ``"int2"`` is
            -1, 0, 1), ``"mxfp8"``, ``"mxfp8_e5m2"``, ``"mxfp6"``, ``"mxfp6_e2m3"``, ``"mxfp4"``, ``"nvfp4"``,
            ``"shift2"`` to ``"shift8"`` (a sign and a power of two), ``"binary"`` or ``"ternary"``.

    Raises:
        ValueError: If there is no such format.
    """
    if isinstance(name, str):
        if name in _BLOCKS:
            element, block, scale = _BLOCKS[name]
            return parse_format(element)._replace(name=name, block=block, block_scale=scale)
        if name in ("binary", "ternary"):
            return Format(name, name, 0, 0, 1.0)
        if match := _FLOAT.fullmatch(name):
            return _float_format(name, int(match[1]), int(match[2]))
        if match := _INTEGER.fullmatch(name):
            bits = int(match[1])
            return Format(name, "integer", 0, bits - 1, float(2 ** (bits - 1) - 1))
        if match := _POWER.fullmatch(name):
            bits = int(match[1])
            return Format(name, "power", bits - 1, 0, 2.0 ** (2 ** (bits - 1) - 1))
    raise ValueError(
        f"format={name!r} is unknown. Choose a float 'eXmY' with X from 1 to 8 and Y from 0 to {HIGHEST_MANTISSA} "
        "('e4m3', 'e5m2', 'e3m2', 'e2m3', 'e2m1', 'e8m7' …), 'int2' to 'int8', a block format "
        f"({', '.join(map(repr, _BLOCKS))}), 'shift2' to 'shift8', 'binary' or 'ternary'."
    )


def _float_format(name: str, exponent_bits: int, mantissa_bits: int) -> Format:
    spec = Format(name, "float", exponent_bits, mantissa_bits, 0.0)
    highest = int(2**exponent_bits) - 1 - exponent_bias(spec) - (exponent_bits >= 5)
    # e4m3 gives its highest code to NaN, so that its largest value ends one step lower.
    missing = 2 if name == "e4m3" else 1
    return spec._replace(largest=2.0**highest * (2.0 - missing * 2.0**-mantissa_bits))


def value_table(format: str) -> Tensor:  # noqa: A002
    """Return all non-negative values of an element of ``format``, ascending, in float64.

    Raises:
        ValueError: If there is no such format.
    """
    spec = parse_format(format)
    if spec.kind == "power":
        return 2.0 ** torch.arange(2**spec.exponent_bits, dtype=torch.float64)
    if spec.kind != "float":
        return torch.arange(int(spec.kind == "binary"), int(spec.largest) + 1, dtype=torch.float64)
    steps = 2**spec.mantissa_bits
    mantissa = torch.arange(steps, dtype=torch.float64) / steps
    exponent = torch.arange(2**spec.exponent_bits, dtype=torch.float64).unsqueeze(1)
    normal = 2.0 ** (exponent - exponent_bias(spec)) * (1.0 + mantissa)
    subnormal = 2.0 ** lowest_exponent(spec) * mantissa
    values = torch.cat([subnormal, normal[1:].flatten()])
    return values[values <= spec.largest]
