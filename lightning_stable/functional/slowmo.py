r"""SlowMo: local SGD with a slow momentum across rounds.

With :math:`\bar\Delta` the mean over the workers of the movement of a round (start minus end) and :math:`\gamma` the
learning rate of the local steps, the anchor :math:`a` takes

.. math::

    m \leftarrow \beta\, m + \bar\Delta / \gamma, \qquad a \leftarrow a - \alpha\gamma\, m

:math:`a`, :math:`m`, :math:`\bar\Delta` are flat tensors; :math:`a` and :math:`\bar\Delta` are in the units of the
weights, :math:`m` in those of a gradient (times steps). :math:`\beta` (``outer_momentum``) and :math:`\alpha`
(``outer_lr``) have no unit. :math:`m` begins at 0. With :math:`\alpha = 1, \beta = 0` it is local SGD up to rounding.

SlowMo: arXiv 1910.00643. Dividing by :math:`\gamma` and multiplying by the present one keeps the momentum's meaning
while the learning rate falls. The paper has one :math:`\gamma` a round; where a schedule changes it within the round,
we take that of the round's last local step. A round whose last step had :math:`\gamma = 0` adds nothing:
:math:`\bar\Delta / \gamma` counts as 0. Beware of a learning rate that falls close to zero and is raised again: the
small :math:`\gamma` leaves a large momentum, which the next, larger one multiplies.

Differs from the released implementations: fairscale averages every third step by default and takes the slow step
every 48; torchdistx keeps the momentum on CUDA only and leaves the anchor out of what it saves. Here both are plain
tensors in the caller's hands.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SlowMoState", "init_slowmo", "update_slowmo"]


class SlowMoState(NamedTuple):
    """State of the outer step.

    Attributes:
        momentum: The slow momentum, of the shapes of the anchor.
    """

    momentum: list[Tensor]


@torch.no_grad()
def init_slowmo(anchor: Sequence[Tensor]) -> SlowMoState:
    """Start with no momentum.

    Args:
        anchor: The weights shared by all workers, one flat tensor a dtype.
    """
    return SlowMoState([torch.zeros_like(a) for a in anchor])


@torch.no_grad()
def update_slowmo(
    state: SlowMoState,
    anchor: Sequence[Tensor],
    delta: Sequence[Tensor],
    *,
    learning_rate: float,
    outer_lr: float,
    outer_momentum: float,
) -> SlowMoState:
    r"""Take one outer step, in place.

    Args:
        state: The momentum; changed in place.
        anchor: The weights shared by all workers, one flat tensor a dtype; changed in place.
        delta: The mean movement over the workers, start minus end, of the shapes of ``anchor``.
        learning_rate: :math:`\gamma`, of the local steps, from 0 on.
        outer_lr: :math:`\alpha`.
        outer_momentum: :math:`\beta`, in [0, 1).

    Returns:
        The state after it, on the same tensors.
    """
    torch._foreach_mul_(state.momentum, outer_momentum)
    if learning_rate:
        torch._foreach_add_(state.momentum, list(delta), alpha=1.0 / learning_rate)
    torch._foreach_sub_(list(anchor), state.momentum, alpha=outer_lr * learning_rate)
    return state
