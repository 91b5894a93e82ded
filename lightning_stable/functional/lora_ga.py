r"""LoRA-GA: start an adapter so that its first step goes where the full weight's would.

For a gradient :math:`G = U \Sigma V^\top` of the loss by the weight :math:`W`, both of shape (out, in), and a learning
rate :math:`\eta`, the first step of plain gradient descent on the factors moves the product by

.. math::

    \Delta(s B A) = -\eta M + O(\eta^2), \qquad M = s^2 (G A^\top A + B B^\top G)

With :math:`A` the rows :math:`k\,v_i^\top, i \in I_A` and :math:`B` the columns :math:`k\,u_i, i \in I_B`, the two sets
of :math:`r` indices being disjoint and together :math:`1 \dots 2r`, :math:`M = s^2 k^2 \sum_{i \le 2r} \sigma_i u_i
v_i^\top`: up to a factor the best that a matrix of rank :math:`2r` can do. No start of two factors of rank :math:`r`
comes nearer to :math:`G` than :math:`(\sum_{i > 2r} \sigma_i^2)^{1/2}` (Eckart and Young, since :math:`M` has rank
:math:`2r` at most). The base keeps :math:`W - s B A`, so the function is that of :math:`W`. Under an adaptive optimizer
the first step is another one, and nothing of this is promised.

Paper: LoRA-GA, arXiv 2407.05000. Directions and scales are those of the released code:

======== ============================================= ========= ===================================================
which    rows of ``a``; columns of ``b`` (from 0)      scale     factor of both
======== ============================================= ========= ===================================================
ArB2r    :math:`0 \dots r-1`; :math:`r \dots 2r-1`     stable    :math:`out^{1/4} \gamma^{-1/2}`
A2rBr    :math:`r \dots 2r-1`; :math:`0 \dots r-1`     unit      1
ArBr     odd; even                                     gd        :math:`1 / s`
random   a random split of :math:`0 \dots 2r-1`        weightS   mean of :math:`\sqrt{\sigma_i(W) / s}, i \le r`
======== ============================================= ========= ===================================================

peft's initialiser of that name multiplies :math:`B` by singular values of the gradient besides, and scales :math:`B`
alone: with a gradient of usual size :math:`B B^\top G` vanishes, and the first step is no better than a matrix of rank
:math:`r` can be. Here the released code is followed.
"""

import torch
from torch import Tensor

from lightning_stable.functional._factors import Factors, check_matrix, check_rank, shift, working_dtype
from lightning_stable.functional._low_rank import check_search, fresh_generator, leading_svd
from lightning_stable.functional._settings import check_choice, check_positive

__all__ = ["DIRECTIONS", "SCALES", "check_lora_ga", "lora_ga_factors", "lora_ga_pair"]

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weightS")


def check_lora_ga(direction: str, scale: str, gamma: float) -> None:
    """Raise ``ValueError`` unless the settings of LoRA-GA are known ones."""
    check_choice("direction", direction, DIRECTIONS)
    check_choice("scale", scale, SCALES)
    check_positive("gamma", gamma, "what scale='stable' divides by, as a root")


@torch.no_grad()
def lora_ga_factors(
    weight: Tensor,
    gradient: Tensor,
    rank: int,
    scaling: float,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    exact: bool = False,
    iterations: int = 4,
    generator: torch.Generator | None = None,
) -> Factors:
    """Start the factors from singular vectors of the gradient.

    Args:
        weight: Shape (out, in), of a floating-point dtype; not changed.
        gradient: Of the loss by the weight, averaged over the batches, of the weight's shape and any floating-point
            dtype, on the weight's device. Its length is of no effect.
        rank: Rank of the adapter, at most half the weight's smaller side.
        scaling: The adapter's factor, ``alpha / rank`` or ``alpha / sqrt(rank)``.
        direction: Which singular vectors each factor gets: ``"ArB2r"``, ``"A2rBr"``, ``"ArBr"`` or ``"random"``.
        scale: What both factors are multiplied by: ``"stable"``, ``"unit"``, ``"gd"`` or ``"weightS"``.
        gamma: Of ``scale="stable"``: a larger one starts from a smaller adapter.
        exact: Take full SVDs in place of randomised ones of ``4 * rank`` directions.
        iterations: Power iterations of a randomised SVD.
        generator: Source of its random start, and of the split of ``"random"``; ``None`` for a new one of seed 0. The
            global one is not used.

    Returns:
        Factors of float32 (float64 for a weight of float64), and the residual in the weight's dtype.

    Raises:
        ValueError: If weight and gradient are no finite floating-point matrices of one shape on one device, the
            gradient is 0 throughout, twice the rank is above the smaller side, or a setting is out of range.

    Example:
        >>> import torch
        >>> weight, gradient = torch.eye(4), torch.diag(torch.tensor([1.0, 4.0, 3.0, 2.0]))
        >>> a, b, _ = lora_ga_factors(weight, gradient, rank=1, scaling=1.0, scale="unit")
        >>> a.abs().argmax().item(), b.abs().argmax().item()  # the largest direction, and the next
        (1, 2)
    """
    a, b = lora_ga_pair(
        weight,
        gradient,
        rank,
        scaling,
        direction=direction,
        scale=scale,
        gamma=gamma,
        exact=exact,
        iterations=iterations,
        generator=generator,
    )
    return Factors(a, b, shift(weight, a, b, scaling))


@torch.no_grad()
def lora_ga_pair(
    weight: Tensor,
    gradient: Tensor,
    rank: int,
    scaling: float,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    exact: bool = False,
    iterations: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the two factors of :func:`lora_ga_factors` without the residual."""
    check_lora_ga(direction, scale, gamma)
    check_search(iterations, 0)
    check_matrix("weight", weight)
    _check_gradient(gradient, weight)
    check_rank(rank, scaling, weight, directions=2)
    generator, steps = fresh_generator(generator), None if exact else iterations
    left, right = _directions(gradient, working_dtype(weight), rank, steps, generator)
    rows, columns = _split(direction, rank, generator)
    factor = _scale(scale, weight, rank, scaling, gamma, steps, generator)
    return right[rows.to(right.device)] * factor, left[:, columns.to(left.device)] * factor


def _directions(
    gradient: Tensor, dtype: torch.dtype, rank: int, steps: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the first ``2 * rank`` singular vectors, as columns and as rows."""
    matrix = gradient.detach().to(torch.promote_types(gradient.dtype, dtype))
    # Of length about 1, since products of tiny gradients would leave the range of float32.
    matrix = (matrix / torch.stack(torch.aminmax(matrix)).abs().amax()).to(dtype)
    left, _, right = leading_svd(matrix, 2 * rank, iterations=steps, oversampling=2 * rank, generator=generator)
    return left, right


def _split(direction: str, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which of the first ``2 * rank`` singular vectors become rows of A, and which columns of B."""
    every = torch.arange(2 * rank)
    if direction == "ArBr":
        return every[1::2], every[::2]
    if direction == "random":
        every = torch.randperm(2 * rank, generator=generator, device=generator.device).cpu()
    first, second = every[:rank], every[rank:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _scale(
    scale: str,
    weight: Tensor,
    rank: int,
    scaling: float,
    gamma: float,
    steps: int | None,
    generator: torch.Generator,
) -> float:
    """Return what both factors are multiplied by."""
    if scale == "stable":
        return float(weight.shape[0] ** 0.25 / gamma**0.5)
    if scale == "gd":
        return 1.0 / scaling
    if scale == "unit":
        return 1.0
    matrix = weight.detach().to(working_dtype(weight))
    values = leading_svd(matrix, rank, iterations=steps, oversampling=3 * rank, generator=generator)[1]
    factor = float((values / scaling).sqrt().mean())
    if factor == 0:
        raise ValueError(
            "scale='weightS' takes its factor from the weight, which is 0 throughout: choose another scale."
        )
    return factor


def _check_gradient(gradient: Tensor, weight: Tensor) -> None:
    check_matrix("gradient", gradient)
    if gradient.shape != weight.shape or gradient.device != weight.device:
        raise ValueError(
            f"gradient of shape {tuple(gradient.shape)} on {gradient.device} does not fit the weight, of shape "
            f"{tuple(weight.shape)} on {weight.device}."
        )
    if not any(map(bool, torch.aminmax(gradient.detach()))):
        raise ValueError(
            "gradient is 0 throughout and has no direction. Did the batches reach this layer, and does the loss "
            "depend on it? Give more batches, or leave the layer out of the targets."
        )
