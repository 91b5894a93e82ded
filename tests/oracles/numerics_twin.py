"""What a format did to numbers, counted one by one in plain Python; torch's own float8 dtypes and tables quantize."""

import bisect
import math

import torch
from torch import Tensor

# Largest values of the formats that torch has itself.
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def quantized(x: Tensor, form: str) -> Tensor:
    """Round to a float8 format, beyond whose largest value there is none."""
    largest = LARGEST[form]
    return x.clamp(-largest, largest).to(_DTYPES[form]).to(x.dtype)


def nearest(value: float, table: list[float], scale: float) -> float:
    """Round to the nearest entry of a table of non-negative values times a scale; ties do not occur in the tests."""
    size = abs(value) / scale
    place = bisect.bisect_left(table, size)
    around = table[max(0, place - 1) : place + 1]
    return math.copysign(min(around, key=lambda entry: abs(entry - size)) * scale, value)


class Counts:
    """Counts over all that :meth:`add` is given.

    Args:
        limit: The largest value of the format.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.elements = self.nonfinite = self.nonzero = self.lost = self.beyond = 0
        self.signal, self.noise, self.absmax = [], [], 0.0
        self.exponents: dict[int, int] = {}

    def add(self, exact: Tensor, after: Tensor) -> None:
        for x, q in zip(exact.double().flatten().tolist(), after.double().flatten().tolist(), strict=True):
            self.elements += 1
            if not math.isfinite(x):
                self.nonfinite += 1
                continue
            self.nonzero += x != 0
            self.lost += x != 0 and q == 0
            self.beyond += abs(x) > self.limit and x != q
            self.signal.append(x * x)
            self.noise.append((x - q) ** 2)
            self.absmax = max(self.absmax, abs(x))
            if x != 0:
                exponent = max(-127, math.frexp(x)[1] - 1)
                self.exponents[exponent] = self.exponents.get(exponent, 0) + 1

    def measures(self) -> list[float]:
        """Underflow, saturation, SQNR in decibels, absmax."""
        noise, finite = math.fsum(self.noise), self.elements - self.nonfinite
        sqnr = 10 * math.log10(math.fsum(self.signal) / noise) if noise else math.inf
        return [self.lost / max(1, self.nonzero), self.beyond / finite, sqnr, self.absmax]

    def histogram(self) -> tuple[int, list[int]]:
        low, high = min(self.exponents), max(self.exponents)
        return low, [self.exponents.get(exponent, 0) for exponent in range(low, high + 1)]
