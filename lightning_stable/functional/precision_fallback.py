r"""When to leave low precision for a while and when to go back: a decision with hysteresis on signals of training.

Each signal, such as the loss, has an upper limit :math:`u` above which a fallback to high precision begins, and a lower
one :math:`l < u` that it has to be below for the way back. By its own history, with :math:`m` the median and :math:`s`
the robust spread of the last values, both in the signal's unit (:mod:`lightning_stable.functional.spike_guard`),

.. math:: u = m + z_u s, \qquad l = m + z_l s, \qquad 0 < z_l \le z_u

or, where a limit :math:`L` is given, :math:`u = L` and :math:`l = L z_l / z_u`. What is not finite is above both. With
:math:`n` steps of high precision and a cooldown of :math:`k` steps:

- In low precision, once the cooldown is over, a value above its upper limit leads to high precision.
- In high precision, from the :math:`n`-th step on, training goes back as soon as the latest value of every signal is at
  most its lower limit. The cooldown begins.

Values up to :math:`u` enter the history, in either precision; those above it count as rejected, and are the new level
once more than half of a window of them were. So a level that stays is accepted in the end; one above :math:`L` or not
finite never is.

That changing the precision in the middle of a run averts or delays divergence is reported for block formats, on a small
proxy model (arXiv 2506.20752); high-precision first steps and sharpness as a warning are suggestions of To FP8 and Back
Again (arXiv 2405.18710). The rule, its two limits and its cooldown are ours.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional.numerics_monitor import saturated
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.spike_guard import (
    SpikeBandState,
    init_spike_band,
    reject_spike,
    spike_limit,
    update_spike_band,
)

__all__ = [
    "START",
    "FallbackRule",
    "FallbackState",
    "init_fallback",
    "saturated_share",
    "signal_limits",
    "update_fallback",
]

START = "start"
"""The reason of high precision at the start of a run."""


class FallbackRule(NamedTuple):
    """The constants of the decision.

    Attributes:
        threshold: :math:`z_u`, in robust standard deviations.
        lower_threshold: :math:`z_l`.
        steps: :math:`n`, optimizer steps that high precision lasts at least.
        cooldown: :math:`k`, optimizer steps of low precision before the next fallback.
        window: Values in a signal's history.
        minimum: Values that it takes before a finite one is judged by them.
        limits: :math:`L` of signals that are not judged by their history, by name.
    """

    threshold: float = 6.0
    lower_threshold: float = 3.0
    steps: int = 100
    cooldown: int = 100
    window: int = 128
    minimum: int = 32
    limits: Mapping[str, float] = {}


class FallbackState(NamedTuple):
    """What is known, on the CPU.

    Attributes:
        bands: The history of each signal.
        raised: Whether the latest value of each signal is above its lower limit.
        reason: The signal that led to high precision, or :data:`START`; empty in low precision.
        remaining: Steps that high precision lasts at least from here.
        cooldown: Steps of low precision before the next fallback from here.
    """

    bands: dict[str, SpikeBandState]
    raised: dict[str, bool]
    reason: str
    remaining: int
    cooldown: int

    @property
    def is_high(self) -> bool:
        """Whether training is in high precision."""
        return self.reason != ""


def init_fallback(first_steps: int = 0) -> FallbackState:
    """Return the state at the start of a run, in high precision for ``first_steps`` optimizer steps."""
    return FallbackState({}, {}, START if first_steps > 0 else "", first_steps, 0)


def signal_limits(state: FallbackState, name: str, rule: FallbackRule) -> tuple[float, float]:
    """Return the upper and the lower limit of a signal, in its unit; infinite while its history is too short."""
    if name in rule.limits:
        upper = rule.limits[name]
        return upper, upper * rule.lower_threshold / rule.threshold
    band = state.bands.get(name)
    if band is None:
        return math.inf, math.inf
    return spike_limit(band, rule.threshold, rule.minimum), spike_limit(band, rule.lower_threshold, rule.minimum)


def update_fallback(
    state: FallbackState, values: Mapping[str, float], rule: FallbackRule, passed: int = 1
) -> FallbackState:
    """Take new values of some signals into account, and decide.

    Args:
        state: The state before, which is left as it is.
        values: What was measured, by name of the signal; not those that were not.
        rule: The constants.
        passed: Optimizer steps since the last decision.

    Returns:
        The state after it. It was decided to switch if ``is_high`` has changed.
    """
    bands, raised, above = dict(state.bands), dict(state.raised), []
    for name, value in values.items():
        upper, lower = signal_limits(state, name, rule)
        finite = math.isfinite(value)
        if not (finite and value <= upper):
            above.append(name)
        raised[name] = not (finite and value <= lower)
        if finite and name not in rule.limits:
            band = bands.get(name) or init_spike_band(rule.window)
            bands[name] = update_spike_band(band, value) if value <= upper else reject_spike(band, value)
    remaining, cooldown = max(0, state.remaining - passed), max(0, state.cooldown - passed)
    if state.is_high:
        if remaining == 0 and not any(raised.values()):
            return FallbackState(bands, raised, "", 0, rule.cooldown)
    elif above and cooldown == 0:
        return FallbackState(bands, raised, above[0], rule.steps, 0)
    return FallbackState(bands, raised, state.reason, remaining, cooldown)


def saturated_share(exact: Tensor, quantized: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the share of the finite entries that saturated, a float32 scalar in [0, 1] on the operands' device.

    What saturates is defined in :func:`~lightning_stable.functional.numerics_monitor.saturated`. The share is 0 where
    no entry is finite.

    Args:
        exact: An operand, of any shape. For scales of blocks the matrix whose rows they run over.
        quantized: What it became, of that shape.
        quantizer: How.
    """
    if exact.numel() == 0:
        return torch.zeros((), device=exact.device)
    finite = exact.isfinite()
    lost = saturated(exact, quantized, quantizer) & finite
    return lost.sum(dtype=torch.float32) / finite.sum(dtype=torch.float32).clamp(min=1)
