"""What is known of one run: series of values over optimizer steps, and what its files say besides."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["LIVE", "MANY", "Points", "Run", "append", "finite", "median", "thin"]

LIVE = "_live"
"""Ends the name of a validated value of the live weights, where that of their average has the name without it."""

MANY = 100
"""From so many values on a training loss is told by medians; fewer are told as they are."""

Points = list[tuple[int, float]]
"""Optimizer steps done, and the value then; in order, each step once. A value may be infinite or not a number."""

_DRAWN = 700


@dataclass
class Run:
    """One run.

    Attributes:
        name: What it is called on the page.
        folder: Where its files lie.
        series: Values by name.
        config: The config that it was started from, ``{}`` if there is none.
        hparams: The hyperparameters that a logger wrote, ``{}`` if there are none.
        record: What the callback StabilityReport wrote, ``{}`` if there is none.
        gap: What StabilityGap wrote, ``{}`` if there is none.
        numerics: The reports of NumericsMonitor, in order.
        sweep: What a sweep wrote, ``{}`` if the folder is of no sweep.
        validated: What StabilityReport noted at each validation, by name: of most names a log has more.
        seconds: How long it took, ``None`` if no file says so.
        sources: The files that were read.
        notes: What a reader of the page should know of them.
        cache: What was computed of it.
    """

    name: str
    folder: Path
    series: dict[str, Points] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    gap: dict[str, Any] = field(default_factory=dict)
    numerics: list[dict[str, Any]] = field(default_factory=list)
    sweep: dict[str, Any] = field(default_factory=dict)
    validated: dict[str, Points] = field(default_factory=dict)
    seconds: float | None = None
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def of(self, name: str) -> Points:
        """Return a series, empty if there is none of the name."""
        return self.series.get(name, [])

    @property
    def settings(self) -> dict[str, Any]:
        """The config, or the hyperparameters of a run without one."""
        return self.config or self.hparams


def append(points: Points, step: int, value: float) -> None:
    """Add a value. What a run that went back to a checkpoint had at this step and after it gives way."""
    while points and points[-1][0] >= step:
        points.pop()
    points.append((step, value))


def finite(points: Iterable[tuple[int, float]]) -> Points:
    """Return the points whose value is a finite number."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def median(values: Sequence[float]) -> float:
    """Return the median, not-a-number of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def thin(points: Points, most: int = _DRAWN) -> Points:
    """Return points that draw the same line: first, lowest, highest and last of each stretch.

    Args:
        points: In order.
        most: Number of stretches; a line of up to three times as many points is left as it is.
    """
    if len(points) <= 3 * most:
        return points
    kept: Points = []
    for part in range(most):
        stretch = points[part * len(points) // most : (part + 1) * len(points) // most]
        places = [place for place, (_, value) in enumerate(stretch) if math.isfinite(value)]
        extremes = [choose(places, key=lambda place: stretch[place][1]) for choose in (min, max)] if places else []
        kept += [stretch[place] for place in sorted({0, len(stretch) - 1, *extremes})]
    return kept
