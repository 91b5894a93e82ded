r"""CO2: an outer step with the mean movement that was sent a round ago, so that the exchange hides behind local steps.

At the end of round :math:`t` each worker launches the mean of its movement :math:`\Delta^i_t` (start minus end of its
:math:`\tau` local steps) and takes the outer step with :math:`\bar\Delta_{t-1}`, whose exchange had a whole round to
finish:

.. math::

    m \leftarrow \operatorname{clip}\bigl(\beta\, m + \bar\Delta_{t-1} / \Lambda,\; -\varphi,\; \varphi\bigr),
    \qquad a \leftarrow a - \alpha\, m

:math:`a` (the anchor, equal on all workers), :math:`m`, :math:`\bar\Delta` are flat tensors in the units of the
weights, as is :math:`\varphi` (``momentum_clip``, elementwise); :math:`\alpha` (``outer_lr``), :math:`\beta`
(``outer_momentum``) and :math:`\Lambda` (``staleness_penalty``) have no unit. :math:`m` begins at 0, and a round
without a mean takes no outer step. With :math:`\alpha = \Lambda = 1, \beta = 0` and no clip it is delayed plain
averaging.

:math:`\Lambda` is a number, or ``"gap"``, which is **our variant**: with :math:`d` the length of the anchor's last
outer movement over all buffers (0 before the first) and :math:`D` the greatest :math:`d` so far, this one with it,

.. math:: \Lambda = 1 + d / D \in [1, 2], \qquad 0/0 := 0

CO2: arXiv 2401.16265. Unverified: the full text could not be read. The form of the step and the clip are from the
public code, the indices are from memory, and the paper's own formula of the gap penalty is unknown to us.

Differs from the public code (a changed fairscale), on purpose: there the clip has no effect (its result is dropped),
the penalty is always a number that the user gives, and the default path waits for its exchange. Here the mean is of
movements and not of weights: the same step, one copy of the weights less.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["CO2State", "init_co2", "update_co2"]


class CO2State(NamedTuple):
    """State of the outer step.

    Attributes:
        momentum: The outer momentum, of the shapes of the anchor; an empty list without momentum.
        displacement: Length of the last outer movement of the anchor, 0-d, float32. Kept up under ``"gap"`` only.
        largest: The greatest such length so far, 0-d, float32.
    """

    momentum: list[Tensor]
    displacement: Tensor
    largest: Tensor


@torch.no_grad()
def init_co2(anchor: Sequence[Tensor], *, outer_momentum: float) -> CO2State:
    """Start with no momentum and no movement yet.

    Args:
        anchor: The weights shared by all workers, one flat tensor a dtype, all on one device.
        outer_momentum: Without any (0) no buffer is kept for it.
    """
    none_yet = torch.zeros((), dtype=torch.float32, device=anchor[0].device)
    momentum = [torch.zeros_like(a) for a in anchor] if outer_momentum else []
    return CO2State(momentum, none_yet, none_yet.clone())


@torch.no_grad()
def update_co2(
    state: CO2State,
    anchor: Sequence[Tensor],
    delta: Sequence[Tensor],
    *,
    outer_lr: float,
    outer_momentum: float,
    momentum_clip: float | None = None,
    staleness_penalty: float | Literal["gap"] = 1.0,
) -> CO2State:
    r"""Take one outer step, in place and without waiting for the device.

    Args:
        state: From :func:`init_co2` with the same ``outer_momentum``; its momentum is changed in place.
        anchor: The weights shared by all workers, one flat tensor a dtype; changed in place.
        delta: The mean movement over the workers of the round before, of the shapes of ``anchor``; used as scratch.
        outer_lr: :math:`\alpha`.
        outer_momentum: :math:`\beta`, in [0, 1).
        momentum_clip: :math:`\varphi`, the greatest size of any entry of the momentum; ``None`` for no limit.
        staleness_penalty: :math:`\Lambda`, or ``"gap"``.

    Returns:
        The state after it, with the momentum on the same tensors.
    """
    step = list(delta)
    if staleness_penalty == "gap":
        _divide(step, _gap(state))
    elif staleness_penalty != 1.0:
        _divide(step, staleness_penalty)
    if outer_momentum:
        torch._foreach_mul_(state.momentum, outer_momentum)
        torch._foreach_add_(state.momentum, step)
        step = state.momentum
    if momentum_clip is not None:
        torch._foreach_clamp_min_(step, -momentum_clip)
        torch._foreach_clamp_max_(step, momentum_clip)
    torch._foreach_sub_(list(anchor), step, alpha=outer_lr)
    if staleness_penalty != "gap":
        return state
    displacement = outer_lr * _length(step, state.largest)
    return CO2State(state.momentum, displacement, torch.maximum(state.largest, displacement))


def _gap(state: CO2State) -> Tensor:
    """Return 1 + d/D, 0-d; the maximum is 0 only where d is 0 too."""
    return 1.0 + state.displacement / state.largest.clamp_min(torch.finfo(torch.float32).tiny)


def _divide(tensors: list[Tensor], divisor: float | Tensor) -> None:
    # One by one, as a 0-d tensor on the device divides without its value being read by the host.
    for tensor in tensors:
        tensor.div_(divisor)


def _length(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Return the Euclidean length over all tensors, 0-d, of the precision of ``like``."""
    lengths = [torch.linalg.vector_norm(tensor).to(like) for tensor in tensors]
    length: Tensor = torch.linalg.vector_norm(torch.stack(lengths))
    return length
