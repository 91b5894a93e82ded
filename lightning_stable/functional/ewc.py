r"""EWC: how much each weight meant to the tasks so far, by the Fisher information.

When task :math:`k` ends at the weights :math:`\theta`, with the diagonal of its Fisher information

.. math:: F_{k,i} = \frac{1}{N}\sum_n \Bigl(\frac{\partial}{\partial\theta_i} \log p(y_n \mid x_n)\Bigr)^2

over :math:`N` of its samples, the state becomes

.. math:: F \leftarrow \gamma F + F_k, \qquad \theta^* \leftarrow \theta

and while the next tasks are learned the loss has the penalty :math:`\lambda \sum_i F_i (\theta_i - \theta^*_i)^2` of
:mod:`lightning_stable.functional.l2_anchor`. :math:`F` has the shapes of :math:`\theta` and the unit of a squared
gradient in nats; :math:`\gamma` (``decay``) has none.

The penalty is elastic weight consolidation's (arXiv 1612.00796), which has :math:`\lambda/2` in place of
:math:`\lambda`, and one :math:`F` and one anchor for each task. One sum and the newest anchor make it online EWC (arXiv
1805.06370). Its penalty multiplies :math:`F` by :math:`\gamma` once more, as the code of GMvandeVen/continual-learning
does (read); at :math:`\gamma = 1` there is no difference. That the paper itself does so, and how it chose
:math:`\gamma`, is from memory. The true label stands in for one drawn from the model, which makes this the empirical
Fisher; arXiv 2502.11756 compares it with exact ones, which it recommends.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EWCState", "check_fisher_decay", "init_ewc", "update_ewc"]


class EWCState(NamedTuple):
    """What is known of the tasks so far.

    Attributes:
        anchor: The weights that the last task ended with, by name.
        fisher: The importance of each entry, by the same names.
    """

    anchor: dict[str, Tensor]
    fisher: dict[str, Tensor]


def check_fisher_decay(decay: float) -> None:
    """Raise ``ValueError`` unless ``decay`` is a number in [0, 1]."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay <= 1 or math.isnan(decay):
        raise ValueError(
            f"decay={decay!r} is not in [0, 1]: it is the share of the earlier tasks' Fisher information that is kept "
            "when a task ends. 1 remembers all tasks alike, 0 only the last one."
        )


def init_ewc() -> EWCState:
    """Return the state before any task has ended."""
    return EWCState({}, {})


@torch.no_grad()
def update_ewc(
    state: EWCState, weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], decay: float = 1.0
) -> EWCState:
    """Take in a task that has ended.

    Args:
        state: What is known of the tasks before; it is left as it is.
        weights: The weights that the task ended with, by name.
        fisher: The diagonal of the task's Fisher information, by the same names and of the same shapes.
        decay: The share of the old sum that is kept, in [0, 1].

    Returns:
        The state with copies of the weights. What was known of a tensor that is gone or has another shape is dropped.

    Raises:
        ValueError: If the names or shapes differ, or ``decay`` is out of range.
    """
    check_fisher_decay(decay)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in fisher.items()}:
        raise ValueError(
            f"The Fisher information of {sorted(fisher)} does not belong to the weights {sorted(weights)}. Give one "
            "tensor of the same shape for each."
        )
    merged = {}
    for name, value in fisher.items():
        before = state.fisher.get(name)
        known = before is not None and before.shape == value.shape
        merged[name] = value.clone() if before is None or not known else value + decay * before.to(value)
    return EWCState({name: weight.detach().clone() for name, weight in weights.items()}, merged)
