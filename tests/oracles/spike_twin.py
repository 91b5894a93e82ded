"""Slow twin of the spike guard: a robust band over the last accepted values, with Python's own statistics."""

import math
import statistics


def limit(values, threshold, floor):
    """Return the median plus ``threshold`` robust standard deviations.

    1.4826 times the median distance from the median is the standard deviation of a normal distribution; it is taken as
    at least ``floor`` times the size of the median.
    """
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median([abs(value - middle) for value in values])
    return middle + threshold * max(spread, floor * abs(middle))


class SpikeTwin:
    """Decides value by value; only accepted ones are remembered, until spikes are the rule.

    Once more than half of the last ``window`` finite values were spikes, their level is taken for the usual one: the
    band is that of all of them, and none of them counts as a spike any more.

    Args:
        threshold: In robust standard deviations.
        window: How many accepted values are remembered.
        minimum: How many there have to be before a finite value can be a spike.
        floor: Least spread as a share of the median.
    """

    def __init__(self, threshold, window, minimum, floor=0.01):
        self.threshold = threshold
        self.window = window
        self.minimum = minimum
        self.floor = floor
        self.accepted = []
        self.seen = []

    def limit(self):
        recent = self.accepted[-self.window :]
        if len(recent) < max(self.minimum, 1):
            return math.inf
        return limit(recent, self.threshold, self.floor)

    def is_spike(self, value):
        """Say whether a value is a spike; it is not remembered yet."""
        return not math.isfinite(value) or value > self.limit()

    def accept(self, value):
        self.accepted.append(value)
        self.seen.append((value, False))

    def reject(self, value, instead=None):
        """Leave a spike out, or remember another value in its place."""
        if not math.isfinite(value):
            return
        if instead is not None:
            self.accepted.append(instead)
        self.seen.append((value, True))
        recent = self.seen[-self.window :]
        if sum(spike for _, spike in recent) > self.window / 2:
            self.accepted = [old for old, _ in recent]
            self.seen = [(old, False) for old, _ in recent]

    def decide(self, values):
        """Return for each of a list of values whether it is a spike."""
        found = []
        for value in values:
            found.append(self.is_spike(value))
            (self.reject if found[-1] else self.accept)(value)
        return found
