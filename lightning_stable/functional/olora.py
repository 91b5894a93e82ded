r"""OLoRA: start an adapter from the QR decomposition of the weight, and keep the rest in the base.

For a weight :math:`W = Q R` of shape (out, in), rank :math:`r` and the adapter's scaling :math:`s`,

.. math:: B = Q_r, \qquad A = R_r, \qquad W_{res} = W - s\,B A

with the first :math:`r` columns of :math:`Q` and rows of :math:`R`: :math:`B` of shape (out, r) has orthonormal
columns, :math:`A` has shape (r, in). The layer computes :math:`W_{res} x + s\,B A x = W x`. The columns are the first
ones of the weight, made orthogonal, not those of its largest part. Paper: OLoRA, arXiv 2406.01775 (peft's code was
read, the paper was not).

What differs from peft: its initialiser takes the weight of a Conv1D, which is stored as (in, out), for one of (out,
in). Here the caller gives the matrix as (out, in).
"""

import torch
from torch import Tensor

from lightning_stable.functional._factors import Factors, check_matrix, check_rank, shift, working_dtype

__all__ = ["olora_factors", "olora_pair"]


@torch.no_grad()
def olora_factors(weight: Tensor, rank: int, scaling: float) -> Factors:
    """Split a weight into the product of its first orthonormal columns and the rest.

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        rank: Columns that the adapter gets.
        scaling: The adapter's factor, ``alpha / rank`` or ``alpha / sqrt(rank)``.

    Returns:
        Factors of float32 (float64 for a weight of float64), and the residual in the weight's dtype.

    Raises:
        ValueError: If the weight is no finite floating-point matrix, or the rank is above its smaller side.

    Example:
        >>> import torch
        >>> a, b, residual = olora_factors(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), rank=1, scaling=1.0)
        >>> (b @ a).abs().tolist(), residual.tolist()
        ([[0.0, 0.0], [3.0, 1.0]], [[0.0, 2.0], [0.0, 0.0]])
    """
    a, b = olora_pair(weight, rank, scaling)
    return Factors(a, b, shift(weight, a, b, scaling))


@torch.no_grad()
def olora_pair(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the two factors of :func:`olora_factors` without the residual."""
    check_matrix("weight", weight)
    check_rank(rank, scaling, weight)
    matrix = weight.detach().to(working_dtype(weight))
    with torch.autocast(weight.device.type, enabled=False):
        left, right = torch.linalg.qr(matrix)
    return right[:rank].contiguous(), left[:, :rank].contiguous()
