r"""SVFit: train the largest singular values of a weight, between its frozen singular vectors.

With :math:`W = U \Sigma V^\top` and the first :math:`r` triplets,

.. math:: W_{res} = W - U_r \Sigma_r V_r^\top, \qquad y = W_{res}\, x + U_r \operatorname{diag}(\sigma)\, V_r^\top x

:math:`W` has shape (out, in), :math:`U_r` (out, r), :math:`V_r^\top` (r, in), and :math:`\sigma`, of shape (r), starts
from :math:`\Sigma_r`: the function is unchanged at the start. Paper: SVFit, arXiv 2409.05926. Only its abstract was
read, and no code was found: this is our reconstruction, unverified. Rank and learning rate are for you to choose.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._factors import check_matrix, check_rank, shift, working_dtype
from lightning_stable.functional._low_rank import check_search, leading_svd

__all__ = ["SVFitFactors", "svfit_factors", "top_singular"]


class SVFitFactors(NamedTuple):
    """Factors of an adapter, with ``weight = residual + left @ diag(values) @ right`` up to rounding.

    Attributes:
        left: U_r, shape (out, rank), float32, or float64 for a weight of float64.
        values: The largest singular values, falling, shape (rank), of the dtype of ``left``.
        right: V_r transposed, shape (rank, in), of the dtype of ``left``.
        residual: What the base layer keeps, shape (out, in), of the weight's dtype.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    residual: Tensor


@torch.no_grad()
def top_singular(
    weight: Tensor,
    rank: int,
    *,
    iterations: int | None = None,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return left singular vectors (out, rank), singular values (rank) and right singular vectors (rank, in).

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        rank: Triplets, at most the smaller side.
        iterations: Power iterations of a randomised SVD; ``None`` for a full SVD, which takes far longer.
        oversampling: Directions that the randomised search looks for beyond ``rank``.
        generator: Source of the search's random start; ``None`` for a new one of seed 0. The global one is not used.

    Raises:
        ValueError: If the weight is no finite floating-point matrix, or a setting is out of range.
    """
    check_matrix("weight", weight)
    check_rank(rank, 1.0, weight)
    check_search(iterations, oversampling)
    matrix = weight.detach().to(working_dtype(weight))
    return leading_svd(matrix, rank, iterations=iterations, oversampling=oversampling, generator=generator)


@torch.no_grad()
def svfit_factors(
    weight: Tensor, rank: int, *, iterations: int | None = None, generator: torch.Generator | None = None
) -> SVFitFactors:
    """Split a weight into its largest singular triplets and the rest; arguments as of :func:`top_singular`.

    Example:
        >>> import torch
        >>> left, values, right, residual = svfit_factors(torch.diag(torch.tensor([1.0, 9.0, 4.0])), rank=2)
        >>> values.tolist(), residual.diagonal().tolist()
        ([9.0, 4.0], [1.0, 0.0, 0.0])
    """
    left, values, right = top_singular(weight, rank, iterations=iterations, generator=generator)
    return SVFitFactors(left, values, right, shift(weight, right, left * values, 1.0))
