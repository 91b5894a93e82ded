r"""Refresh learning: unlearn a batch a little, then learn it.

With the weights :math:`\theta` (tensor by tensor), the loss :math:`L` of a batch and the importance :math:`F \ge 0` of
each weight for earlier tasks, the batch is unlearned by

.. math::

    \theta \leftarrow \theta + \delta\,\frac{\lVert\theta\rVert_2\, u / \lVert u\rVert_2 + \sigma\,\epsilon}
    {1 + \mu F}, \qquad u = \sum_{j=1}^{J} \eta\, \nabla L\Bigl(\theta + \textstyle\sum_{i<j} u_i\Bigr), \qquad
    \epsilon \sim \mathcal N(0, 1)

and an ordinary training step on the same batch follows. :math:`u` is how far :math:`J` steps of gradient ascent with
the rate :math:`\eta` go, :math:`u_i` the i-th of them; :math:`\delta` (``strength``) has no unit: the share of a
tensor's length that it moves. :math:`\sigma` (``noise``) has the unit of the weights, :math:`\mu` (``damping``) that of
:math:`1/F`. At the end of a task, :math:`F \leftarrow \tau F + F_{\text{task}}` (``decay`` :math:`\tau`), with
:math:`F_{\text{task}}` the mean over its samples of the squared gradient times the likelihood of the target.

Released code of arXiv 2403.13249 (models/derpp.py of joey-wang123/CL-refresh-learning at 2484f2a; read, not run), with
:math:`J=1`: the rate :math:`\eta` then cancels, but for what counts as no gradient. There :math:`u` is the difference
of two copies of the weights, so that an ascent that is lost in their rounding is none. Here :math:`u` is exact, and
none if it is shorter than the rounding of its tensor: a bias in front of a batch norm has no gradient but rounding,
which would be scaled up to the length of the bias. That code unlearns after the step, a public port of it (read)
before, as the paper's abstract and as here. :math:`J>1` is ours; so is that a tensor whose gradient is not finite is
not moved along it.

The paper's :math:`\theta \leftarrow \theta + \gamma F^{-1}\nabla L + \mathcal N(0, 2\gamma F^{-1})` (from memory:
unverified) is not offered: it has no value in the first task, where :math:`F = 0`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["add_importance", "ascend", "refresh_weights"]


@torch.no_grad()
def ascend(walked: Sequence[Tensor], gradients: Sequence[Tensor], learning_rate: float) -> list[Tensor]:
    """Take one step of gradient ascent away from the weights.

    Args:
        walked: How far the steps before went; empty in the first.
        gradients: The loss's gradient at the weights plus ``walked``, of any shapes.
        learning_rate: Length of the step for a gradient of length 1.

    Returns:
        How far all steps went, in the shapes of the gradients, in float32 or wider. Kept apart from the weights: added
        to these, a small step would be lost in rounding.
    """
    if not gradients:
        return []
    steps = torch._foreach_mul([gradient.to(_wide(gradient)) for gradient in gradients], learning_rate)
    return list(torch._foreach_add(list(walked), steps) if walked else steps)


@torch.no_grad()
def refresh_weights(
    weights: Sequence[Tensor],
    walked: Sequence[Tensor],
    importance: Sequence[Tensor | None],
    strength: float,
    noise: float,
    damping: float,
    generator: torch.Generator | None = None,
) -> None:
    """Move the weights away from a batch, in place.

    Half precisions are computed in float32, and rounded once. Nothing is read back from an accelerator.

    Args:
        weights: Dense real tensors of any shapes.
        walked: How far gradient ascent went from them (:func:`ascend`), in the same order and of the same shapes.
        importance: Of each weight for earlier tasks, from 0 on; ``None`` where none is known, which counts as 0.
        strength: Share of a tensor's length that it moves, from 0 on.
        noise: Standard deviation of what is added to the direction, before the strength.
        damping: How much importance slows a weight down.
        generator: Where noise is drawn from, on the weights' device; it is not used with ``noise=0``.
    """
    # Lists for the fused operations, of tensors of one device and one precision.
    groups: dict[tuple[torch.device, torch.dtype], list[_Refreshed]] = {}
    for weight, step, important in zip(weights, walked, importance, strict=True):
        wide = _wide(weight)
        refreshed = _Refreshed(weight, weight.to(wide), step.to(wide), important)
        groups.setdefault((weight.device, wide), []).append(refreshed)
    for group in groups.values():
        _refresh_group(group, strength, noise, damping, generator)


@torch.no_grad()
def add_importance(importance: Mapping[str, Tensor], of_task: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """Return ``decay * importance + of_task``, name by name; a name that one of them lacks counts as 0 there.

    Args:
        importance: That of the tasks before.
        of_task: That of the task that has ended.
        decay: Share of the old importance that is kept.
    """
    total = {name: decay * value for name, value in importance.items()}
    return {**total, **{name: total[name] + value if name in total else value for name, value in of_task.items()}}


class _Refreshed(NamedTuple):
    """A tensor that is refreshed; its values are the tensor itself where that is wide enough to compute in."""

    weight: Tensor
    value: Tensor
    walked: Tensor
    importance: Tensor | None


def _refresh_group(
    group: Sequence[_Refreshed], strength: float, noise: float, damping: float, generator: torch.Generator | None
) -> None:
    """Move tensors of one device and one precision."""
    values = [entry.value for entry in group]
    ways = [entry.walked for entry in group]
    sizes, lengths = torch.stack(torch._foreach_norm(values)), torch.stack(torch._foreach_norm(ways))
    moves = torch.isfinite(lengths) & (lengths > torch.finfo(values[0].dtype).eps * sizes)
    directions = torch._foreach_mul(ways, list((sizes / lengths).unbind()))
    for direction, stays in zip(directions, moves.logical_not().unbind(), strict=True):
        direction.masked_fill_(stays, 0.0)  # not a product with 0: what is not finite would stay so
    if noise:
        drawn = [torch.randn(v.shape, generator=generator, device=v.device, dtype=v.dtype) for v in values]
        torch._foreach_add_(directions, drawn, alpha=noise)
    known = [(way, entry.importance) for way, entry in zip(directions, group, strict=True)]
    slowed = [(way, important.to(way)) for way, important in known if important is not None]
    if slowed:
        slower = torch._foreach_mul([important for _, important in slowed], damping)
        torch._foreach_add_(slower, 1.0)
        torch._foreach_div_([way for way, _ in slowed], slower)
    torch._foreach_add_(values, directions, alpha=strength)
    rounded = [entry for entry in group if entry.value is not entry.weight]
    if rounded:
        torch._foreach_copy_([entry.weight for entry in rounded], [entry.value for entry in rounded])


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the precision that a tensor is computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
