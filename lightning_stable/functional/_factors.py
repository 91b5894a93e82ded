"""What the initialisers of adapters share: the two factors with what is left of the weight, and the checks of both."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._settings import check_count, check_positive

__all__ = ["Factors", "check_matrix", "check_rank", "shift", "working_dtype"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of a block of rows in `shift`: a few MB in float64, so that no second copy of a large weight is made.
_BLOCK = 1 << 19


class Factors(NamedTuple):
    """Factors of an adapter, with ``weight = residual + scaling * b @ a`` up to the rounding of the residual.

    Attributes:
        a: Shape (rank, in), float32, or float64 for a weight of float64.
        b: Shape (out, rank), of the dtype of ``a``.
        residual: What the base layer keeps, shape (out, in), of the weight's dtype.
    """

    a: Tensor
    b: Tensor
    residual: Tensor


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which an initialiser computes: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.no_grad()
def shift(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``weight - scaling * b @ a``: the one place in which a base is shifted, or shifted back.

    The product is taken in float64 and rounded once, also under autocast and with TensorFloat-32 switched on, so that
    a base which is shifted again from saved factors gets the values that it had. (A device without float64 has to make
    do with float32.)

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        a: Shape (rank, in), on the weight's device.
        b: Shape (out, rank), on the weight's device.
        scaling: Factor of the product: that of the adapter, ``alpha / rank`` or ``alpha / sqrt(rank)``. The negative
            of it shifts back, up to rounding.

    Returns:
        A new tensor of the weight's shape and dtype.

    Raises:
        ValueError: If the shapes do not fit, a dtype is not a floating-point one, or ``scaling`` is not finite.
    """
    check_matrix("weight", weight, finite=False)
    if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != weight.shape or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)} do not fit a weight of shape "
            f"{tuple(weight.shape)}: give a as (rank, in) and b as (out, rank)."
        )
    if not math.isfinite(scaling):
        raise ValueError(f"scaling={scaling!r} is not a finite number.")
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    source, left, right = weight.detach(), b.detach().to(wide), a.detach().to(wide) * -scaling
    result = torch.empty_like(source)
    rows = min(len(source), max(1, _BLOCK // source.shape[1]))
    buffer = torch.empty(rows, source.shape[1], dtype=wide, device=source.device)
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, len(source), rows):
            part = slice(start, start + rows)
            result[part] = buffer[: len(source) - start].copy_(source[part]).addmm_(left[part], right)
    return result


def check_matrix(name: str, matrix: Tensor, *, finite: bool = True) -> None:
    """Raise ``ValueError`` unless ``matrix`` is a floating-point matrix that has values, all finite if asked."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name} has shape {tuple(matrix.shape)}, not (out, in). Give the matrix of a linear layer, and that of a "
            "Conv1D transposed."
        )
    if matrix.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is {matrix.dtype}, not float16, bfloat16, float32 or float64. Dequantise it first, or start from "
            "the model in floating point."
        )
    if matrix.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values. Load the weights before adapters are made.")
    # The extremes are not finite where any value is not, and take a tenth of the time of asking each.
    if finite and not bool(torch.stack(torch.aminmax(matrix.detach())).isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite. Look for what made them, nan or infinite.")


def check_rank(rank: int, scaling: float, matrix: Tensor, directions: int = 1) -> None:
    """Raise ``ValueError`` unless a matrix has room for ``directions * rank`` singular vectors, at a real scaling."""
    check_count("rank", rank, 1, "components")
    check_positive("scaling", scaling, "the factor of the adapter's product")
    room = min(matrix.shape)
    if directions * rank > room:
        needs = "" if directions == 1 else f" takes {directions * rank} pairs of singular vectors, which"
        raise ValueError(
            f"rank={rank}{needs} is above {room}, the smaller side of a weight of shape {tuple(matrix.shape)}. Choose "
            f"a rank of at most {room // directions} for this layer (rank_pattern), or leave the layer out."
        )
