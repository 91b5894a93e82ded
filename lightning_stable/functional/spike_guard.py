r"""A robust band of what a training signal usually is, such as the gradient norm, to tell spikes from it.

With the last :math:`W` accepted values :math:`v`, of any one unit, a value is a spike if it is above

.. math::

    \operatorname{median}(v) + z \max\bigl(1.4826 \operatorname{median}|v - \operatorname{median}(v)|,\;
    0.01\,|\operatorname{median}(v)|\bigr)

or not finite. :math:`z` (``threshold``) counts standard deviations of a normal distribution, for which 1.4826 times
the median absolute deviation is one; the floor keeps values that hardly vary from making every change a spike. The
band is one-sided: small values are no spikes. Judging the norm by its history follows ZClip (arXiv 2504.02507: a
z-score from exponential averages of mean and variance); the median band is ours, since averages follow the spikes
that they should stand against.

A spike is rare by definition. Once more than half of the last :math:`W` finite values were rejected, they are the new
level: the band is then taken from all of them, so that no guard rejects for ever.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "SpikeBandState",
    "init_spike_band",
    "reject_spike",
    "running_median",
    "spike_limit",
    "update_spike_band",
]

_FLOOR = 0.01
_NORMAL = 1.4826


class SpikeBandState(NamedTuple):
    """State of the band, on the CPU; not-a-number fills what holds no value yet.

    Attributes:
        values: The last accepted values, oldest first, float64 of shape (window,).
        seen: The last finite values, accepted or not, oldest first, float64 of shape (window,).
        rejected: Which of ``seen`` were rejected, bool of shape (window,).
    """

    values: Tensor
    seen: Tensor
    rejected: Tensor


def init_spike_band(window: int) -> SpikeBandState:
    """Return a band over ``window`` values that has seen none.

    Raises:
        ValueError: If ``window`` is less than 2.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"window={window!r} is not a number of values from 2 on. 128 is usual.")
    empty = torch.full((window,), math.nan, dtype=torch.float64)
    return SpikeBandState(empty, empty.clone(), torch.zeros(window, dtype=torch.bool))


def running_median(state: SpikeBandState) -> float:
    """Return the median of the accepted values, not-a-number while there is none."""
    return _median(_held(state.values))


def spike_limit(state: SpikeBandState, threshold: float, minimum: int) -> float:
    """Return the largest value that is no spike.

    Args:
        state: The band.
        threshold: How many standard deviations above the median the limit is, above 0.
        minimum: Accepted values that are needed to judge.

    Returns:
        The limit in the unit of the values; infinite with fewer than ``minimum`` of them, or if all of them are 0,
        which tells no scale.
    """
    values = _held(state.values)
    if len(values) < max(1, minimum):
        return math.inf
    middle = _median(values)
    spread = max(_NORMAL * _median((values - middle).abs()), _FLOOR * abs(middle))
    return middle + threshold * spread if spread > 0 else math.inf


def update_spike_band(state: SpikeBandState, value: float) -> SpikeBandState:
    """Take an accepted value into the band.

    Raises:
        ValueError: If ``value`` is not finite.
    """
    _check_finite(value)
    return SpikeBandState(_pushed(state.values, value), _pushed(state.seen, value), _pushed(state.rejected, False))


def reject_spike(state: SpikeBandState, value: float, used: float | None = None) -> SpikeBandState:
    """Note a finite value that was above the limit.

    Args:
        state: The band.
        value: The value.
        used: What it was reduced to and used as, which goes into the band; ``None`` if nothing of it was used.

    Returns:
        The band after it; taken from all values seen once more than half of a window of them were rejected.

    Raises:
        ValueError: If ``value`` or ``used`` is not finite.
    """
    _check_finite(value)
    values = state.values
    if used is not None:
        _check_finite(used)
        values = _pushed(values, used)
    seen, rejected = _pushed(state.seen, value), _pushed(state.rejected, True)
    if 2 * int(rejected.sum()) > len(rejected):
        return SpikeBandState(seen.clone(), seen, torch.zeros_like(rejected))
    return SpikeBandState(values, seen, rejected)


def _check_finite(value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is finite."""
    if not math.isfinite(value):
        raise ValueError(f"The value {value!r} is not finite, so it is always a spike and never part of a band.")


def _pushed(ring: Tensor, value: float) -> Tensor:
    """Return the values with a new one at the end and the oldest left out."""
    moved = torch.roll(ring, -1)
    moved[-1] = value
    return moved


def _held(values: Tensor) -> Tensor:
    """Return the values without the places that hold none."""
    return values[~values.isnan()]


def _median(values: Tensor) -> float:
    """Return the median, of an even number of values the mean of the middle two; not-a-number of none."""
    if not len(values):
        return math.nan
    ordered = values.sort().values
    middle = len(ordered) // 2
    return float(ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)
