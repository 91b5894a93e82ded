r"""Spikes of a loss or of a gradient norm: values far above what was usual just before.

With the last :math:`W` values :math:`v` that were no spikes, a value is one if it is above

.. math::

    m + \max\bigl(k \cdot 1.4826 \operatorname{median}|v - m|,\; 0.01\,k\,|m|,\; 4\,(q - m),\; s\,(h - m)\bigr), \quad
    m = \operatorname{median}(v),

where a twentieth of :math:`v` is above :math:`q`, and :math:`h` is the highest :math:`m` so far. The first two bounds
are those of SpikeGuard. The third follows the tail: batches of a run that has nearly no loss left are uneven, and that
is no spike. The fourth asks that a spike of the loss takes back a share :math:`s` of what the run has gained. What is
not finite is counted apart. Once more than half of the last :math:`W` finite values were above, they are the new level.

Standard library only: it runs on what was read from files, and on what a callback has moved from the device.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Any, NamedTuple

from lightning_stable._report.run import Points, median

__all__ = [
    "GAINED",
    "MINIMUM",
    "THRESHOLD",
    "WINDOW",
    "Spike",
    "SpikeBand",
    "SpikeRule",
    "find_spikes",
    "rule_in_words",
]

THRESHOLD, WINDOW, MINIMUM, GAINED = 6.0, 128, 16, 0.05
_NORMAL, _FLOOR = 1.4826, 0.01
# How often as far above the median as the upper twentieth begins.
_TAIL = 4.0


class SpikeRule(NamedTuple):
    """When a value is a spike.

    Attributes:
        threshold: k, robust standard deviations above the running median.
        window: W, values that tell what is usual.
        gained: s, the share of the gain so far that a spike takes back; 0 for signals that gain nothing.
    """

    threshold: float = THRESHOLD
    window: int = WINDOW
    gained: float = GAINED


class Spike(NamedTuple):
    """A value that is a spike.

    Attributes:
        step: Optimizer steps done.
        value: The value.
        limit: The largest value that would not have been one.
    """

    step: int
    value: float
    limit: float


class SpikeBand:
    """What is usual, value by value.

    Args:
        rule: When a value is a spike.

    Attributes:
        not_finite: How many values were infinite or not a number.
        first_not_finite: The step of the first of them.
    """

    def __init__(self, rule: SpikeRule) -> None:
        self._rule = rule
        self._values: deque[float] = deque()
        self._ordered: list[float] = []
        self._seen: deque[tuple[float, bool]] = deque(maxlen=rule.window)
        self._above = 0
        self._highest = -math.inf
        self.not_finite = 0
        self.first_not_finite: int | None = None

    def take(self, step: int, value: float) -> Spike | None:
        """Take a value, and return the spike that it is, if it is one."""
        if not math.isfinite(value):
            self.not_finite += 1
            self.first_not_finite = step if self.first_not_finite is None else self.first_not_finite
            return None
        limit = self._limit(value)
        above = value > limit
        if len(self._seen) == self._rule.window:
            self._above -= self._seen[0][1]
        self._seen.append((value, above))
        self._above += above
        if not above:
            self._hold(value)
        elif 2 * self._above > self._rule.window:
            self._begin_again()
        return Spike(step, value, limit) if above else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state: lists and numbers."""
        return {
            "values": list(self._values),
            "seen": [value for value, _ in self._seen],
            "above": [above for _, above in self._seen],
            "highest": self._highest,
            "not_finite": self.not_finite,
            "first_not_finite": self.first_not_finite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._values = deque(state["values"])
        self._ordered = sorted(self._values)
        self._seen = deque(zip(state["seen"], state["above"], strict=True), maxlen=self._rule.window)
        self._above = sum(state["above"])
        self._highest = state["highest"]
        self.not_finite, self.first_not_finite = state["not_finite"], state["first_not_finite"]

    def _limit(self, value: float) -> float:
        """Return the largest value that is no spike; cheaper where the value is clearly none."""
        if len(self._ordered) < min(MINIMUM, self._rule.window):
            return math.inf
        middle = median(self._ordered)
        self._highest = max(self._highest, middle)
        if value <= middle:
            return math.inf
        tail = self._ordered[len(self._ordered) * 19 // 20] - middle
        rise = max(_TAIL * tail, self._rule.gained * (self._highest - middle))
        if value <= middle + max(rise, self._rule.threshold * _FLOOR * abs(middle)):
            return math.inf  # nor would the bound that costs most make it one
        spread = max(_NORMAL * median([abs(held - middle) for held in self._ordered]), _FLOOR * abs(middle))
        rise = max(self._rule.threshold * spread, rise)
        return middle + rise if rise > 0 else math.inf

    def _hold(self, value: float) -> None:
        if len(self._values) == self._rule.window:
            del self._ordered[bisect_left(self._ordered, self._values.popleft())]
        self._values.append(value)
        insort(self._ordered, value)

    def _begin_again(self) -> None:
        """Take all values seen for the new level."""
        self._values = deque(value for value, _ in self._seen)
        self._ordered = sorted(self._values)
        self._seen = deque(((value, False) for value in self._values), maxlen=self._rule.window)
        self._above = 0


def find_spikes(points: Points, rule: SpikeRule | None = None) -> tuple[list[Spike], SpikeBand]:
    """Return the spikes of a series, and what was counted besides."""
    band = SpikeBand(SpikeRule() if rule is None else rule)
    found = [band.take(step, value) for step, value in points]
    return [spike for spike in found if spike is not None], band


def rule_in_words(rule: SpikeRule) -> str:
    """Return the rule as the page states it."""
    gained = f"; {rule.gained:.0%} of what the loss has fallen so far" if rule.gained else ""
    return (
        f"A spike is a value far above those before it. It is compared with the last {rule.window} values that were no "
        "spikes. It has to lie above their median by more than each of these: "
        f"{rule.threshold:g} standard deviations (estimated from the median absolute deviation, and at least 1% of the "
        f"median); {_TAIL:g} times the distance from the median to the 95th percentile{gained}. "
        f"The first {min(MINIMUM, rule.window)} values cannot be spikes."
    )
