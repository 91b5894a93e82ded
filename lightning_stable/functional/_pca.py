r"""Principal components of rows that come batch by batch, in memory that does not grow with the number of batches.

With :math:`n` rows seen, of mean :math:`\mu` and centred components :math:`\Sigma V^\top`, and :math:`m` new rows
:math:`X` of shape (m, features) and of mean :math:`\nu`, the new components are those of the rows

.. math::

    \bigl[\, \Sigma V^\top;\; X - \nu;\; \sqrt{n m / (n + m)}\,(\nu - \mu) \,\bigr]

of which as many are kept as before; what is dropped is lost, so the result is near, but not, that of all rows at once.
It is the step of scikit-learn's ``IncrementalPCA``. A search for the leading components begins at those known, so that
two power iterations are enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional._low_rank import check_search, leading_svd
from lightning_stable.functional._settings import check_count, check_positive

__all__ = ["PCAState", "converged", "init_pca", "merge_pca", "update_pca", "variance_ratios"]


class PCAState(NamedTuple):
    """Principal components of the rows seen so far, in memory that does not grow with them.

    Attributes:
        mean: Mean of the rows, shape (features).
        components: Orthonormal rows, the one that explains most first, shape (components, features); 0 in those that
            too few rows have been seen for.
        values: Singular values of the centred rows, shape (components).
        spread: Sum of the squared distances of all rows from their mean, shape ().
        rows: Number of rows seen.
    """

    mean: Tensor
    components: Tensor
    values: Tensor
    spread: Tensor
    rows: int


def init_pca(
    features: int,
    components: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> PCAState:
    """Start with no rows seen.

    Args:
        features: Length of a row.
        components: Principal components to follow, at most ``features``.
        device: Where the state lives.
        dtype: float32 or float64.

    Raises:
        ValueError: If there are more components than features, or a setting is out of range.
    """
    check_count("features", features, 1, "features")
    check_count("components", components, 1, "components")
    if components > features:
        raise ValueError(f"components={components} is above features={features}: rows of {features} have no more.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype={dtype} is not float32 or float64: singular values need their digits.")
    empty = torch.zeros(components, features, device=device, dtype=dtype)
    return PCAState(empty[0].clone(), empty, empty[:, 0].clone(), empty[0, 0].clone(), 0)


@torch.no_grad()
def update_pca(
    state: PCAState,
    rows: Tensor,
    *,
    iterations: int | None = 2,
    oversampling: int = 8,
    generator: torch.Generator | None = None,
) -> PCAState:
    """Return the state after more rows; the one given is not changed.

    Args:
        state: The components so far.
        rows: New rows, shape (..., features), of a floating-point dtype, on any device; none is allowed.
        iterations: Power iterations of the randomised SVD, twice as many for the first rows; ``None`` for a full SVD.
        oversampling: Directions that the search looks for beyond the components.
        generator: Source of their random start; ``None`` for a new one of seed 0. The global one is not used.

    Raises:
        ValueError: If rows are of another length than the mean or not finite, or a setting is out of range.
    """
    check_search(iterations, oversampling)
    features = len(state.mean)
    if rows.ndim == 0 or rows.shape[-1] != features or not rows.is_floating_point():
        raise ValueError(
            f"rows of shape {tuple(rows.shape)} and {rows.dtype} are not floating-point rows of {features} features."
        )
    batch = rows.detach().reshape(-1, features)
    if len(batch) == 0:
        return state
    stack, body = _stack(state, len(batch))
    body.copy_(batch)
    mean = body.mean(0)
    # A mean is not finite where any of its values is not.
    if not bool(mean.isfinite().all()):
        raise ValueError("rows hold values that are not finite: the inputs of the layer overflow or are not a number.")
    spread = body.sub_(mean).norm().square()
    steps = iterations if iterations is None or state.rows else 2 * iterations
    return _joined(state, stack, mean, spread, len(batch), steps, oversampling, generator)


@torch.no_grad()
def merge_pca(left: PCAState, right: PCAState) -> PCAState:
    """Return the state of the rows of both, such as those of two processes, with as many components as ``left``.

    Raises:
        ValueError: If the two are of rows of other lengths.
    """
    if left.mean.shape != right.mean.shape:
        raise ValueError(f"The states are of rows of {len(left.mean)} and of {len(right.mean)} features.")
    if right.rows == 0:
        return left
    stack, body = _stack(left, len(right.values))
    body.copy_(right.values.unsqueeze(1) * right.components)
    return _joined(left, stack, right.mean.to(left.mean), right.spread.to(left.mean), right.rows, None, 0, None)


@torch.no_grad()
def variance_ratios(state: PCAState) -> Tensor:
    """Return the share of the rows' variance that each component explains, shape (components), 0 for mere rounding."""
    limit = state.values[0] * max(state.components.shape) * torch.finfo(state.values.dtype).eps
    return torch.where(state.values > limit, state.values.square() / state.spread, 0.0)


def converged(before: PCAState, after: PCAState, tau: float = 0.99) -> Tensor:
    """Return which components point where they did: boolean, shape (components).

    A layer is done once those that it is given a rank for are all so.

    Args:
        before: The state before rows were seen.
        after: The state after.
        tau: Least cosine between a component before and after, whatever its sign, in (0, 1].

    Raises:
        ValueError: If ``tau`` is not in (0, 1].
    """
    check_positive("tau", tau, "the least cosine between a component before and after")
    if tau > 1:
        raise ValueError(f"tau={tau!r} is above 1, and no cosine is. Usual is 0.99.")
    return (
        (before.components * after.components).sum(1).abs() >= tau
        if before.rows
        else torch.zeros_like(after.values, dtype=torch.bool)
    )


def _stack(state: PCAState, rows: int) -> tuple[Tensor, Tensor]:
    """Return room for the components known, new rows and the step of the mean; and the part for the new rows."""
    known = len(state.values) if state.rows else 0
    stack = state.components.new_empty(known + rows + 1, len(state.mean))
    torch.mul(state.values[:known].unsqueeze(1), state.components[:known], out=stack[:known])
    return stack, stack[known:-1]


def _joined(
    state: PCAState,
    stack: Tensor,
    mean: Tensor,
    spread: Tensor,
    rows: int,
    iterations: int | None,
    oversampling: int,
    generator: torch.Generator | None,
) -> PCAState:
    """Return the state with what stands in the stack; mean, spread and number are those of the new rows."""
    total, step = state.rows + rows, mean - state.mean
    share = rows / total
    torch.mul(step, (state.rows * share) ** 0.5, out=stack[-1])
    kept = len(state.values)
    found = min(kept, *stack.shape)
    _, values, right = leading_svd(
        stack,
        found,
        iterations=iterations,
        oversampling=oversampling,
        generator=generator,
        start=state.components if state.rows else None,
    )
    components, singular = torch.zeros_like(state.components), torch.zeros_like(state.values)
    components[:found], singular[:found] = right, values
    spread = state.spread + spread + state.rows * share * step.square().sum()
    return PCAState(state.mean + share * step, components, singular, spread, total)
