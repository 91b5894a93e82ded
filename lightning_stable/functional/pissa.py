r"""PiSSA: start an adapter from the principal singular vectors of the weight, and keep the rest in the base.

For a weight :math:`W = U \Sigma V^\top` of shape (out, in), rank :math:`r` and the adapter's scaling :math:`s`,

.. math::

    B = U_r (\Sigma_r / s)^{1/2}, \qquad A = (\Sigma_r / s)^{1/2} V_r^\top, \qquad W_{res} = W - s\,B A

with :math:`U_r, V_r` the first :math:`r` singular vectors: :math:`B` of shape (out, r), :math:`A` of shape (r, in). The
layer computes :math:`W_{res} x + s\,B A x = W x`, and training moves the principal part. Paper: PiSSA, arXiv
2404.02948; it has no :math:`s`, which peft's initialiser divides by as here.

What differs from peft's fast variant: the randomised search looks for ``oversampling`` directions more than it keeps,
and it is seeded, so that the same weight gives the same factors in each process.

QPiSSA keeps the residual quantised, and the function is no longer that of :math:`W`: it is off by what quantising the
residual takes, which is less than quantising the weight would, as the residual is smaller. Its rounds look for factors
that make that less,

.. math::

    A_t, B_t = \mathrm{PiSSA}(W - Q(W_{res,t-1})), \qquad W_{res,t} = W - s\,B_t A_t, \qquad Q(W_{res,0}) = 0 .

The loop is that of the released code as remembered, unverified. Our addition: the round with the least error is kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_stable.functional._factors import Factors, check_matrix, check_rank, shift, working_dtype
from lightning_stable.functional._low_rank import check_search, leading_svd
from lightning_stable.functional._settings import check_count

__all__ = ["pissa_factors", "pissa_pair", "qpissa_pair"]


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


@torch.no_grad()
def qpissa_pair(
    weight: Tensor,
    rank: int,
    scaling: float,
    held: Callable[[Tensor], Tensor],
    *,
    rounds: int = 1,
    iterations: int | None = 3,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return factors for a residual that is kept quantised; arguments beside these are those of :func:`pissa_factors`.

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        rank: Singular vectors that the adapter gets.
        scaling: The adapter's factor.
        held: Q: takes a residual and returns its values as they are once it is quantised, of its shape and dtype.
        rounds: Decompositions, one after the other; with 1 the factors are those of :func:`pissa_factors`.
        iterations: Of the randomised SVD; ``None`` for a full SVD.
        oversampling: Directions that the search looks for beyond ``rank``.
        generator: Source of the search's random starts.

    Raises:
        ValueError: As :func:`pissa_factors`, and for rounds below 1.
    """
    check_count("rounds", rounds, 1, "rounds")
    source, found = weight, list[tuple[float, Tensor, Tensor]]()
    for _ in range(rounds):
        a, b = pissa_pair(source, rank, scaling, iterations=iterations, oversampling=oversampling, generator=generator)
        residual = shift(weight, a, b, scaling)
        kept = held(residual).to(a.dtype)
        found.append((float(torch.linalg.vector_norm(residual.to(a.dtype) - kept)), a, b))
        source = weight.to(a.dtype) - kept
    _, a, b = min(found, key=lambda each: each[0])
    return a, b
