"""Slow twin of quantization: every value of a format enumerated from its codes, and the nearest one searched for.

Numbers are Python floats, comparisons exact fractions. ``single`` rounds a double to float32, so that a quotient or
product of two float32 numbers is rounded once, as in float32 arithmetic (a double has more than twice the digits).
"""

import itertools
import math
import re
import struct
from bisect import bisect_right
from fractions import Fraction
from functools import lru_cache

BLOCKS = {
    "mxfp8": ("e4m3", 32),
    "mxfp8_e5m2": ("e5m2", 32),
    "mxfp6": ("e3m2", 32),
    "mxfp6_e2m3": ("e2m3", 32),
    "mxfp4": ("e2m1", 32),
    "nvfp4": ("e2m1", 16),
}


def single(value):
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def decode_float(exponent_bits, mantissa_bits, code):
    """The value of one non-negative code, or None if the code is no number."""
    bias = 2 ** (exponent_bits - 1) - 1
    field, digits = divmod(code, 2**mantissa_bits)
    if exponent_bits >= 5 and field == 2**exponent_bits - 1:
        return None
    if (exponent_bits, mantissa_bits) == (4, 3) and code == 0b1111111:
        return None
    whole = digits if field == 0 else 2**mantissa_bits + digits
    return math.ldexp(whole, max(field, 1) - bias - mantissa_bits)


@lru_cache
def table(name):
    """All non-negative values of an element as floats, ascending, in the order of their codes."""
    name = BLOCKS[name][0] if name in BLOCKS else name
    if match := re.fullmatch(r"e(\d)m(\d+)", name):
        bits = int(match[1]), int(match[2])
        values = [decode_float(*bits, code) for code in range(2 ** sum(bits))]
        values = [value for value in values if value is not None]
    elif match := re.fullmatch(r"int(\d)", name):
        values = [float(code) for code in range(2 ** (int(match[1]) - 1))]
    elif match := re.fullmatch(r"shift(\d)", name):
        values = [2.0**code for code in range(2 ** (int(match[1]) - 1))]
    else:
        values = {"binary": [1.0], "ternary": [0.0, 1.0]}[name]
    assert all(low < high for low, high in itertools.pairwise(values))
    return values


def neighbours(name, size):
    """The codes of the values on both sides of a magnitude, the same twice where it is one of them."""
    values = table(name)
    if size >= values[-1]:
        return len(values) - 1, len(values) - 1
    below = bisect_right(values, size) - 1
    if below < 0 or values[below] == size:
        return max(below, 0), max(below, 0)
    return below, below + 1


def element(name, value, rounding="nearest"):
    """One number rounded onto the values of a format's elements."""
    low, high = neighbours(name, abs(value))
    values = table(name)
    code = low
    if rounding == "nearest" and low != high:
        double, middle = 2 * Fraction(abs(value)), Fraction(values[low]) + Fraction(values[high])
        if double > middle or (double == middle and low % 2 == 1):
            code = high
    # Formats without a zero count zero of either sign as positive.
    sign = -1.0 if value < 0 or (values[0] == 0 and math.copysign(1.0, value) < 0) else 1.0
    return sign * values[code]


def sharers(shape, scaling):
    """Lists of the flat indices that share a scale."""
    found = {}
    kind, _, number = scaling.partition(":")
    for flat, index in enumerate(itertools.product(*map(range, shape))):
        if kind == "tensor":
            key = ()
        elif kind == "channel":
            key = index[0]
        elif kind == "row":
            key = index[:-1]
        elif len(shape) >= 4:
            behind = 0
            for place, extent in zip(index[1:], shape[1:], strict=True):
                behind = behind * extent + place
            key = (index[0], behind // int(number))
        else:
            key = (*index[:-1], index[-1] // int(number))
        found.setdefault(key, []).append(flat)
    return list(found.values())


def scaled(values, name, scale, rounding, fit):
    return [fit(element(name, fit(value / (scale or 1.0)), rounding) * scale) for value in values]


def signs(values, name):
    """Binary and ternary values of one group, times a mean; sums are exact, so compare with a tolerance."""
    mean = math.fsum(map(abs, values)) / len(values)
    if name == "binary":
        return [-mean if value < 0 else mean for value in values]
    chosen = [abs(value) for value in values if abs(value) > 0.7 * mean]
    level = math.fsum(chosen) / max(len(chosen), 1)
    return [math.copysign(level, value) if abs(value) > 0.7 * mean else 0.0 for value in values]


def codes(values, bits, rounding, fit):
    """All codes of an unsigned integer from the lowest to the highest of a group, zero always among them."""
    low, high = min(0.0, *values), max(0.0, *values)
    top = 2**bits - 1
    scale = fit(fit(high - low) / top) or 1.0
    zero = min(top, max(0, round(fit(-low / scale))))
    whole = round if rounding == "nearest" else math.trunc
    return [fit((min(top, max(0, whole(fit(value / scale)) + zero)) - zero) * scale) for value in values]


def quantize(values, shape, name, scaling="none", rounding="nearest", keep=0, asymmetric=False, bias=None, fit=single):
    """A flat list of floats quantized, by groups of flat indices; rounding "nearest" or "truncate"."""
    if scaling.startswith("shift"):
        return shift_groups(values, shape, name, int(scaling.partition(":")[2]), rounding, fit)
    result = list(values)
    whole = f"group:{BLOCKS[name][1]}" if name in BLOCKS else "tensor" if scaling == "none" else scaling
    groups = sharers(shape, whole)
    kept = [sorted(group, key=lambda i: -abs(values[i]))[:keep] for group in groups]
    others = [[i for i in group if i not in out] for group, out in zip(groups, kept, strict=True)]
    tops = [max((abs(values[i]) for i in group), default=0.0) for group in others]
    for group, top in zip(others, tops, strict=True):
        mine = [values[i] for i in group]
        if not mine:
            continue
        if name in ("binary", "ternary") and scaling != "none":
            made = signs(mine, name)
        elif asymmetric:
            made = codes(mine, int(name[3:]), rounding, fit)
        else:
            made = scaled(mine, name, scale_of(name, scaling, top, max(tops), bias, fit), rounding, fit)
        for i, value in zip(group, made, strict=True):
            result[i] = value
    return result


def scale_of(name, scaling, top, highest, bias, fit):
    """The scale of a group whose largest magnitude is ``top``, in a tensor whose largest is ``highest``."""
    largest = table(name)[-1]
    if name == "nvfp4":
        tensor_scale = single(highest / (6 * 448)) or 1.0
        return fit(element("e4m3", fit(top / fit(6 * tensor_scale))) * tensor_scale)
    if name in BLOCKS:
        exponent = -127 if top == 0 else math.frexp(top)[1] - math.frexp(largest)[1]
        return 2.0 ** min(127, max(-127, exponent))
    if scaling == "none":
        return 1.0 if bias is None else fit(grid_shift(name, bias))
    return fit(top / largest) or 1.0


def grid_shift(name, bias):
    """What a grid is multiplied with when its exponent bias is replaced."""
    return 2.0 ** (2 ** (int(name[1]) - 1) - 1 - bias)


def shift_groups(values, shape, name, levels, rounding, fit):
    """Channels in scales that are halvings of the largest."""
    axis = 1 if len(shape) >= 4 else len(shape) - 1
    channel = [index[axis] for index in itertools.product(*map(range, shape))]
    ranges = [max(abs(v) for v, c in zip(values, channel, strict=True) if c == k) for k in range(shape[axis])]
    top = max(ranges)
    result = []
    for value, c in zip(values, channel, strict=True):
        halvings = levels - 1 if ranges[c] == 0 else math.frexp(fit(top / ranges[c]))[1] - 1
        scale = fit(top * 2.0 ** -min(levels - 1, max(0, halvings)) / table(name)[-1]) or 1.0
        result += scaled([value], name, scale, rounding, fit)
    return result


def llm_fp4(value, exponent_bits, mantissa_bits, bias):
    """LLM-FP4's quantizer as its paper writes it, for a format all whose codes are numbers; float64."""
    top = 2.0 ** (2**exponent_bits - 1 - bias) * (2 - 2.0**-mantissa_bits)
    value = max(-top, min(top, value))
    if value == 0:
        return 0.0
    step = 2.0 ** (max(1, math.floor(math.log2(abs(value)) + bias)) - mantissa_bits - bias)
    return step * round(value / step)
