"""Which values of a series are spikes, from the definition: everything computed anew for each value."""

import math
import statistics


def spikes(points, threshold, window, gained):
    """Return (step, limit) of each spike."""
    accepted, seen, highest, found = [], [], -math.inf, []
    for step, value in points:
        if not math.isfinite(value):
            continue
        held = accepted[-window:]
        limit = math.inf
        if len(held) >= min(16, window):
            middle = statistics.median(held)
            highest = max(highest, middle)
            mad = statistics.median(abs(each - middle) for each in held)
            upper = sorted(held)[int(0.95 * len(held) + 1e-9)]
            rises = [
                threshold * 1.4826 * mad,
                threshold * 0.01 * abs(middle),
                4 * (upper - middle),
                gained * (highest - middle),
            ]
            if max(rises) > 0:
                limit = middle + max(rises)
        above = value > limit
        seen = [*seen, (value, above)][-window:]
        if above:
            found.append((step, limit))
            if 2 * sum(flag for _, flag in seen) > window:
                accepted = [each for each, _ in seen]
                seen = [(each, False) for each in accepted]
        else:
            accepted.append(value)
    return found
