r"""L2 anchor: a pull on the weights towards where an earlier task left them.

With weights :math:`\theta`, anchors :math:`\theta^*` of the same shapes, a weight :math:`\lambda` and, where given, an
importance :math:`F \ge 0` of each entry (all ones otherwise), the loss gets

.. math:: \lambda \sum_i F_i\,(\theta_i - \theta^*_i)^2

and the gradient :math:`2\lambda F_i\,(\theta_i - \theta^*_i)`.
:math:`\lambda` has the unit of the loss over that of a squared weight; with :math:`F` the Fisher information it has
none. Without an importance: L2 regularisation of continual learning, as compared in arXiv 2203.17269 (the values of
:math:`\lambda` used there were not verified). With the Fisher information: :mod:`lightning_stable.functional.ewc`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_anchor_gradient", "anchor_penalty"]


@torch.no_grad()
def add_anchor_gradient(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    lam: float,
    importance: Sequence[Tensor] | None = None,
) -> None:
    """Add the gradient of the penalty to each gradient, in place and in fused passes.

    Args:
        gradients: Dense real tensors of any shapes.
        weights: The weights, in the same order and of the same shapes and devices.
        anchors: What they are pulled to.
        lam: Weight of the penalty.
        importance: The importance of each entry; ``None`` for 1.

    Raises:
        ValueError: If the numbers of tensors or their shapes differ.
    """
    _check_shapes(weights, gradients, anchors, importance)
    if not weights:
        return
    # The difference first: of two large products that nearly cancel, little would be left but rounding.
    pull = torch._foreach_sub(list(weights), list(anchors))
    if importance is not None:
        pull = torch._foreach_mul(pull, list(importance))
    torch._foreach_add_(list(gradients), pull, alpha=2.0 * lam)


@torch.no_grad()
def anchor_penalty(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], lam: float, importance: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the penalty, its weight included, without waiting for it.

    Args:
        weights: At least one tensor.
        anchors: What they are pulled to, in the same order and of the same shapes.
        lam: Weight of the penalty.
        importance: The importance of each entry; ``None`` for 1.

    Returns:
        A scalar on the first weight's device, in float32 or wider.

    Raises:
        ValueError: If the numbers of tensors or their shapes differ.
    """
    _check_shapes(weights, weights, anchors, importance)
    parts = []
    for place, (weight, anchor) in enumerate(zip(weights, anchors, strict=True)):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        square = (weight - anchor).to(wide).square()
        part = (square if importance is None else square * importance[place]).sum()
        parts.append(part.to(weights[0].device))
    return lam * torch.stack(parts).sum()


def _check_shapes(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    anchors: Sequence[Tensor],
    importance: Sequence[Tensor] | None,
) -> None:
    """Raise ``ValueError`` unless all lists have tensors of the same shapes in the same order."""
    shapes = [tuple(weight.shape) for weight in weights]
    for name, others in (("gradients", gradients), ("anchors", anchors), ("importances", importance)):
        if others is not None and [tuple(other.shape) for other in others] != shapes:
            raise ValueError(
                f"The {name} have the shapes {[tuple(other.shape) for other in others]} and the weights {shapes}. Give "
                "all in one order."
            )
