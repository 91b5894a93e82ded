"""What robust rules multiply the gradients of n workers by: functions of their Gram matrix (n, n), in float64."""

import torch
from torch import Tensor

__all__ = ["flag_weights", "geometric_median_weights", "krum_weights", "nearest_neighbours"]

_FLAG_EPS = 1e-7  # the released code's
_WEISZFELD_STEPS = 100
_WEISZFELD_TOLERANCE = 1e-10  # of coefficients, whose sum is 1


def _squared_distances(gram: Tensor) -> Tensor:
    """Return those between gradients, (n, n), with an exact zero for each to itself."""
    squares = gram.diagonal()
    distances = (squares[:, None] + squares - 2 * gram).clamp_(min=0)
    return distances.fill_diagonal_(0)


def krum_weights(gram: Tensor, f: int, selected: int) -> Tensor:
    """Return the coefficients of Multi-Krum, (n,). Of equal scores the lower rank's is taken."""
    workers = len(gram)
    nearest = _squared_distances(gram).sort(dim=1).values[:, 1 : workers - f - 1]  # the first is that to itself
    chosen = nearest.sum(1).argsort(stable=True)[:selected]
    return gram.new_zeros(workers).index_fill_(0, chosen, 1 / selected)


def nearest_neighbours(gram: Tensor, f: int) -> Tensor:
    """Return the matrix (n, n) that replaces each gradient by the mean of the n - f nearest, itself among them."""
    workers = len(gram)
    # Nobody is nearer than oneself, also where others are equal.
    order = _squared_distances(gram).fill_diagonal_(-1).argsort(dim=1, stable=True)
    return torch.zeros_like(gram).scatter_(1, order[:, : workers - f], 1 / (workers - f))


def geometric_median_weights(gram: Tensor) -> Tensor:
    """Return the coefficients of the geometric median, (n,)."""
    squares = gram.diagonal()
    distances = _squared_distances(gram).sqrt()
    # The smoothing: a gradient that the median coincides with has a finite weight. Below the second number distances
    # are rounding errors of the Gram matrix. Both are medians, which no faulty gradient can blow up.
    resolved = 4 * torch.finfo(gram.dtype).eps ** 0.5 * squares.sqrt().median()
    small = torch.maximum(1e-6 * distances.median(), resolved).clamp(min=torch.finfo(gram.dtype).tiny)
    # Who is far from most begins with little weight, so that no length of a faulty gradient costs further steps.
    weights = small / distances.quantile(0.5, dim=1).clamp(min=small)
    weights = weights / weights.sum()
    for _ in range(_WEISZFELD_STEPS):
        product = gram @ weights
        apart = (squares - 2 * product + weights @ product).clamp_(min=0).sqrt()
        before, weights = weights, small / apart.clamp(min=small)
        weights = weights / weights.sum()
        if (weights - before).abs().max() < _WEISZFELD_TOLERANCE:
            break
    return weights


def flag_weights(gram: Tensor, rank: int, iterations: int) -> Tensor:
    """Return the coefficients of the Flag Aggregator, (n,)."""
    lengths = gram.diagonal().sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    unit = inverse[:, None] * gram * inverse
    weights, basis = torch.ones_like(lengths), unit
    for _ in range(iterations):
        # The columns w_i u_i have the Gram matrix W U W; its eigenvectors V give their left singular vectors U W V / s.
        squares, vectors = torch.linalg.eigh(weights[:, None] * unit * weights)
        squares, vectors = squares[-rank:], vectors[:, -rank:]
        inside = squares > 1e-12 * squares[-1].clamp(min=torch.finfo(gram.dtype).tiny)
        basis = weights[:, None] * vectors * torch.where(inside, squares.clamp(min=0).rsqrt(), 0.0)
        sines = (1 - (unit @ basis).square().sum(1)).clamp_(min=0)
        weights = (sines + _FLAG_EPS) ** -0.25
    return lengths.quantile(0.5) / len(gram) * inverse * (basis @ (basis.T @ unit.sum(1)))
