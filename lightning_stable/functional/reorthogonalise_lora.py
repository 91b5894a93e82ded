r"""Bring the factors of a LoRA adapter into one form, from their singular value decomposition, their product unchanged.

With :math:`B` (out, r), :math:`A` (r, in), the decompositions :math:`A^\top = Q_A R_A`, :math:`B = Q_B R_B` and
:math:`R_B R_A^\top = U S V^\top` of an r x r matrix,

.. math:: A' = V^\top Q_A^\top, \qquad B' = Q_B U S, \qquad B' A' = B A

:math:`A'` has orthonormal rows, and the columns of :math:`B'` are orthogonal and of falling length. No matrix of the
weight's size is made. FedSVD (arXiv 2505.12805) does this with the averaged :math:`B` of clients that train :math:`B`
alone; its released code was read, its numbers were not checked.

It is a change of coordinates, :math:`B' = B P` and :math:`A' = P^{-1} A` with :math:`P = R_A^\top V`. Gradients, and
the averages of them that an optimizer keeps, change by (our derivation)

.. math:: m_A' = P^\top m_A, \qquad m_B' = m_B P^{-\top}

which is exact where :math:`A` has full rank. Averages of squares do not change by a linear map: entries of one column
(of one row, for :math:`B`) are taken as uncorrelated, which gives the same with each coefficient squared. That is an
approximation, and exact where :math:`P` only reorders, scales or flips components.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Reorthogonalised", "reorthogonalise", "turn_average", "turn_squares"]


class Reorthogonalised(NamedTuple):
    """Factors in their new form, and what the averages of their gradients change by.

    Attributes:
        a: Shape (rank, in), orthonormal rows, of the dtype of the factor given.
        b: Shape (out, rank), orthogonal columns of falling length, of the dtype of the factor given.
        turn_a: What averages of A's gradients are multiplied by from the left, shape (rank, rank), float64 (float32 on
            a device without it).
        turn_b: What averages of B's gradients are multiplied by from the right, of the same shape and dtype.
    """

    a: Tensor
    b: Tensor
    turn_a: Tensor
    turn_b: Tensor


@torch.no_grad()
def reorthogonalise(a: Tensor, b: Tensor) -> Reorthogonalised:
    """Return factors with orthonormal rows of A and orthogonal columns of B, whose product is the same up to rounding.

    Args:
        a: Shape (rank, in), of a floating-point dtype; not changed.
        b: Shape (out, rank), on the same device; not changed.

    Raises:
        ValueError: If the shapes do not fit, or the rank is above the smaller side of the product.

    Example:
        >>> import torch
        >>> new = reorthogonalise(torch.tensor([[0.0, 2.0, 0.0]]), torch.tensor([[3.0], [4.0]]))
        >>> new.a.abs().tolist(), new.b.round(decimals=4).tolist()
        ([[0.0, 1.0, 0.0]], [[6.0], [8.0]])
    """
    _check(a, b)
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    with torch.autocast(a.device.type, enabled=False):
        rows, mix_a = torch.linalg.qr(a.detach().to(wide).T)
        columns, mix_b = torch.linalg.qr(b.detach().to(wide))
        left, values, right = torch.linalg.svd(mix_b @ mix_a.T)
        new_a = right @ rows.T
        # Singular vectors have no sign of their own: the largest number of each row of A is positive.
        signs = new_a.gather(1, new_a.abs().argmax(1, keepdim=True)).sign()
        signs = torch.where(signs == 0, 1.0, signs).to(wide)
        right = right * signs
        new_b = columns @ (left * signs.T * values)
        # Where A lacks rank there is no inverse: what its gradients' averages do not show stays 0.
        turn_b = torch.linalg.pinv(mix_a) @ right.T
    return Reorthogonalised((new_a * signs).to(a.dtype), new_b.to(b.dtype), right @ mix_a, turn_b)


@torch.no_grad()
def turn_average(average: Tensor, turn: Tensor, *, of_a: bool) -> Tensor:
    """Return a gradient, or an average of gradients, in the new coordinates.

    Args:
        average: Of the shape of the factor.
        turn: The factor's matrix of :class:`Reorthogonalised`.
        of_a: Whether the factor is A; otherwise it is B.
    """
    wide = average.to(turn.dtype)
    return (turn @ wide if of_a else wide @ turn).to(average.dtype)


@torch.no_grad()
def turn_squares(squares: Tensor, turn: Tensor, *, of_a: bool) -> Tensor:
    """Return an average of squared gradients in the new coordinates, approximately; arguments as of `turn_average`."""
    return turn_average(squares, turn.square(), of_a=of_a)


def _check(a: Tensor, b: Tensor) -> None:
    """Raise ``ValueError`` unless two factors fit together."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)} are not the factors of a LoRA adapter: "
            "give a as (rank, in) and b as (out, rank)."
        )
    smaller = min(b.shape[0], a.shape[1])
    if a.shape[0] > smaller:
        raise ValueError(
            f"The rank {a.shape[0]} is above {smaller}, the smaller side of the layer: there are no {a.shape[0]} "
            "orthonormal rows. Choose a lower rank for this layer."
        )
