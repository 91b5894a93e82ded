r"""LwF: a model that learns a new task goes on saying of its samples what it said before (learning without forgetting).

With logits :math:`\tilde z` of the weights that the last task ended with, logits :math:`z` of the present ones, a
temperature :math:`T` and a set :math:`C` of the classes of past tasks, for each sample

.. math:: T^2\, \mathrm{KL}\bigl(\mathrm{softmax}(\tilde z_C / T) \,\|\, \mathrm{softmax}(z_C / T)\bigr)

in nats. Where tasks are told apart at evaluation, each past task has a set of its own, and the sum over them is taken.
:math:`T^2` keeps the size of the gradient as :math:`T` changes (arXiv 1503.02531, from memory).

Differs from the paper (arXiv 1606.09282), which has the cross-entropy in place of the divergence; the gradient is the
same. :math:`T = 2` and a weight of 1 are the defaults of public implementations (read); that they are the paper's, and
that the paper has no factor :math:`T^2`, is from memory. The paper's outputs are recorded once, before training; here
they are computed again for each batch, so that augmentation works. Its warm-up of new outputs with all else frozen is
left to the user.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stable.functional.trajectory_loss import trajectory_loss

__all__ = ["distillation_loss"]


def distillation_loss(
    past_logits: Tensor, logits: Tensor, temperature: float, groups: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Return the distillation loss of each sample, without its weight.

    Args:
        past_logits: Shape (N, ..., past classes).
        logits: Those of the present, of shape (N, ..., classes), with at least as many classes; those beyond the past
            ones are new and left out.
        temperature: Divides the logits.
        groups: Sets of class indices that compete with each other; ``None`` for one set of all past classes.

    Returns:
        Shape (N,): the sum over groups, in nats times the square of the temperature.

    Raises:
        ValueError: If the shapes do not fit, or a class is beyond the past ones.
    """
    past_classes = past_logits.shape[-1]
    if past_logits.shape[:-1] != logits.shape[:-1] or past_classes > logits.shape[-1]:
        raise ValueError(
            f"Logits of shape {tuple(past_logits.shape)} of the past cannot be compared with {tuple(logits.shape)} of "
            "the present: samples and positions have to be the same, and classes may only be added."
        )
    if groups is None:
        return trajectory_loss(past_logits, logits[..., :past_classes], temperature)
    wrong = sorted({index for group in groups for index in group if not 0 <= index < past_classes})
    if wrong:
        raise ValueError(f"Classes {wrong} are not among the {past_classes} outputs that the past logits have.")
    losses = []
    for group in groups:
        chosen = torch.tensor(list(group), dtype=torch.long, device=logits.device)
        pair = (past_logits.index_select(-1, chosen), logits.index_select(-1, chosen))
        losses.append(trajectory_loss(*pair, temperature))
    return torch.stack(losses).sum(0)
