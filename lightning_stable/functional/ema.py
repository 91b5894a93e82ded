r"""Exponential moving average (EMA) of weights.

After each update of the weights :math:`\theta_t`, with :math:`k` averages taken before,

.. math::

    \bar\theta \leftarrow \beta_k \bar\theta + (1 - \beta_k)\,\theta_t, \qquad
    \beta_k = \min\bigl(\beta,\; 1 - (1 + k)^{-2/3}\bigr) \text{ with power warmup, else } \beta

:math:`\bar\theta` is the shadow, of the shapes of :math:`\theta`; :math:`\beta` (``decay``) has no unit. As an
average kept beside training to close the stability gap: arXiv 2306.16817. The power warmup is the one of timm's and
ema-pytorch's averages with their default exponents. The first average of a power warmup (:math:`k = 0`) has
:math:`\beta_0 = 0`: the shadow becomes the weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WARMUPS", "EMAState", "check_decay", "ema_decay", "init_ema", "lerp_shadow", "update_ema"]

WARMUPS = (None, "power")


class EMAState(NamedTuple):
    """State of the average.

    Attributes:
        shadow: The averaged tensors, in the order and the shapes of the weights.
        updates: Averages taken so far.
    """

    shadow: list[Tensor]
    updates: int


def check_decay(name: str, decay: float) -> None:
    """Raise ``ValueError`` unless ``decay`` is a number in [0, 1)."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
        raise ValueError(
            f"{name}={decay!r} is not in [0, 1): it is the share of the old average that is kept. "
            "Usual values are 0.9 for hundreds of steps, 0.999 for tens of thousands."
        )


def ema_decay(decay: float, updates: int, warmup: str | None = None) -> float:
    """Return the decay of the next average.

    Args:
        decay: The decay aimed at, in [0, 1).
        updates: Averages taken so far.
        warmup: ``"power"`` to begin low and rise with the number of averages, ``None`` for a constant decay.

    Raises:
        ValueError: If ``warmup`` is unknown.
    """
    if warmup not in WARMUPS:
        raise ValueError(f"warmup={warmup!r} is unknown. Choose None (constant decay) or 'power'.")
    return decay if warmup is None else min(decay, 1.0 - (1.0 + updates) ** (-2.0 / 3.0))


@torch.no_grad()
def init_ema(
    tensors: Sequence[Tensor], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> EMAState:
    """Start an average at the present values.

    Args:
        tensors: Floating-point weights, of any shapes.
        device: Where the shadow lives; ``None`` for each tensor's own device.
        dtype: Its precision; ``None`` for each tensor's own.
    """
    return EMAState([t.detach().to(device=device, dtype=dtype, copy=True) for t in tensors], 0)


def update_ema(state: EMAState, tensors: Sequence[Tensor], decay: float, warmup: str | None = None) -> EMAState:
    """Take one average, in place.

    Args:
        state: The average; its shadow may be of another precision and on another device than the weights.
        tensors: The present weights, in the order of the shadow.
        decay: The decay aimed at, in [0, 1).
        warmup: As in :func:`ema_decay`.

    Returns:
        The state after it, on the same tensors.

    Raises:
        ValueError: If ``warmup`` is unknown.
    """
    lerp_shadow(state.shadow, tensors, 1.0 - ema_decay(decay, state.updates, warmup))
    return EMAState(state.shadow, state.updates + 1)


@torch.no_grad()
def lerp_shadow(shadow: Sequence[Tensor], tensors: Sequence[Tensor], weight: float) -> None:
    """Move ``shadow`` towards ``tensors`` by the share ``weight``, in the shadow's precision, in place."""
    if not shadow:
        return
    alike = [s.dtype == t.dtype and s.device == t.device for s, t in zip(shadow, tensors, strict=True)]
    if all(alike):
        torch._foreach_lerp_(list(shadow), list(tensors), weight)
        return
    for mine, theirs, same in zip(shadow, tensors, alike, strict=True):
        # Converted one at a time, so that no second copy of all the weights is alive.
        mine.lerp_(theirs if same else theirs.to(device=mine.device, dtype=mine.dtype, non_blocking=False), weight)
