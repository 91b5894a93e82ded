"""The leading singular triplets of a matrix: exact, or by a seeded randomised range finder."""

import torch
from torch import Tensor

from lightning_stable.functional._settings import check_count

__all__ = ["check_search", "fresh_generator", "leading_svd"]


def check_search(iterations: int | None, oversampling: int) -> None:
    """Raise ``ValueError`` unless the settings of :func:`leading_svd` are whole numbers from 0 on."""
    if iterations is not None:
        check_count("iterations", iterations, 0, "power iterations (None for a full SVD)")
    check_count("oversampling", oversampling, 0, "further directions")


def fresh_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator given, else a new one of seed 0, never the global one."""
    return torch.Generator().manual_seed(0) if generator is None else generator


@torch.no_grad()
def leading_svd(
    matrix: Tensor,
    count: int,
    *,
    iterations: int | None,
    oversampling: int = 0,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first ``count`` left singular vectors, singular values and right singular vectors.

    Power iterations on a random start with an orthonormal basis taken after each product (arXiv 0909.4061, algorithms
    4.4 and 5.1). The random numbers are drawn on the generator's own device, whatever the matrix's is.

    Args:
        matrix: Shape (rows, columns), float32 or float64, finite.
        count: Triplets wanted, at most the smaller side.
        iterations: Power iterations, two products each; ``None`` for a full SVD.
        oversampling: Directions searched for beyond ``count``; they raise the accuracy, and are dropped.
        generator: Source of the random start; ``None`` for a new one of seed 0.
        start: Directions to begin from, shape (known, columns), known at most ``count``; the rest is random.

    Returns:
        Shapes (rows, count), (count), (count, columns); the largest number in size of each right vector is positive.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        # A search as wide as the matrix would find the same, later.
        if iterations is None or count + oversampling >= min(matrix.shape):
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        else:
            left, values, right = _randomised(matrix, count + oversampling, iterations, generator, start)
    left, values, right = left[:, :count], values[:count], right[:count]
    # Singular vectors have no sign of their own: this one does not hang on the library or the number of threads.
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs).to(right.dtype)
    return (left * signs.T).contiguous(), values.contiguous(), (right * signs).contiguous()


def _randomised(
    matrix: Tensor, width: int, iterations: int, generator: torch.Generator | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = fresh_generator(generator)
    width, columns = min(width, *matrix.shape), matrix.shape[1]
    known = 0 if start is None else len(start)
    draws = torch.randn(width - known, columns, generator=generator, device=generator.device, dtype=torch.float32)
    right = draws.to(device=matrix.device, dtype=matrix.dtype)
    if start is not None:
        # Random rows as long as the known ones, which are of length 1.
        right = torch.cat([start, right / columns**0.5])
    # Thin matrices are kept as rows: a product of rows with the matrix is faster than one with the matrix turned.
    left = _orthonormal(right @ matrix.T)
    for _ in range(iterations):
        left = _orthonormal(_orthonormal(left @ matrix) @ matrix.T)
    small, values, right = torch.linalg.svd(left @ matrix, full_matrices=False)
    return left.T @ small, values, right


def _orthonormal(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of what the rows span, as rows."""
    basis: Tensor = torch.linalg.qr(rows.T).Q
    return basis.T
