r"""A low-rank helper beside a quantized weight, which fades until it is gone (QVGen, arXiv 2505.11497).

With the weight :math:`W` (out, in), its quantized value :math:`Q(W)` and rank :math:`r`, products see

.. math::

    W' = Q(W) + L\,\mathrm{diag}(\alpha)\,R, \qquad
    \alpha_i = 1 \;\text{for } i \le \lfloor r/2 \rfloor, \qquad
    \alpha_i = \tfrac12\bigl(1 + \cos(\pi \tau / T)\bigr) \;\text{beyond}

where :math:`L` (out, r) and :math:`R` (r, in) hold the r largest singular triplets of :math:`W - Q(W)`, taken at the
start of a phase of :math:`T` steps, and :math:`\tau` counts the steps within it. After each phase the rank is halved,
down to 1, and after the phase of rank 1 there is no helper. :math:`\alpha` has no unit, the rest that of :math:`W`.

Ranks, factors and fading are from the released code. There the helper is trained together with the weights, and the
singular values that are taken later are its own. Here it is fixed within a phase and follows the weights at the start
of the next one: our reconstruction, unverified. Nothing has to be in an optimizer, and names in checkpoints stay.
Gradients reach :math:`W` straight through, as without the helper.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._low_rank import leading_svd
from lightning_stable.functional._settings import check_count

__all__ = ["Helper", "helper_alphas", "helper_factors", "helper_matrix", "helper_ranks"]


class Helper(NamedTuple):
    """What is added to one quantized weight.

    Attributes:
        left: L, shape (out, k), with k the rank or the smaller side of the weight.
        right: R, shape (k, in).
        alphas: How much each component counts, shape (k).
    """

    left: Tensor
    right: Tensor
    alphas: Tensor


def helper_ranks(rank: int) -> list[int]:
    """Return the rank of each phase: 32, 16, 8, 4, 2, 1 from 32 on.

    Raises:
        ValueError: If ``rank`` is not a whole number from 1 on.
    """
    check_count("helper_rank", rank, 1, "singular triplets")
    ranks = [rank]
    while ranks[-1] > 1:
        ranks.append(ranks[-1] // 2)
    return ranks


def helper_alphas(rank: int, progress: float) -> list[float]:
    """Return how much each component counts, that of the largest singular value first.

    Args:
        rank: The rank of the phase.
        progress: Share of the phase that is done, from 0 to 1.

    Raises:
        ValueError: If either is out of its range.
    """
    check_count("rank", rank, 1, "singular triplets")
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress!r} is not in [0, 1]: it is the share of the phase that is done.")
    fading = (1.0 + math.cos(math.pi * progress)) / 2.0
    return [1.0 if i < rank // 2 else fading for i in range(rank)]


@torch.no_grad()
def helper_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return L and R for what quantization takes from a weight, by a full singular value decomposition.

    Waits for the device; meant for the start of a phase.

    Args:
        error: W - Q(W), shape (out, ...), taken as a matrix with a row for each entry of the first dimension.
        rank: How many singular triplets to take; with fewer there are, all of them.

    Returns:
        Shapes (out, k) and (k, in), at least float32. All zeros where the error is not finite.
    """
    matrix = error.flatten(1).to(torch.promote_types(error.dtype, torch.float32))
    if not bool(matrix.isfinite().all()):
        # A run that has diverged goes on as it would without a helper.
        matrix = torch.zeros_like(matrix)
    left, values, right = leading_svd(matrix, min(rank, *matrix.shape), iterations=None)
    return left * values, right


def helper_matrix(helper: Helper, like: Tensor) -> Tensor:
    """Return L diag(alpha) R in the shape of a weight, under autocast, too, in the precision of the factors."""
    with torch.autocast(helper.left.device.type, enabled=False):
        return ((helper.left * helper.alphas) @ helper.right).reshape(like.shape)
