r"""PiSSA: start an adapter from the principal singular vectors of the weight, and keep the rest in the base.

For a weight :math:`W = U \Sigma V^\top` of shape (out, in), rank :math:`r` and the adapter's scaling :math:`s`,

.. math::

    B = U_r (\Sigma_r / s)^{1/2}, \qquad A = (\Sigma_r / s)^{1/2} V_r^\top, \qquad W_{res} = W - s\,B A

with :math:`U_r, V_r` the first :math:`r` singular vectors: :math:`B` of shape (out, r), :math:`A` of shape (r, in). The
layer computes :math:`W_{res} x + s\,B A x = W x`, and training moves the principal part. Paper: PiSSA, arXiv
2404.02948; it has no :math:`s`, which peft's initialiser divides by as here.

What differs from peft's fast variant: the randomised search looks for ``oversampling`` directions more than it keeps,
and it is seeded, so that the same weight gives the same factors in each process. For QPiSSA quantise the residual, not
the weight.
"""

import torch
from torch import Tensor

from lightning_stable.functional._factors import Factors, check_matrix, check_rank, shift, working_dtype
from lightning_stable.functional._low_rank import check_search, leading_svd

__all__ = ["pissa_factors", "pissa_pair"]


@torch.no_grad()
def pissa_factors(
    weight: Tensor,
    rank: int,
    scaling: float,
    *,
    iterations: int | None = 3,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> Factors:
    """Split a weight into its principal part and the rest.

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        rank: Singular vectors that the adapter gets.
        scaling: The adapter's factor, ``alpha / rank`` or ``alpha / sqrt(rank)``.
        iterations: Power iterations of the randomised SVD; ``None`` for a full SVD, which takes far longer.
        oversampling: Directions that the search looks for beyond ``rank``; of no effect with a full SVD.
        generator: Source of the search's random start; ``None`` for a new one of seed 0. The global one is not used.

    Returns:
        Factors of float32 (float64 for a weight of float64), and the residual in the weight's dtype.

    Raises:
        ValueError: If the weight is no finite floating-point matrix, the rank is above its smaller side or above the
            number of its singular values that are not 0, or a setting is out of range.

    Example:
        >>> import torch
        >>> weight = torch.diag(torch.tensor([1.0, 9.0, 4.0]))
        >>> a, b, residual = pissa_factors(weight, rank=1, scaling=1.0)
        >>> round((b @ a)[1, 1].item(), 3), residual.diagonal().round(decimals=3).tolist()
        (9.0, [1.0, 0.0, 4.0])
    """
    a, b = pissa_pair(weight, rank, scaling, iterations=iterations, oversampling=oversampling, generator=generator)
    return Factors(a, b, shift(weight, a, b, scaling))


@torch.no_grad()
def pissa_pair(
    weight: Tensor,
    rank: int,
    scaling: float,
    *,
    iterations: int | None = 3,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the two factors of :func:`pissa_factors` without the residual."""
    check_matrix("weight", weight)
    check_rank(rank, scaling, weight)
    check_search(iterations, oversampling)
    matrix = weight.detach().to(working_dtype(weight))
    left, values, right = leading_svd(
        matrix, rank, iterations=iterations, oversampling=oversampling, generator=generator
    )
    alive = int((values > values[0] * max(weight.shape) * torch.finfo(matrix.dtype).eps).sum())
    if alive < rank:
        raise ValueError(
            f"The weight of shape {tuple(weight.shape)} has {alive} singular values that are not 0, fewer than "
            f"rank={rank}: the other components would start at 0 in both factors and never train. Choose a rank of at "
            f"most {alive} for this layer (rank_pattern), or another initialiser."
        )
    root = (values / scaling).sqrt()
    return root.unsqueeze(1) * right, left * root
