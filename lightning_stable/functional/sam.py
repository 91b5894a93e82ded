r"""Sharpness-aware minimisation (SAM) and its variants: the vectors that they add to weights and gradients.

All tensors of a list together are one vector: :math:`w` the weights, :math:`g` their gradient, :math:`g_s` the
gradient at the perturbed weights :math:`w + e`, :math:`\|\cdot\|` the Euclidean norm.

.. math::

    \text{SAM}\quad e &= \rho\, g / \|g\| \\
    \text{ASAM}\quad e &= \rho\, w^2 g \,/\, \bigl\| |w|\, g \bigr\| \\
    \text{GSAM}\quad g_s &\leftarrow g_s - \alpha\,(g - \mathrm{proj}_{g_s} g) \\
    \text{LookSAM}\quad v &= g_s - \mathrm{proj}_g\, g_s, \qquad g \leftarrow g + \alpha\, \|g\|\, v / \|v\|

:math:`\rho` has the unit of the weights (ASAM: none), :math:`\alpha` none. A positive factor on :math:`g`, such as a
gradient scaler's, changes no perturbation. SAM: arXiv 2010.01412. ASAM: arXiv 2102.11600. GSAM: arXiv 2203.08065; its
radius follows the learning rate in the paper and is constant here. LookSAM: arXiv 2203.02714; the projection is over
all tensors at once as in the paper, where pytorch-optimizer's is over each tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stable.functional._vectors import global_norm

__all__ = ["gsam_gradient", "looksam_component", "looksam_gradient", "sam_perturbation"]

# Keeps a zero gradient from dividing by zero.
_EPS = 1e-12


@torch.no_grad()
def sam_perturbation(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, adaptive: bool = False
) -> list[Tensor]:
    """Return the step uphill to the worst point nearby, to first order.

    Args:
        weights: Tensors of any shapes.
        gradients: Their gradients, in the same order.
        rho: Radius of the neighbourhood.
        adaptive: Measure it relative to each weight's size (ASAM).

    Returns:
        What to add to each weight, in its dtype; not finite where the gradient is not.
    """
    found = [gradient.detach().clone() for gradient in gradients]
    if not adaptive:
        torch._foreach_mul_(found, rho / (global_norm(found) + _EPS))
        return found
    sizes = list(torch._foreach_abs(list(weights)))
    torch._foreach_mul_(found, sizes)
    factor = rho / (global_norm(found) + _EPS)
    torch._foreach_mul_(found, factor)
    torch._foreach_mul_(found, sizes)
    return found


@torch.no_grad()
def gsam_gradient(gradients: Sequence[Tensor], clean: Sequence[Tensor], alpha: float) -> None:
    """Take ``alpha`` times the part of ``clean`` that is orthogonal to ``gradients`` from them, in place.

    Args:
        gradients: The gradients at the perturbed weights.
        clean: Those at the weights.
        alpha: How much of the part that only lowers the loss at the weights is taken away.
    """
    along = _share(clean, gradients)
    # g_s - alpha (g - along g_s) = (1 + alpha along) g_s - alpha g
    torch._foreach_mul_(list(gradients), 1 + alpha * along)
    torch._foreach_add_(list(gradients), list(clean), alpha=-alpha)


@torch.no_grad()
def looksam_component(gradients: Sequence[Tensor], clean: Sequence[Tensor]) -> list[Tensor]:
    """Return the unit vector along the part of ``gradients`` that is orthogonal to ``clean``.

    Args:
        gradients: The gradients at the perturbed weights.
        clean: Those at the weights.
    """
    component = [gradient.detach().clone() for gradient in clean]
    torch._foreach_mul_(component, -_share(gradients, clean))
    torch._foreach_add_(component, list(gradients))
    torch._foreach_mul_(component, 1 / (global_norm(component) + _EPS))
    return component


@torch.no_grad()
def looksam_gradient(gradients: Sequence[Tensor], component: Sequence[Tensor], alpha: float) -> None:
    """Add ``alpha`` times the norm of ``gradients`` along ``component`` to them, in place.

    Args:
        gradients: The gradients at the weights.
        component: A unit vector, from :func:`looksam_component`.
        alpha: Share of the gradient's norm that is added.
    """
    added = [part.clone() for part in component]
    torch._foreach_mul_(added, alpha * global_norm(gradients))
    torch._foreach_add_(list(gradients), added)


def _share(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return how many times ``right`` is in ``left``, both as vectors; 0 where ``right`` is zero."""
    square = _dot(right, right)
    return _dot(left, right) / square.clamp(min=torch.finfo(square.dtype).tiny)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists as vectors, in float32 or wider."""
    parts = [torch.linalg.vecdot(_wide(a), _wide(b)) for a, b in zip(left, right, strict=True)]
    return torch.stack([part.to(parts[0]) for part in parts]).sum()


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor as a vector of float32 or wider."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).flatten()
