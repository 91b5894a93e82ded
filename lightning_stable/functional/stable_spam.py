r"""Stable-SPAM's treatment of gradients: adaptive clipping of spiked entries and adaptive gradient normalisation.

For each tensor on its own, with the gradient :math:`g` and running averages that begin at 0,

.. math::

    a &= \max_i |g_i|, \qquad T \leftarrow \gamma_3 T + (1 - \gamma_3)\, a, \qquad
    \hat T = T / (1 - \gamma_3^k), \qquad g_i \leftarrow g_i\, \hat T / a \ \text{ where } |g_i| > \hat T \\
    n &= \|g\|_2, \qquad \mu \leftarrow \gamma_1 \mu + (1 - \gamma_1)\, n, \qquad
    \nu \leftarrow \gamma_2 \nu + (1 - \gamma_2)\, n^2, \qquad
    g \leftarrow \frac{g}{n}\, \frac{\hat\mu}{\sqrt{\hat\nu} + \epsilon}

(AdaClip, then AdaGN; arXiv 2502.17055). The hats correct the bias of the start, with :math:`k` the number of updates
of that average, this one included. :math:`T, \mu` have the unit of the gradient, :math:`\nu` its square;
:math:`\gamma_1, \gamma_2, \gamma_3` have none. After AdaGN the norm of every tensor is near 1, whatever it was, which
optimizers that divide by the size of the gradient do not notice. Others take ``norm="history"``, which is ours:
:math:`g \leftarrow (g / n)\,\hat\mu`, so that a gradient keeps its usual size and only its outliers go.

Differs from the released code: each average counts its own updates, where that code shares one counter with Adam's
moments and so inflates :math:`\hat T` after each reset of them. A tensor whose gradient is zero, or whose norm is not
finite, is left as it is and moves no statistic.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

__all__ = ["NORMS", "StableSPAMInfo", "StableSPAMState", "check_gamma", "init_stable_spam", "update_stable_spam"]

NORMS = ("unit", "history", None)


class StableSPAMState(NamedTuple):
    """Statistics of ``n`` tensors, all of shape (n,).

    Attributes:
        maximum: Running average of the largest absolute entry, float32.
        norm: Running average of the L2 norm, float32.
        square: Running average of the squared L2 norm, float32.
        clips: Updates of ``maximum``, int64.
        norms: Updates of ``norm`` and ``square``, int64.
    """

    maximum: Tensor
    norm: Tensor
    square: Tensor
    clips: Tensor
    norms: Tensor


class StableSPAMInfo(NamedTuple):
    r"""What one update did to ``n`` tensors, all float32 of shape (n,).

    Attributes:
        thresholds: :math:`\hat T`, infinite where no entry could be clipped.
        clipped: Share of entries that were clipped, in [0, 1].
        norms: L2 norm before the update.
    """

    thresholds: Tensor
    clipped: Tensor
    norms: Tensor


def check_gamma(name: str, gamma: float) -> None:
    """Raise ``ValueError`` unless ``gamma`` is a number in [0, 1)."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma < 1:
        raise ValueError(f"{name}={gamma!r} is not in [0, 1): it is the share of a running average that is kept.")


def init_stable_spam(count: int, device: torch.device | str | None = None) -> StableSPAMState:
    """Return the statistics of ``count`` tensors that no gradient was seen of, on ``device``."""
    averages = [torch.zeros(count, dtype=torch.float32, device=device) for _ in range(3)]
    counts = [torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2)]
    return StableSPAMState(*averages, *counts)


@torch.no_grad()
def update_stable_spam(
    gradients: Sequence[Tensor],
    state: StableSPAMState,
    *,
    gamma1: float = 0.7,
    gamma2: float = 0.9,
    gamma3: float = 0.999,
    clip: bool = True,
    norm: str | None = "unit",
    eps: float = 1e-8,
) -> tuple[StableSPAMState, StableSPAMInfo]:
    r"""Clip and normalise gradients, in place.

    Nothing is read back from an accelerator. Gradients on the CPU take a path with fewer passes over memory.

    Args:
        gradients: Dense real tensors of any shapes and floating-point precisions, in the order of the state.
        state: The statistics; left as they are.
        gamma1: :math:`\gamma_1` of the average norm, in [0, 1).
        gamma2: :math:`\gamma_2` of the average squared norm, in [0, 1).
        gamma3: :math:`\gamma_3` of the average largest entry, in [0, 1).
        clip: Whether entries above the threshold are scaled down.
        norm: ``"unit"``, ``"history"`` or ``None`` for no normalisation.
        eps: :math:`\epsilon`, in units of the gradient's norm.

    Returns:
        The statistics after the update, and what it did.

    Raises:
        ValueError: If ``norm`` is unknown, or the state is of another number of tensors.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown. Choose 'unit', 'history' or None (no normalisation).")
    if len(gradients) != len(state.maximum):
        raise ValueError(
            f"{len(gradients)} gradients were given with the statistics of {len(state.maximum)} tensors. "
            "Use init_stable_spam with the number of gradients."
        )
    if not gradients:
        return state, StableSPAMInfo(state.maximum, state.maximum, state.maximum)
    device = state.maximum.device
    before = _norms(gradients, device)
    # Zero, infinite and not-a-number norms: left to whoever looks at the gradients next, such as a gradient scaler.
    active = torch.isfinite(before) & (before > 0)
    maximum, clips, after = state.maximum, state.clips, before
    thresholds = torch.full_like(before, math.inf)
    clipped = torch.zeros_like(before)
    if clip:
        largest = _largest(gradients, device)
        clips = clips + active
        maximum = torch.where(active, gamma3 * maximum + (1.0 - gamma3) * largest, maximum)
        thresholds = torch.where(clips > 0, maximum / _correction(gamma3, clips), math.inf)
        limits = torch.where(active, thresholds, math.inf)
        clipped = _clip(gradients, limits, torch.where(active, limits / largest, 1.0))
        after = _norms(gradients, device)
    state = state._replace(maximum=maximum, clips=clips)
    if norm is not None:
        active = active & (after > 0)
        state = _average_norms(state, after, active, gamma1, gamma2)
        factors = state.norm / _correction(gamma1, state.norms) / after
        if norm == "unit":
            factors = factors / ((state.square / _correction(gamma2, state.norms)).sqrt() + eps)
        _scale(gradients, torch.where(active, factors, 1.0))
    return state, StableSPAMInfo(thresholds, clipped, before)


def _average_norms(
    state: StableSPAMState, norms: Tensor, active: Tensor, gamma1: float, gamma2: float
) -> StableSPAMState:
    """Take the norms of the active tensors into their averages."""
    return state._replace(
        norm=torch.where(active, gamma1 * state.norm + (1.0 - gamma1) * norms, state.norm),
        square=torch.where(active, gamma2 * state.square + (1.0 - gamma2) * norms.square(), state.square),
        norms=state.norms + active,
    )


def _correction(gamma: float, updates: Tensor) -> Tensor:
    """Return 1 - gamma^updates in float32, which some devices have only, without its cancellation for gamma near 1."""
    return -torch.expm1(updates.float() * (math.log(gamma) if gamma > 0 else -math.inf))


def _norms(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the L2 norm of each tensor, of shape (n,)."""
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    return _gathered(torch._foreach_norm(list(gradients), 2, dtype=wide), device)


def _largest(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the largest absolute entry of each tensor, of shape (n,)."""
    filled = [gradient if gradient.numel() else gradient.new_zeros(1) for gradient in gradients]
    if not _on_host(filled):
        return _gathered(torch._foreach_norm(filled, math.inf), device)
    # One fast pass, where the norm's is slow on a CPU.
    ends = [gradient.aminmax() for gradient in filled]
    return _gathered([torch.maximum(low.abs(), high.abs()) for low, high in ends], device)


def _clip(gradients: Sequence[Tensor], limits: Tensor, ratios: Tensor) -> Tensor:
    """Scale the entries above the limits by the ratios, in place, and return their share in each tensor."""
    if _on_host(gradients):
        pairs = zip(gradients, limits.tolist(), ratios.tolist(), strict=True)
        # Below 1 exactly where some entry is above its limit.
        shares = [_clip_on_host(gradient, limit, ratio) if ratio < 1 else 0.0 for gradient, limit, ratio in pairs]
        return torch.tensor(shares, dtype=torch.float32, device=limits.device)
    counted = []
    for gradient, limit, ratio in zip(gradients, limits.unbind(), ratios.unbind(), strict=True):
        wide = _wide(gradient)
        over = wide.abs() > limit.to(wide.device)
        gradient.copy_(torch.where(over, wide * ratio.to(wide.device), wide))
        counted.append(over.float().sum() / max(1, over.numel()))
    return _gathered(counted, limits.device)


def _clip_on_host(gradient: Tensor, limit: float, ratio: float) -> float:
    """Scale the entries above the limit by the ratio, in place, and return their share."""
    wide = _wide(gradient)
    over = hardshrink(wide, limit)  # these entries, and zeros
    # Taken out and put back smaller: adding the difference would cancel where a spike is large.
    wide.sub_(over).add_(over, alpha=ratio)
    if wide is not gradient:
        gradient.copy_(wide)
    return int(torch.count_nonzero(over)) / over.numel()


def _scale(gradients: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its factor, in place."""
    numbers: list[Any]
    if _on_host(gradients):
        numbers = factors.tolist()
    else:
        numbers = [factor.to(gradient.device) for gradient, factor in zip(gradients, factors.unbind(), strict=True)]
    pairs = list(zip(gradients, numbers, strict=True))
    wide = [(gradient, number) for gradient, number in pairs if gradient.dtype.itemsize >= 4]
    if wide:
        torch._foreach_mul_([gradient for gradient, _ in wide], [number for _, number in wide])
    for gradient, number in pairs:
        if gradient.dtype.itemsize < 4:
            # The factor itself would be rounded to half precision.
            gradient.copy_(gradient.float() * number)


def _on_host(gradients: Sequence[Tensor]) -> bool:
    """Tell whether reading a number of the gradients is free, so that only tensors with work to do are touched."""
    return all(gradient.device.type == "cpu" for gradient in gradients)


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in a precision that a threshold can be told in: a half one's copy, else itself."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _gathered(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return 0-dimensional tensors as one float32 tensor of shape (n,)."""
    return torch.stack([value.to(device=device, dtype=torch.float32) for value in values])
