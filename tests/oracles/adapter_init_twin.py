"""Slow twins of the initialisers: float64, full decompositions, one singular vector and one component at a time."""

import math

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    return left.double() @ right.double()


def rebuilt(factors, scaling: float) -> Tensor:
    """Return the weight that base and adapter make together."""
    return factors.residual.double() + scaling * product(factors.b, factors.a)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def widest_angle(rows: Tensor, others: Tensor) -> float:
    """Return the largest principal angle between two spans, in radians; rows are orthonormal."""
    rows, others = rows.double(), others.double()
    # By its sine, which keeps the digits of a small angle.
    left_over = others - others @ rows.T @ rows
    return math.asin(min(1.0, float(torch.linalg.matrix_norm(left_over, 2))))


def first_step(gradient: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return M: one step of plain gradient descent moves the product by -lr M."""
    gradient, a, b = gradient.double(), a.double(), b.double()
    return scaling**2 * (gradient @ a.T @ a + b @ b.T @ gradient)


def shortfall(moved: Tensor, gradient: Tensor) -> float:
    """Return the distance of the gradient from the nearest multiple of the first step."""
    moved, gradient = moved.double(), gradient.double()
    length = float((moved * moved).sum())
    best = float((moved * gradient).sum()) / length if length > 0 else 0.0
    return float((best * moved - gradient).norm())


def tail(gradient: Tensor, rank: int) -> float:
    """Return what no matrix of that rank can have of the gradient."""
    values = torch.linalg.svdvals(gradient.double())
    return math.sqrt(sum(float(value) ** 2 for value in values[rank:]))


def lora_ga(weight, gradient, rank, scaling, direction, scale, gamma):
    """Return A and B, each up to the sign of its vectors, without ``random``."""
    left, _, right = torch.linalg.svd(gradient.double())
    taken = {
        "ArB2r": ([*range(rank)], [*range(rank, 2 * rank)]),
        "A2rBr": ([*range(rank, 2 * rank)], [*range(rank)]),
        "ArBr": ([2 * i + 1 for i in range(rank)], [2 * i for i in range(rank)]),
    }[direction]
    out_features = weight.shape[0]
    if scale == "stable":
        factor = out_features**0.25 / gamma**0.5
    elif scale == "gd":
        factor = 1 / scaling
    elif scale == "unit":
        factor = 1.0
    else:
        values = torch.linalg.svdvals(weight.double())[:rank].tolist()
        factor = sum(math.sqrt(value / scaling) for value in values) / rank
    a = torch.stack([factor * right[i] for i in taken[0]])
    b = torch.stack([factor * left[:, i] for i in taken[1]], dim=1)
    return a, b


def redistributed(ratios, ranks, rho, groups):
    """Return the ranks: one rank of the budget after the other, each to the best component that is left."""
    followed = {**{name: name for name in ratios}, **{name: own for own, rest in groups.items() for name in rest}}
    limit = {}
    for owner in ratios:
        limit[owner] = max(round(ranks[name] * rho) for name, own in followed.items() if own == owner)
    result = dict.fromkeys(followed, 0)
    for _ in range(sum(ranks.values())):
        best, chosen = 0.0, None
        for name, owner in followed.items():
            given = result[name]
            if given < min(limit[owner], len(ratios[owner])) and float(ratios[owner][given]) > best:
                best, chosen = float(ratios[owner][given]), name
        if chosen is None:
            break
        result[chosen] += 1
    return result
