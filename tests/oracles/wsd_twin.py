"""Slow twin of the warmup-stable-decay schedule: the whole curve is written out as a list, one phase after another.

Nothing is shared with the package: lengths are worked out in exact fractions, and each decay is stated by what is
linear in it (the rate, the angle, the root, the logarithm or the reciprocal) rather than by the package's formula.
"""

import math
from fractions import Fraction


def length_in_steps(length, cycle_length):
    """An int is steps; a float is a share of the cycle, rounded down; shares are meant as the short numbers written."""
    if isinstance(length, int):
        return length
    share = Fraction(length).limit_denominator(1_000_000)
    return math.floor(share * cycle_length)


def decayed(progress, shape, floor):
    """Rate in units of the peak after a share ``progress`` of the decay, from 1 down to ``floor``."""
    if shape == "linear":  # the rate itself is a straight line
        return (1 - progress) * 1.0 + progress * floor
    if shape == "cosine":  # half a turn of a cosine, written with the half angle
        return floor + (1 - floor) * math.cos(math.pi * progress / 2) ** 2
    if shape == "1-sqrt":
        return 1 - (1 - floor) * math.sqrt(progress)
    if shape == "exponential":  # the logarithm of the rate is a straight line
        return math.exp(progress * math.log(floor))
    if shape == "inverse":  # the reciprocal of the rate is a straight line
        reciprocal = (1 - progress) * 1.0 + progress * (1 / floor)
        return 1 / reciprocal
    raise ValueError(shape)


def cycle_ends(total_steps, budgets):
    """Where the cycles end; ``None`` stands for an open end."""
    ends = list(budgets or [])
    if total_steps is None:
        return [*ends, None]
    return ends if ends and ends[-1] == total_steps else [*ends, total_steps]


def cycles(total_steps, warmup, decay, budgets=None):
    """Return ``(start, warmup_end, decay_start, end)`` of each cycle, in absolute steps."""
    result = []
    start = 0
    for end in cycle_ends(total_steps, budgets):
        length = None if end is None else end - start
        warmup_steps = length_in_steps(warmup, length) if start == 0 else 0
        decay_start = None if end is None else end - length_in_steps(decay, length)
        result.append((start, start + warmup_steps, decay_start, end))
        start = end
    return result


def curve(n, total_steps, warmup, decay, shape, min_ratio, budgets=None):
    """Return the multipliers of steps 0 to ``n - 1`` as a list."""
    values = []
    last_decay = 0
    for start, warmup_end, decay_start, end in cycles(total_steps, warmup, decay, budgets):
        for step in range(start, warmup_end):
            values.append((step - start) / (warmup_end - start))
        if end is None:
            break
        for _ in range(warmup_end, decay_start):
            values.append(1.0)
        last_decay = end - decay_start
        for done in range(last_decay):
            values.append(decayed(done / last_decay, shape, min_ratio))
    open_end = total_steps is None
    after = 1.0 if open_end or last_decay == 0 else min_ratio
    while len(values) < n:
        values.append(after)
    return values[:n]
