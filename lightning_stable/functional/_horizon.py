"""How long a run is, from what its host says of it; for all rooms."""

import math

__all__ = ["steps_of_each"]


def steps_of_each(total: float, max_steps: int, optimizers: int) -> float | None:
    """Return how many steps each optimizer makes in a run, ``None`` where its end is not known.

    Args:
        total: The host's estimate of the run's steps: infinite or below 1 where it knows none. Of a loader without a
            length it is ``max_steps``.
        max_steps: At which step the run ends, the steps of all optimizers added up; below 1 for no limit.
        optimizers: How many there are.
    """
    if not (math.isfinite(total) and total >= 1):
        return None
    return min(total, max_steps / optimizers) if max_steps >= 1 else total
