r"""DiLoCo: many local steps, then one step of SGD with Nesterov momentum on the mean movement.

With :math:`\bar\Delta` the mean over the workers of the movement of a round (start minus end), the anchor :math:`a`
takes

.. math::

    m \leftarrow \mu\, m + \bar\Delta, \qquad a \leftarrow a - \alpha\,(\bar\Delta + \mu\, m)

:math:`a`, :math:`m`, :math:`\bar\Delta` are flat tensors in the units of the weights; :math:`\alpha` (``outer_lr``) and
:math:`\mu` (``outer_momentum``) have no unit. :math:`m` begins at 0. It is ``torch.optim.SGD(nesterov=True)`` with
:math:`\bar\Delta` in the place of the gradient. With :math:`\alpha = 1, \mu = 0` it is local SGD.

DiLoCo: arXiv 2311.08105, which trains with AdamW inside, about 500 local steps a round, :math:`\alpha = 0.7` and
:math:`\mu = 0.9`. The gain of the outer step on a steady movement is :math:`\alpha / (1 - \mu)`, so 7 times the mean
movement at those settings: they suit long runs of many rounds. The strategy's defaults are others, from our short runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DiLoCoState", "init_diloco", "update_diloco"]


class DiLoCoState(NamedTuple):
    """State of the outer step.

    Attributes:
        momentum: The outer momentum, of the shapes of the anchor.
    """

    momentum: list[Tensor]


@torch.no_grad()
def init_diloco(anchor: Sequence[Tensor]) -> DiLoCoState:
    """Start with no momentum.

    Args:
        anchor: The weights shared by all workers, one flat tensor a dtype.
    """
    return DiLoCoState([torch.zeros_like(a) for a in anchor])


@torch.no_grad()
def update_diloco(
    state: DiLoCoState,
    anchor: Sequence[Tensor],
    delta: Sequence[Tensor],
    *,
    outer_lr: float,
    outer_momentum: float,
) -> DiLoCoState:
    r"""Take one outer step, in place.

    Args:
        state: The momentum; changed in place.
        anchor: The weights shared by all workers, one flat tensor a dtype; changed in place.
        delta: The mean movement over the workers, start minus end, of the shapes of ``anchor``; used as scratch.
        outer_lr: :math:`\alpha`.
        outer_momentum: :math:`\mu`, in [0, 1).

    Returns:
        The state after it, on the same tensors.
    """
    ahead = list(delta)
    torch._foreach_mul_(state.momentum, outer_momentum)
    torch._foreach_add_(state.momentum, ahead)
    torch._foreach_add_(ahead, state.momentum, alpha=outer_momentum)
    torch._foreach_sub_(list(anchor), ahead, alpha=outer_lr)
    return state
