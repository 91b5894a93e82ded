r"""OrthoGrad: the part of the gradient that does not change the length of the weights.

For each tensor of weights :math:`w` with gradient :math:`g`, of one shape,

.. math::

    g_\perp = g - \frac{\langle w, g\rangle}{\langle w, w\rangle + \epsilon}\, w, \qquad
    g \leftarrow g_\perp\, \frac{\|g\|_2}{\|g_\perp\|_2 + \epsilon}

(arXiv 2501.04697, where it is called :math:`\perp`\ Grad). :math:`g` keeps its unit and its norm. Scaling the weights
is the direction along which a model that fits all its samples goes on lowering its loss without learning, until the
softmax's arithmetic fails (:mod:`lightning_stable.functional.softmax_collapse`).

Differs from the formula where :math:`g` lies along :math:`w` up to rounding, as it always does in a tensor of one
entry: nothing but rounding is left there, which the formula would scale up to the full norm. It becomes 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["orthogonal_gradients"]


@torch.no_grad()
def orthogonal_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor], eps: float = 1e-30) -> None:
    """Take the part along the weights out of each gradient and keep its norm, in place.

    Half precisions are computed in float32. Nothing is read back from an accelerator.

    Args:
        gradients: Dense real tensors of any shapes.
        weights: The weights, in the same order and of the same shapes.
        eps: Added to the denominators; a squared weight norm and a gradient norm.

    Raises:
        ValueError: If the numbers of tensors or their shapes differ.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (gradients, weights)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Gradients of shapes {shapes[0]} do not belong to weights of shapes {shapes[1]}. Give both in one order."
        )
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient.dtype.itemsize < 4:
            wide = gradient.float()
            _orthogonalise(wide, weight.detach().float(), eps)
            gradient.copy_(wide)
        else:
            _orthogonalise(gradient, weight.detach().to(gradient.dtype), eps)


def _orthogonalise(gradient: Tensor, weight: Tensor, eps: float) -> None:
    """Treat one tensor, without a temporary of its size."""
    before = torch.linalg.vector_norm(gradient)
    share = _dot(weight, gradient) / (_dot(weight, weight) + eps)
    gradient.addcmul_(weight, share, value=-1.0)
    after = torch.linalg.vector_norm(gradient)
    # The inner products' rounding grows about as the root of the number of entries.
    rounding = (16 + gradient.numel() ** 0.5 / 8) * torch.finfo(gradient.dtype).eps
    gradient.mul_(torch.where(after > rounding * before, before / (after + eps), 0.0))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape."""
    return torch.dot(left.reshape(-1), right.reshape(-1))
