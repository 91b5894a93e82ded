r"""Robust aggregation: one gradient out of those of several workers, of which some may be faulty.

With :math:`g_1, \dots, g_n` the workers' gradients as vectors and :math:`f` the number of faulty ones to tolerate:

* ``median``: the median of each coordinate, the mean of the middle two if :math:`n` is even (arXiv 1803.01498).
* ``trimmed_mean``: the mean of each coordinate without its :math:`f` lowest and :math:`f` highest (arXiv 1803.01498).
* ``krum``: the mean of the ``krum_m`` gradients with the lowest scores
  :math:`s_i = \sum_{j \in N_i} \|g_i - g_j\|^2`, :math:`N_i` the :math:`n - f - 2` others nearest to :math:`g_i`
  (arXiv 1703.02757; 1 is Krum, more is Multi-Krum). It needs :math:`n \ge 2f + 3`.
* ``nna``: each :math:`g_i` becomes the mean of the :math:`n - f` gradients nearest to it, itself among them, and
  another rule follows (nearest-neighbour mixing, arXiv 2302.01772).
* ``geometric_median``: :math:`\arg\min_z \sum_i \|z - g_i\|` by smoothed Weiszfeld steps (arXiv 1912.13445).
* ``flag``: with :math:`u_i = g_i / \|g_i\|`, the subspace :math:`Y` of ``flag_rank`` dimensions that minimises
  :math:`\sum_i \sqrt{1 - \|Y^\top u_i\|^2}`, by reweighted singular value decompositions; then
  :math:`\mathrm{median}_i \|g_i\| \cdot \frac1n \sum_i Y Y^\top u_i` (Flag Aggregator, arXiv 2302.05865).

Every rule but the two by coordinate puts out a combination of the gradients, whose coefficients follow from the Gram
matrix :math:`G_{ij} = g_i^\top g_j` alone. So they need no gradient in one place: pieces of all gradients give pieces
of :math:`G`, which add up, and each piece of the result is made of the same piece of the gradients (our derivation).

A worker whose gradient is not finite is left out, and counts as one of the :math:`f`: the rest is aggregated with
:math:`n - 1` workers and :math:`f - 1`. Every condition on :math:`n` and :math:`f` above then still holds.

Differences from the sources: the released code of the Flag Aggregator (read) puts out
:math:`\frac1r \sum_i Y Y^\top u_i`, whose length says nothing of the gradients'; ours is scaled to a mean over workers
and to the median length, so that a learning rate keeps its meaning. It starts from a random subspace, ours from equal
weights; its columns of pairwise differences are left out, being off by default. How the paper scales its result, and
its choice of the rank, are unverified. The papers' proofs were not checked.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._robust_weights import (
    flag_weights,
    geometric_median_weights,
    krum_weights,
    nearest_neighbours,
)
from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional._sorting import sort_rows

__all__ = [
    "AGGREGATORS",
    "RobustPlan",
    "RobustRule",
    "aggregate",
    "apply_plan",
    "check_rule",
    "check_workers",
    "finite_workers",
    "gram_matrix",
    "needs_pairs",
    "plan_aggregation",
]

AGGREGATORS = ("flag", "median", "krum", "nna", "trimmed_mean", "geometric_median")
_AFTER_MIXING = ("trimmed_mean", "median", "krum", "geometric_median")

# Numbers that are worked on at once: few enough to stay in a processor's cache, and to keep copies small.
_CHUNK = 1 << 18


class RobustRule(NamedTuple):
    """What to aggregate by.

    Attributes:
        aggregator: One of :data:`AGGREGATORS`.
        f: How many faulty workers to tolerate, from 0 on.
        krum_m: How many gradients ``krum`` averages.
        flag_rank: Dimensions of the subspace of ``flag``; ``None``: half of the workers, rounded down, and one more.
        flag_iterations: Reweighted decompositions of ``flag``.
        nna_rule: What follows the mixing of ``nna``.
    """

    aggregator: str = "nna"
    f: int = 1
    krum_m: int = 1
    flag_rank: int | None = None
    flag_iterations: int = 4
    nna_rule: str = "trimmed_mean"


class RobustPlan(NamedTuple):
    """How to make a piece of the result of the same piece of each gradient.

    Attributes:
        rows: The workers that count, in ascending order.
        mixing: What they are multiplied by first, (k, rows), in float64; ``None``: the identity.
        trim: How many of the lowest, and of the highest, of the k numbers of a coordinate are left out of their mean.
    """

    rows: list[int]
    mixing: Tensor | None
    trim: int


def check_rule(rule: RobustRule) -> None:
    """Raise ``ValueError`` for a setting that is wrong whatever the number of workers."""
    check_choice("aggregator", rule.aggregator, AGGREGATORS)
    check_choice("nna_rule", rule.nna_rule, _AFTER_MIXING)
    check_count("f", rule.f, 0, "faulty workers")
    check_count("krum_m", rule.krum_m, 1, "gradients")
    check_count("flag_iterations", rule.flag_iterations, 1, "decompositions")
    if rule.flag_rank is not None:
        check_count("flag_rank", rule.flag_rank, 1, "dimensions")


def check_workers(rule: RobustRule, workers: int) -> None:
    """Raise ``ValueError`` for settings that do not fit the number of workers."""
    if workers <= 2 * rule.f:
        raise ValueError(
            f"f={rule.f} faulty workers of {workers} are half or more, which no rule can tell from the rest. Use at "
            f"least {2 * rule.f + 1} workers, or f={(workers - 1) // 2} at most."
        )
    krum = rule.aggregator == "krum" or (rule.aggregator == "nna" and rule.nna_rule == "krum")
    if krum and workers < 2 * rule.f + 3:
        raise ValueError(
            f"krum with f={rule.f} needs at least 2 f + 3 = {2 * rule.f + 3} workers, and there are {workers}. Take "
            "another rule, such as 'median', more workers or a smaller f."
        )
    if krum and rule.krum_m > workers - rule.f - 2:
        raise ValueError(
            f"krum_m={rule.krum_m} gradients are too many for {workers} workers and f={rule.f}: krum averages "
            f"{workers - rule.f - 2} at most, that is workers - f - 2."
        )
    if rule.aggregator == "flag" and rule.flag_rank is not None and rule.flag_rank > workers:
        raise ValueError(f"flag_rank={rule.flag_rank} is above the number of workers, which is {workers}.")


@torch.no_grad()
def gram_matrix(vectors: Tensor, *, pairs: bool = True) -> Tensor:
    """Return the inner products of gradients, or of the same piece of each.

    Args:
        vectors: (n, d), in any floating-point precision.
        pairs: Whether those of different gradients are wanted; without, they are zero.

    Returns:
        (n, n) in float64, on the same device: in it, the distance of two gradients that are nearly equal is not lost.
    """
    workers, length = vectors.shape
    gram = vectors.new_zeros(workers, workers, dtype=torch.float64)
    for part in torch.split(vectors, max(1, _CHUNK // workers), dim=1) if length else ():
        wide = part.double()
        gram += wide @ wide.T if pairs else torch.diag(wide.square().sum(1))
    return gram


def needs_pairs(rule: RobustRule) -> bool:
    """Tell whether a rule reads inner products of different gradients."""
    return rule.aggregator not in ("median", "trimmed_mean")


def finite_workers(gram: Tensor) -> list[int]:
    """Return which workers have a finite gradient, by their Gram matrix (n, n)."""
    # With room above: sums of a few entries have to be finite, too.
    return torch.isfinite(16 * gram.diagonal()).nonzero().flatten().tolist()


def plan_aggregation(gram: Tensor, rule: RobustRule) -> RobustPlan:
    """Return how to aggregate gradients with this Gram matrix.

    Args:
        gram: (n, n) in float64, on the CPU.
        rule: Fits n workers.

    Raises:
        ValueError: If more than ``rule.f`` gradients are not finite.
    """
    rows = finite_workers(gram)
    lost = len(gram) - len(rows)
    if lost > rule.f:
        raise ValueError(f"{lost} of {len(gram)} gradients are not finite, which is more than f={rule.f}.")
    mixing, trim = _mixing(rule.aggregator, gram[rows][:, rows], rule.f - lost, rule)
    return RobustPlan(rows, mixing, trim)


@torch.no_grad()
def apply_plan(vectors: Tensor, plan: RobustPlan) -> Tensor:
    """Return the aggregate of gradients, or of the same piece of each.

    Args:
        vectors: (n, d). Rows that the plan leaves out may hold anything.
        plan: From the Gram matrix of the whole gradients.

    Returns:
        (d,), in the precision of ``vectors``; computed in float32 at least.
    """
    result = vectors.new_empty(vectors.shape[1])
    wide = torch.promote_types(vectors.dtype, torch.float32)
    mixing = None if plan.mixing is None else plan.mixing.to(vectors.device, wide)
    rows = torch.tensor(plan.rows, device=vectors.device)
    size = max(1, _CHUNK // len(vectors))
    for part, out in zip(torch.split(vectors, size, dim=1), torch.split(result, size), strict=True):
        # Selected, not multiplied by zero: what is not finite stays so.
        kept = part.index_select(0, rows).to(wide)
        mixed = kept if mixing is None else mixing @ kept
        if plan.trim:
            mixed = torch.stack(sort_rows(mixed.unbind(0))[plan.trim : len(mixed) - plan.trim])
        # Divided first, which is exact for two: the mean of two largest numbers is not infinite.
        out.copy_(mixed.div(len(mixed)).sum(0))
    return result


def aggregate(vectors: Tensor, rule: RobustRule) -> Tensor:
    """Return the robust aggregate of gradients that are in one place.

    Args:
        vectors: (n, d), a row for each worker.
        rule: What to aggregate by.

    Returns:
        (d,)

    Raises:
        ValueError: If the rule does not fit n workers, or more than ``rule.f`` gradients are not finite.
    """
    check_rule(rule)
    check_workers(rule, len(vectors))
    return apply_plan(vectors, plan_aggregation(gram_matrix(vectors, pairs=needs_pairs(rule)).cpu(), rule))


def _mixing(aggregator: str, gram: Tensor, f: int, rule: RobustRule) -> tuple[Tensor | None, int]:
    """Return what gradients are multiplied by, (k, n) or nothing, and how many of the k are trimmed at either side."""
    workers = len(gram)
    if aggregator == "median":
        return None, (workers - 1) // 2
    if aggregator == "trimmed_mean":
        return None, f
    if aggregator == "nna":
        neighbours = nearest_neighbours(gram, f)
        after, trim = _mixing(rule.nna_rule, neighbours @ gram @ neighbours.T, f, rule)
        return neighbours if after is None else after @ neighbours, trim
    if aggregator == "krum":
        return krum_weights(gram, f, rule.krum_m)[None], 0
    if aggregator == "flag":
        return flag_weights(gram, rule.flag_rank or workers // 2 + 1, rule.flag_iterations)[None], 0
    return geometric_median_weights(gram)[None], 0
