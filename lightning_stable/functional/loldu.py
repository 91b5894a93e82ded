r"""LoLDU: train the leading diagonal of a weight's LDU decomposition, between frozen triangular factors.

With partial pivoting :math:`W = P L U`, :math:`d` the diagonal of :math:`U`, :math:`\tilde U = U / d` row by row, the
leading columns :math:`L_r` and rows :math:`\tilde U_r`, scale :math:`\sigma` and the trained :math:`z`,

.. math::

    W_{res} = W - \sigma\, P L_r \operatorname{diag}(z_0) \tilde U_r, \qquad
    y = W_{res}\, x + \sigma\, P L_r \operatorname{diag}(z)\, \tilde U_r\, x

:math:`W` has shape (out, in), :math:`P L_r` (out, r), :math:`\tilde U_r` (r, in), :math:`z` (r). Paper: LoLDU, arXiv
2410.13618, of which the abstract and the released code were read.

What differs from the released code:

- It stores :math:`P` as a matrix of (out, out); here the product :math:`P L_r` is kept, which has :math:`r` columns.
- It decomposes the whole weight. Pivots of the first :math:`r` columns hang on these columns alone, so here a panel of
  :math:`r` columns is decomposed and the rest of :math:`\tilde U_r` is solved for: the same factors, in a fraction of
  the time (our derivation).
- It divides by each pivot, so that a pivot of 0 gives nan. Here a row is divided only where its pivot is not 0 up to
  rounding. Where it is 0 the row stays as it is and the component's entry of :math:`d` is 1, so that the product
  :math:`P L_r \operatorname{diag}(d) \tilde U_r` is the leading block in any case. If all of the row is 0, its
  component adds nothing, has no gradient, and its :math:`z` stays what it was.

The leading components are the first ones, not the largest; the columns of :math:`P L_r` are not orthogonal.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._factors import check_matrix, check_rank, shift, working_dtype
from lightning_stable.functional._low_rank import fresh_generator
from lightning_stable.functional._settings import check_choice

__all__ = [
    "CHANGING_INITS",
    "INITS",
    "LDU",
    "LoLDUFactors",
    "initial_diagonal",
    "leading_ldu",
    "loldu_factors",
]

# These start from another diagonal than the one in the residual, so the layer starts as another function.
CHANGING_INITS = ("s_uniform", "s_normal", "ones", "zeros")
INITS = ("lu", "uniform", "normal", "constant", *CHANGING_INITS)


class LDU(NamedTuple):
    """Leading block of a weight's LDU decomposition.

    Attributes:
        left: P @ L_r, shape (out, rank).
        diagonal: d_r, shape (rank); 1 where the pivot is 0.
        right: The rows of U, divided by their pivots where these are not 0, shape (rank, in).
    """

    left: Tensor
    diagonal: Tensor
    right: Tensor


class LoLDUFactors(NamedTuple):
    """Factors of an adapter, with ``weight = residual + scale * left @ diag(start) @ right`` up to rounding.

    Attributes:
        left: P @ L_r, shape (out, rank), float32, or float64 for a weight of float64.
        diagonal: What training starts from, shape (rank), of the dtype of ``left``.
        right: Shape (rank, in), of the dtype of ``left``.
        residual: What the base layer keeps, shape (out, in), of the weight's dtype.
        start: The diagonal in the residual; equal to ``diagonal`` unless the initialisation changes the function.
    """

    left: Tensor
    diagonal: Tensor
    right: Tensor
    residual: Tensor
    start: Tensor


@torch.no_grad()
def leading_ldu(weight: Tensor, rank: int) -> LDU:
    """Return the leading block of the LDU decomposition with partial pivoting.

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        rank: Components, at most the smaller side.

    Raises:
        ValueError: If the weight is no finite floating-point matrix, or the rank does not fit.
    """
    check_matrix("weight", weight)
    check_rank(rank, 1.0, weight)
    matrix = weight.detach().to(working_dtype(weight))
    with torch.autocast(matrix.device.type, enabled=False):
        packed, swaps, _ = torch.linalg.lu_factor_ex(matrix[:, :rank])
        order = _row_order(swaps, len(matrix)).to(matrix.device)
        lower = packed.tril(-1) + torch.eye(*packed.shape, dtype=packed.dtype, device=packed.device)
        left = torch.empty_like(lower)
        left[order] = lower
        upper = packed[:rank].triu()
        rest = torch.linalg.solve_triangular(lower[:rank], matrix[order[:rank], rank:], upper=False, unitriangular=True)
    rows = torch.cat([upper, rest], 1)
    pivots = upper.diagonal()
    smallest = torch.finfo(matrix.dtype).eps * max(matrix.shape) * matrix.abs().max()
    diagonal = torch.where(pivots.abs() > smallest, pivots, 1.0)
    return LDU(left, diagonal, rows / diagonal.unsqueeze(1))


def initial_diagonal(
    diagonal: Tensor, init: str = "lu", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return what training starts from, and the diagonal that goes into the residual, each of shape (rank).

    With :math:`\mu` and :math:`s` the mean and the standard deviation of the leading diagonal: ``"lu"`` starts from the
    diagonal itself, ``"uniform"`` from :math:`U(-|\mu|/2, |\mu|/2)`, ``"normal"`` from :math:`N(\mu, s)`,
    ``"constant"`` from :math:`\mu`. These four go into the residual too, and the layer starts as the function it was.
    ``"s_uniform"`` starts from :math:`U(-1, 1)`, ``"s_normal"`` from :math:`N(0, 1)`, ``"ones"`` and ``"zeros"`` from
    those, while the residual is that of ``"lu"``: the layer starts as another function.

    Args:
        diagonal: The leading diagonal, shape (rank).
        init: One of :data:`INITS`.
        generator: Source of random numbers; ``None`` for a new one of seed 0.

    Raises:
        ValueError: If ``init`` is unknown.
    """
    check_choice("init", init, INITS)
    if init == "lu":
        return diagonal.clone(), diagonal.clone()
    z = _drawn(diagonal, init, fresh_generator(generator))
    return z, diagonal.clone() if init in CHANGING_INITS else z.clone()


@torch.no_grad()
def loldu_factors(
    weight: Tensor,
    rank: int,
    *,
    alpha: float,
    init: str = "lu",
    generator: torch.Generator | None = None,
) -> LoLDUFactors:
    """Split a weight into the leading block of its LDU decomposition and the rest.

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        rank: Components, at most the smaller side.
        alpha: The scale is ``alpha / rank``, above 0.
        init: What the diagonal starts from, see :func:`initial_diagonal`.
        generator: Source of random numbers of the inits that draw; ``None`` for a new one of seed 0.

    Raises:
        ValueError: If the weight is no finite floating-point matrix, or a setting is out of range.

    Example:
        >>> import torch
        >>> left, diagonal, right, residual, start = loldu_factors(torch.tensor([[1.0, 2.0], [4.0, 6.0]]), 1, alpha=1.0)
        >>> left.tolist(), diagonal.tolist(), right.tolist()
        ([[0.25], [1.0]], [4.0], [[1.0, 1.5]])
        >>> residual.tolist()
        [[0.0, 0.5], [0.0, 0.0]]
    """
    check_rank(rank, alpha, weight)
    left, leading, right = leading_ldu(weight, rank)
    diagonal, start = initial_diagonal(leading, init, generator)
    return LoLDUFactors(left, diagonal, right, shift(weight, right, left * start, alpha / rank), start)


def _row_order(swaps: Tensor, rows: int) -> Tensor:
    """Return which row of the weight is each row of L, from LAPACK's list of swaps, counted from 1."""
    order = list(range(rows))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order)


def _drawn(diagonal: Tensor, init: str, generator: torch.Generator) -> Tensor:
    """Return a diagonal that is not the weight's own; random numbers are drawn on the generator's device."""
    mean, number = diagonal.mean(), diagonal.numel()
    spread = diagonal.std() if number > 1 else torch.zeros_like(mean)
    draw = torch.randn if init in ("normal", "s_normal") else torch.rand
    random = draw(number, generator=generator, device=generator.device).to(diagonal)
    values = {
        "uniform": (random - 0.5) * mean.abs(),
        "normal": mean + spread * random,
        "constant": mean.expand(number),
        "s_uniform": 2 * random - 1,
        "s_normal": random,
        "ones": torch.ones_like(diagonal),
        "zeros": torch.zeros_like(diagonal),
    }
    return values[init].clone()
