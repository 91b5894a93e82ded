"""Slow twin of the decision on precision: one value at a time, with Python's own statistics, over plain lists."""

import math
import statistics


class FallbackTwin:
    """Keeps for each signal what was accepted and what was seen, and counts steps since the last switch.

    Args:
        upper: Robust standard deviations above the median at which a fallback begins.
        lower: Those that every signal has to be within for the way back.
        steps: That high precision lasts at least.
        cooldown: Steps of low precision before the next fallback.
        window: Values that are remembered.
        minimum: Values that there have to be before a finite one is judged.
        limits: Limits of signals that are not judged by their history.
        first: Steps of high precision at the start.
    """

    def __init__(self, upper=6.0, lower=3.0, steps=4, cooldown=3, window=16, minimum=4, limits=None, first=0):
        self.upper, self.lower, self.steps, self.cooldown = upper, lower, steps, cooldown
        self.window, self.minimum, self.limits = window, minimum, limits or {}
        self.accepted, self.seen, self.latest_is_raised = {}, {}, {}
        self.high = first > 0
        self.due = first  # the number of steps in this precision after which the next switch may come
        self.since = 0

    def limit(self, name, threshold):
        if name in self.limits:
            return self.limits[name] * threshold / self.upper
        values = self.accepted.get(name, [])[-self.window :]
        if len(values) < self.minimum:
            return math.inf
        middle = statistics.median(values)
        spread = max(1.4826 * statistics.median([abs(v - middle) for v in values]), 0.01 * abs(middle))
        return middle + threshold * spread if spread > 0 else math.inf

    def step(self, values, passed=1):
        """Take the values of a step, and say whether the next one is in high precision."""
        spiked = False
        for name, value in values.items():
            bad = not math.isfinite(value)
            above = bad or value > self.limit(name, self.upper)
            self.latest_is_raised[name] = bad or value > self.limit(name, self.lower)
            spiked = spiked or above
            if not bad and name not in self.limits:
                self._remember(name, value, above)
        self.since += passed
        if self.since >= self.due:
            if self.high and True not in self.latest_is_raised.values():
                self.high, self.since, self.due = False, 0, self.cooldown
            elif not self.high and spiked:
                self.high, self.since, self.due = True, 0, self.steps
        return self.high

    def _remember(self, name, value, above):
        accepted, seen = self.accepted.setdefault(name, []), self.seen.setdefault(name, [])
        seen.append((value, above))
        if not above:
            accepted.append(value)
            return
        recent = seen[-self.window :]
        if 2 * sum(spike for _, spike in recent) > self.window:
            self.accepted[name] = [old for old, _ in recent]
            self.seen[name] = [(old, False) for old, _ in recent]
