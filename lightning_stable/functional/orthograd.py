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

# On a CPU, tensors of this many entries are faster one by one, which takes no temporaries; smaller ones together.
_SMALL = 1 << 15


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
    small: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient.device.type != "cpu" or gradient.numel() < _SMALL:
            small.setdefault((gradient.device, gradient.dtype), []).append((gradient, weight.detach()))
        elif gradient.dtype.itemsize < 4:
            wide = gradient.float()
            _orthogonalise(wide, weight.detach().float(), eps)
            gradient.copy_(wide)
        else:
            _orthogonalise(gradient, weight.detach().to(gradient.dtype), eps)
    for pairs in small.values():
        _orthogonalise_together([gradient for gradient, _ in pairs], [weight for _, weight in pairs], eps)


def _orthogonalise_together(gradients: list[Tensor], weights: list[Tensor], eps: float) -> None:
    """Treat many tensors of one device and precision in fused passes, with temporaries of their size."""
    half = gradients[0].dtype.itemsize < 4
    wide = [gradient.float() for gradient in gradients] if half else gradients
    along = [weight.to(gradient.dtype) for gradient, weight in zip(wide, weights, strict=True)]
    before, lengths = torch.stack(torch._foreach_norm(wide)), torch.stack(torch._foreach_norm(along))
    shares = torch.stack([_dot(w, g) for w, g in zip(along, wide, strict=True)]) / (lengths.square() + eps)
    torch._foreach_sub_(wide, torch._foreach_mul(along, list(shares.unbind())))
    after = torch.stack(torch._foreach_norm(wide))
    sizes = torch.tensor([gradient.numel() for gradient in wide], device=before.device)
    torch._foreach_mul_(wide, list(_factors(before, after, sizes, eps).unbind()))
    if half:
        torch._foreach_copy_(gradients, wide)


def _orthogonalise(gradient: Tensor, weight: Tensor, eps: float) -> None:
    """Treat one tensor, without a temporary of its size."""
    before = torch.linalg.vector_norm(gradient)
    share = _dot(weight, gradient) / (_dot(weight, weight) + eps)
    gradient.addcmul_(weight, share, value=-1.0)
    after = torch.linalg.vector_norm(gradient)
    gradient.mul_(_factors(before, after, torch.tensor(gradient.numel(), device=before.device), eps))


def _factors(before: Tensor, after: Tensor, sizes: Tensor, eps: float) -> Tensor:
    """Return what brings norms back, 0 where nothing but rounding is left."""
    # The inner products' rounding grows about as the root of the number of entries.
    rounding = (16 + sizes.to(before.dtype).sqrt() / 8) * torch.finfo(before.dtype).eps
    return torch.where(after > rounding * before, before / (after + eps), 0.0)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of two tensors of one shape."""
    return torch.dot(left.reshape(-1), right.reshape(-1))
