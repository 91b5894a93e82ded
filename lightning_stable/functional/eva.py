r"""EVA: start the first factor of each adapter from the principal components of the layer's inputs.

For the inputs :math:`x_1 \dots x_N` of a layer, of shape (in), with mean :math:`\mu` and the singular value
decomposition :math:`U \Sigma V^\top` of the rows :math:`x_i - \mu`,

.. math::

    A = V_r^\top, \qquad B = 0, \qquad \rho_j = \sigma_j^2 \Big/ \sum_i \lVert x_i - \mu \rVert^2

:math:`A` of shape (r, in) has orthonormal rows; :math:`\rho_j` is the share of the inputs' variance that component
:math:`j` explains. The function is unchanged, since :math:`B` is 0. Inputs come batch by batch (``_pca.py``). Then the
budget of ranks is given to the components that explain most, over all layers: a layer of rank :math:`r` gets from 0 to
:math:`\rho\,r` of them.

Paper: EVA, arXiv 2410.07170. The rows are centred, as in its released code. What differs from that code and from peft:
a component may turn its sign without counting as moved; a batch of few rows is used and not skipped; a component that
explains nothing is given no rank; and the scaling stays constant under ``alpha / sqrt(rank)`` too.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_stable.functional._pca import (
    PCAState,
    converged,
    init_pca,
    merge_pca,
    update_pca,
    variance_ratios,
)
from lightning_stable.functional._settings import check_count, check_positive

__all__ = [
    "PCAState",
    "converged",
    "eva_alpha",
    "eva_components",
    "eva_factor",
    "init_pca",
    "merge_pca",
    "redistribute_ranks",
    "update_pca",
    "variance_ratios",
]


def eva_components(rank: int, rho: float, features: int) -> int:
    """Return how many components to follow for a layer: ``rank * rho`` rounded, at most one for each feature.

    Raises:
        ValueError: If ``rho`` is below 1 or not finite.
    """
    check_positive("rho", rho, "how many times its rank a layer may be given")
    if rho < 1:
        raise ValueError(f"rho={rho!r} is below 1: it is how many times its rank a layer may be given, 1 for no more.")
    return min(round(rank * rho), features)


def redistribute_ranks(
    ratios: Mapping[str, Tensor],
    rank: int | Mapping[str, int],
    rho: float = 2.0,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, int]:
    """Give the budget of ranks, their sum over all layers, to the components that explain most.

    Args:
        ratios: :func:`variance_ratios` of each layer whose inputs were followed.
        rank: Rank of each layer before, one number for all or one for each.
        rho: A layer gets at most ``rho`` times its rank; 1 leaves the ranks as they are.
        groups: For a layer of ``ratios`` the other layers with the same inputs: each counts with the same ratios.

    Returns:
        The rank of each layer, 0 for one to leave out. The layer followed has the largest of its group.

    Raises:
        ValueError: If a layer is in two groups or its group has no ratios, a rank is missing or out of range, or a
            ratio is not finite.

    Example:
        >>> import torch
        >>> ratios = {"q": torch.tensor([0.4, 0.05]), "up": torch.tensor([0.5, 0.45])}
        >>> redistribute_ranks(ratios, rank=1), redistribute_ranks(ratios, rank=1, groups={"q": ["k"]})
        ({'q': 0, 'up': 2}, {'q': 1, 'up': 2, 'k': 0})
    """
    followed = _owners(ratios, groups or {})
    ranks = {name: rank if isinstance(rank, int) else rank.get(name, 0) for name in followed}
    for name, value in ranks.items():
        check_count(f"rank of {name!r}", value, 1, "components")
    most = dict.fromkeys(ratios, 0)
    for name, owner in followed.items():
        most[owner] = max(most[owner], eva_components(ranks[name], rho, len(ratios[owner])))
    shares = {owner: ratios[owner][:count].tolist() for owner, count in most.items()}
    every = [(share, name) for name, owner in followed.items() for share in shares[owner]]
    if not all(share < float("inf") for share, _ in every):
        raise ValueError("A variance ratio is not finite: the inputs of its layer are not.")
    result = dict.fromkeys(followed, 0)
    # Sorting is stable: of equal shares the layer followed comes before the others of its group.
    for share, name in sorted(every, key=lambda entry: -entry[0])[: sum(ranks.values())]:
        result[name] += share > 0
    for name, owner in followed.items():
        result[owner], result[name] = max(result[owner], result[name]), min(result[owner], result[name])
    return result


@torch.no_grad()
def eva_factor(state: PCAState, rank: int, whiten: bool = False) -> Tensor:
    """Return the first factor of the adapter, shape (rank, features); the second one is 0.

    Args:
        state: The components of the layer's inputs.
        rank: Rank that the layer was given.
        whiten: Divide each component by the root of its singular value, so that components of small variance begin
            larger.

    Raises:
        ValueError: If the inputs seen do not vary in as many directions.
    """
    check_count("rank", rank, 1, "components (leave a layer of rank 0 without an adapter)")
    known = int((variance_ratios(state) > 0).sum())
    if rank > known:
        raise ValueError(
            f"rank={rank} is above {known}, the number of directions in which the {state.rows} inputs seen vary, of "
            f"{len(state.values)} followed. Give more batches, or a lower rank for this layer."
        )
    rows = state.components[:rank].clone()
    return rows / state.values[:rank].sqrt().unsqueeze(1) if whiten else rows


def eva_alpha(alpha: float, rank: int, new_rank: int, rslora: bool = False) -> float:
    """Return the ``alpha`` that keeps the adapter's scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` of rsLoRA."""
    check_count("rank", rank, 1, "components")
    check_count("new_rank", new_rank, 1, "components")
    return float(alpha * (new_rank / rank) ** (0.5 if rslora else 1.0))


def _owners(ratios: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return for each layer the one whose inputs were followed, those themselves first."""
    owners = {name: name for name in ratios}
    for owner, others in groups.items():
        if owner not in ratios:
            raise ValueError(f"groups names {owner!r}, of which there are no ratios. Name a layer of {sorted(ratios)}.")
        for name in others:
            if name in owners:
                raise ValueError(f"groups puts {name!r} beside {owner!r}, but it has ratios or a group already.")
            owners[name] = owner
    return owners
