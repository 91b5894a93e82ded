"""Sharpness on logits by search, from its definition: every corner of the box, random points of it, an optimiser."""

import itertools
import math
import random


def loss(z: list[float], target: int) -> float:
    """Cross-entropy in nats; exact also where it is tiny, since the target's own term is taken out."""
    rest = math.fsum(math.exp(value - z[target]) for place, value in enumerate(z) if place != target)
    return math.log1p(rest)


def room(z: list[float], epsilon: float) -> list[float]:
    return [epsilon * (abs(value) + 1) for value in z]


def sharpness(z: list[float], target: int, largest: float) -> float:
    """Percent, from the largest loss that a search has found."""
    return 100 * (largest - loss(z, target)) / (1 + loss(z, target))


def by_corners(z: list[float], target: int, epsilon: float) -> tuple[float, list[float]]:
    """Return the largest loss over all corners of the box, and that corner."""
    sides = [(value - width, value + width) for value, width in zip(z, room(z, epsilon), strict=True)]
    return max((loss(list(corner), target), list(corner)) for corner in itertools.product(*sides))


def by_chance(z: list[float], target: int, epsilon: float, tries: int, seed: int) -> float:
    """Return the largest loss over random points of the box."""
    draw = random.Random(seed)  # noqa: S311  a seeded search
    widths = room(z, epsilon)
    return max(
        loss([value + draw.uniform(-width, width) for value, width in zip(z, widths, strict=True)], target)
        for _ in range(tries)
    )


def by_optimiser(z: list[float], target: int, epsilon: float) -> float:
    """Return the largest loss that L-BFGS-B finds within the box, from its middle."""
    from scipy.optimize import minimize

    bounds = [(value - width, value + width) for value, width in zip(z, room(z, epsilon), strict=True)]
    found = minimize(lambda point: -loss(list(point), target), z, method="L-BFGS-B", bounds=bounds)
    return -float(found.fun)


def mean_sharpness(rows: list[list[float]], targets: list[int], epsilon: float) -> float:
    """Return the mean over samples, each by its corners."""
    found = [sharpness(z, t, by_corners(z, t, epsilon)[0]) for z, t in zip(rows, targets, strict=True)]
    return math.fsum(found) / len(found)
