r"""Weight average with the stability-plasticity balanced coefficient of Large Continual Instruction Assistant.

The shadow :math:`\theta^*` follows the weights :math:`\theta` with one coefficient for each tensor and step,

.. math::

    \theta^*_t = \beta_t\,\theta^*_{t-1} + (1 - \beta_t)\,\theta_t

chosen so that the second-order change of the loss from averaging and the move of the average are balanced:
:math:`\beta_t = (L' + 1) / \bigl((\theta_t - \theta^*_{t-1})\,L''\bigr)` (arXiv 2410.10868). With the curvature by a
difference quotient and one number a tensor by :math:`L_1` norms (:math:`g_t` the gradient that led to
:math:`\theta_t`), two forms are in use:

* ``derived``: :math:`\beta_t = \dfrac{(1 + \|g_t\|_1)\,\|\theta_t - \theta_{t-1}\|_1}
  {\|\theta_t - \theta^*_{t-1}\|_1\,\|g_t - g_{t-1}\|_1}`, our reading of the equation; the paper's own layout of it
  was not seen (unverified).
* ``released``: the authors' code, which leaves out :math:`\|\theta_t - \theta_{t-1}\|_1`, has a factor 2, and uses the
  number as the weight of the *new* weights: :math:`\beta_t = 1 - 2\,(1 + \|g_t\|_1) /
  (\|\theta_t - \theta^*_{t-1}\|_1\,\|g_t - g_{t-1}\|_1)`.

Outside (0, 1), not finite, or without two gradients to compare, :math:`\beta_t` is the fallback, 0.99 in both. The 1
in the numerator has the unit of a gradient norm, so neither form is invariant to scaling the loss. The released code
starts its shadow after the first step; here it starts before it and the first update uses the fallback.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional.ema import init_ema

__all__ = ["FORMS", "BalancedEMAState", "balance_coefficients", "init_balanced_ema", "update_balanced_ema"]

FORMS = ("derived", "released")


class BalancedEMAState(NamedTuple):
    """State of the average.

    Attributes:
        shadow: The averaged tensors, in the order and the shapes of the weights.
        gradients: The gradients of the step before, in the same order; ``None`` before the first step.
        updates: Averages taken so far.
    """

    shadow: list[Tensor]
    gradients: list[Tensor] | None
    updates: int


def init_balanced_ema(
    tensors: Sequence[Tensor], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> BalancedEMAState:
    """Start an average at the present values (arguments as in :func:`lightning_stable.functional.ema.init_ema`)."""
    return BalancedEMAState(init_ema(tensors, device, dtype).shadow, None, 0)


@torch.no_grad()
def balance_coefficients(
    shadow: Sequence[Tensor],
    weights: Sequence[Tensor],
    previous_weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    previous_gradients: Sequence[Tensor] | None,
    form: str = "derived",
    fallback: float = 0.99,
) -> Tensor:
    """Return the weight of the old shadow, one number a tensor.

    Args:
        shadow: The average before the update; ``n`` tensors.
        weights: The weights after the optimizer step.
        previous_weights: The weights before it.
        gradients: The gradients it used, ``None`` where a tensor had none.
        previous_gradients: The gradients of the step before, ``None`` at the first.
        form: ``"derived"`` or ``"released"``.
        fallback: Value where the formula gives none in (0, 1).

    Returns:
        Float32 tensor of shape (n,), on the shadow's device.

    Raises:
        ValueError: If ``form`` is unknown.
    """
    if form not in FORMS:
        raise ValueError(
            f"form={form!r} is unknown. Choose 'derived' (the equation) or 'released' (the authors' code)."
        )
    device = shadow[0].device
    filled = torch.full((len(shadow),), fallback, dtype=torch.float32, device=device)
    if previous_gradients is None:
        return filled
    # Any number will do where there is no gradient: the fallback is taken there.
    present = [old if new is None else new for new, old in zip(gradients, previous_gradients, strict=True)]
    change = _distance(present, previous_gradients)
    numerator = 1.0 + _norms(present)
    denominator = _distance(_like(weights, shadow), shadow).to(change.device) * change
    if form == "derived":
        quotient = numerator * _distance(weights, previous_weights).to(change.device) / denominator
        coefficients = quotient
    else:
        quotient = 2.0 * numerator / denominator
        coefficients = 1.0 - quotient
    had_gradient = torch.tensor([new is not None for new in gradients], device=change.device)
    usable = torch.isfinite(quotient) & (quotient > 0) & (quotient < 1) & had_gradient
    return torch.where(usable.to(device), coefficients.to(device, torch.float32), filled)


@torch.no_grad()
def update_balanced_ema(
    state: BalancedEMAState,
    weights: Sequence[Tensor],
    previous_weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    form: str = "derived",
    fallback: float = 0.99,
) -> tuple[BalancedEMAState, Tensor]:
    """Take one average, in place.

    Args:
        state: The average.
        weights: The weights after the optimizer step.
        previous_weights: The weights before it.
        gradients: The gradients it used, ``None`` where a tensor had none.
        form: As in :func:`balance_coefficients`.
        fallback: As in :func:`balance_coefficients`.

    Returns:
        The state after it, on the same tensors, and the coefficients, of shape (n,).

    Raises:
        ValueError: If ``form`` is unknown.
    """
    shadow = state.shadow
    coefficients = balance_coefficients(
        shadow, weights, previous_weights, gradients, state.gradients, form=form, fallback=fallback
    )
    step = torch._foreach_sub(_like(weights, shadow), shadow)
    shares = (1.0 - coefficients).unbind()
    torch._foreach_mul_(step, [share.to(part.dtype) for share, part in zip(shares, step, strict=True)])
    torch._foreach_add_(shadow, step)
    return BalancedEMAState(shadow, _kept(state.gradients, weights, gradients), state.updates + 1), coefficients


def _kept(old: Sequence[Tensor] | None, weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradients to compare with at the next step, not-a-number where there was none: the fallback."""
    kept = [torch.empty_like(weight) for weight in weights] if old is None else list(old)
    pairs = list(zip(kept, gradients, strict=True))
    present = [(mine, new) for mine, new in pairs if new is not None]
    if present:
        torch._foreach_copy_([mine for mine, _ in present], [new for _, new in present])
    for mine, new in pairs:
        if new is None:
            mine.fill_(torch.nan)
    return kept


def _like(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors`` in the precision and on the device of ``others``, copied only where they differ."""
    return [t.detach().to(device=o.device, dtype=o.dtype) for t, o in zip(tensors, others, strict=True)]


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L1 norm of each tensor, summed in float32 or wider, as one tensor of shape (n,)."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(list(tensors), 1, dtype=wide))


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the L1 norm of each difference, taken in float32 or wider, as one tensor of shape (n,)."""
    return _norms(torch._foreach_sub(_at_least_float32(left), _at_least_float32(right)))


def _at_least_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Widen half precisions, whose rounding a difference of near numbers would consist of."""
    return [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors]
