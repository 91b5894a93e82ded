r"""A layer that trains only a diagonal between two frozen factors: its output, its change of the weight, its check.

With left factor :math:`L` (out, r), right factor :math:`R` (r, in), diagonal :math:`v` and scale :math:`\sigma`,

.. math::

    y = \bigl(W - \sigma_0 L \operatorname{diag}(v_0) R\bigr) x + \sigma L \operatorname{diag}(v) R\, x
      = W x + L \operatorname{diag}(\sigma v - \sigma_0 v_0) R\, x

The right side needs neither the residual weight nor a change of :math:`W`: it is what is computed here. With
:math:`v = v_0` and :math:`\sigma = \sigma_0` the second term is exactly 0.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["check_probe", "diagonal_delta", "diagonal_output", "diagonal_step", "probe_factors"]

# The numbers that factors are compared by do not depend on anything but the shapes.
_PROBE_SEED = 20240917
_PROBES = 4


def diagonal_step(vector: Tensor, start: Tensor, scale: Tensor | float, start_scale: Tensor | float) -> Tensor:
    r"""Return :math:`\sigma v - \sigma_0 v_0`, shape (rank), exactly 0 at the start.

    Args:
        vector: The trained diagonal :math:`v`, shape (rank).
        start: The diagonal in the residual :math:`v_0`, shape (rank).
        scale: :math:`\sigma`, a number or a tensor of one.
        start_scale: :math:`\sigma_0`, of the kind of ``scale``.
    """
    wide = torch.promote_types(torch.promote_types(vector.dtype, start.dtype), torch.float32)
    vector, start = vector.to(wide), start.to(wide)
    return scale * (vector - start) + (scale - start_scale) * start


def diagonal_output(x: Tensor, left: Tensor, step: Tensor, right: Tensor) -> Tensor:
    """Return what the change adds to the layer's output, shape (..., out).

    Args:
        x: Input, shape (..., in).
        left: Shape (out, rank).
        step: Shape (rank), as of :func:`diagonal_step`.
        right: Shape (rank, in).
    """
    return linear(linear(x, right) * step.to(left.dtype), left)


def diagonal_delta(left: Tensor, step: Tensor, right: Tensor) -> Tensor:
    """Return the change of the weight, shape (out, in); arguments as of :func:`diagonal_output`."""
    with torch.autocast(left.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(left.dtype, step.dtype), torch.float32)
        return (left.to(wide) * step.to(wide)) @ right.to(wide)


@torch.no_grad()
def probe_factors(left: Tensor, right: Tensor) -> Tensor:
    r"""Return :math:`(l_i \cdot a)(r_i \cdot b) / (\|l_i\|\,\|r_i\|)` of each component, for four fixed random a and b.

    It tells pairs of factors apart. Singular vectors have no sign of their own: it is the same when both of a pair
    change theirs.

    Args:
        left: Shape (out, rank).
        right: Shape (rank, in).

    Returns:
        Shape (4, rank), float32, on the CPU; 0 where a factor of the pair is 0.
    """
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    first, second = left.detach().cpu().double(), right.detach().cpu().double()
    random = torch.randn(_PROBES, len(first) + second.shape[1], generator=generator, dtype=torch.float64)
    seen = (random[:, : len(first)] @ first) * (random[:, len(first) :] @ second.T)
    size = first.norm(dim=0) * second.norm(dim=1)
    return torch.where(size > 0, seen / size.clamp(min=torch.finfo(torch.float64).tiny), 0.0).float()


def check_probe(saved: Tensor, left: Tensor, right: Tensor) -> bool:
    """Tell whether factors are those that ``saved`` was taken of by :func:`probe_factors`, up to rounding."""
    coarse = {left.dtype, saved.dtype} & {torch.float16, torch.bfloat16}
    found = probe_factors(left, right)
    return saved.shape == found.shape and torch.allclose(
        saved.cpu().float(), found, rtol=0.0, atol=0.1 if coarse else 0.01
    )
