r"""Sharpness of the loss over a small box around the logits, in closed form.

For one position with logits :math:`z` over :math:`C` classes, target :math:`t` and cross-entropy :math:`f(z) = \log
\sum_c e^{z_c} - z_t` in nats,

.. math::

    \phi = 100\,\frac{\max_{|\delta_c| \le \epsilon (|z_c| + 1)} f(z + \delta) - f(z)}{1 + f(z)}

in percent; :math:`\epsilon` has no unit. Cross-entropy falls with the target's logit and rises with each other one, so
the maximum over the box is at one corner: :math:`\delta_t = -\epsilon (|z_t| + 1)` and :math:`\delta_c = \epsilon
(|z_c| + 1)` elsewhere. This closed form is ours; nothing has to be searched for. With :math:`a = \log \sum_{c \ne t}
e^{z_c} - z_t` the loss is :math:`\log(1 + e^a)`. Both it and its rise are computed from :math:`a` and from how far
:math:`a` moves, since the difference of two losses that hardly differ would have few digits left.

Asking for the sharpness on the logits of the last token, and seeing it rise before training in low precision diverges,
is from To FP8 and Back Again (arXiv 2405.18710). The form of :math:`\phi` and of the box is Keskar's sharpness (arXiv
1609.04836) carried over to logits, from memory and unverified; so are his values 1e-3 and 5e-4 of :math:`\epsilon`.
Which :math:`\epsilon` the later paper takes, and how it finds the maximum, is not known to us.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["POSITIONS", "choose_positions", "logit_sharpness", "worst_logits"]

POSITIONS = ("last", "all")


@torch.no_grad()
def worst_logits(logits: Tensor, targets: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Return the corner of the box around logits at which cross-entropy is largest.

    Args:
        logits: Scores of shape (..., C), of a floating-point dtype.
        targets: Classes of shape (...), int64 in [0, C).
        epsilon: Half the width of the box for a logit of 0; it grows by as much for each unit of magnitude.

    Returns:
        Tensor of shape (..., C), float32 or wider.

    Raises:
        ValueError: If the shapes do not fit, there is only one class, or targets are no integers.
    """
    scores = _check(logits, targets)
    room = epsilon * (scores.abs() + 1)
    own = targets.unsqueeze(-1)
    return (scores + room).scatter(-1, own, scores.gather(-1, own) - room.gather(-1, own))


@torch.no_grad()
def logit_sharpness(logits: Tensor, targets: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Return the sharpness of each position, in percent.

    Args:
        logits: Scores of shape (..., C), of a floating-point dtype.
        targets: Classes of shape (...), int64 in [0, C).
        epsilon: As in :func:`worst_logits`.

    Returns:
        Tensor of shape (...), float32 or wider, from 0 on; not a number where a logit is not finite.

    Raises:
        ValueError: If the shapes do not fit, there is only one class, or targets are no integers.
    """
    scores = _check(logits, targets)
    own = targets.unsqueeze(-1)
    others = scores.scatter(-1, own, float("-inf"))
    total, room = others.logsumexp(-1), epsilon * (scores.abs() + 1)
    margin = total - scores.gather(-1, own).squeeze(-1)
    # How far the margin moves: from the shares of the other classes, which keeps the digits of a small change.
    moved = (others.sub(total.unsqueeze(-1)).exp() * room.expm1()).sum(-1).log1p()
    # One of many units would overflow there, and has digits enough here.
    far = (others + room).logsumexp(-1) - total
    moved = torch.where(far > 1.0, far, moved) + room.gather(-1, own).squeeze(-1)
    loss = softplus(margin, threshold=50.0)
    risen = torch.where(
        moved > 1.0, softplus(margin + moved, threshold=50.0) - loss, (margin.sigmoid() * moved.expm1()).log1p()
    )
    return 100.0 * risen / (1.0 + loss)


@torch.no_grad()
def choose_positions(
    logits: Tensor, targets: Tensor, position: str = "last", ignore_index: int = -100, *, shift: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose of each sample the positions to judge, without reading a value from the device.

    Args:
        logits: Shape (N, C) of a classifier, (N, length, C) of a language model; (N, ..., C) with ``"all"``.
        targets: Classes of shape (N), (N, length) or (N, ...), of an integer dtype.
        position: ``"last"`` for the last position of a sample that has a target, ``"all"`` for each that has one.
        ignore_index: Target of positions to leave out, such as padding.
        shift: The logits at a position are of the target at the next one.

    Returns:
        Logits of shape (M, C), targets of shape (M), 0 where there is none, and whether there is one, of shape (M).

    Raises:
        ValueError: If the shapes do not fit, or targets are no integers.
    """
    _check_classes(targets)
    if logits.ndim < 2 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"Targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}: give a class "
            "for each position, the classes being the last dimension of the logits."
        )
    if shift and logits.ndim > 2:
        logits, targets = logits[:, :-1], targets[:, 1:]
    present = targets != ignore_index
    if position == "last" and logits.ndim > 2 and targets.shape[1] > 0:
        if logits.ndim != 3:
            raise ValueError(f"Logits of shape {tuple(logits.shape)} have no last position. Take position='all'.")
        places = torch.arange(targets.shape[1], device=targets.device)
        last = torch.where(present, places, 0).argmax(1)
        rows = torch.arange(len(targets), device=targets.device)
        logits, targets, present = logits[rows, last], targets[rows, last], present[rows, last]
    present = present.flatten()
    return logits.flatten(0, -2), torch.where(present, targets.flatten(), 0).long(), present


def _check_classes(targets: Tensor) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"Targets are {targets.dtype}, not numbers of classes, even where each is a whole number: they may as well "
            "be values of a regression. Give classes as integers, as by targets.long()."
        )


def _check(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logits in float32 or wider."""
    _check_classes(targets)
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"Logits of shape {tuple(logits.shape)} have no two classes in the last dimension. Give (..., C), C > 1."
        )
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"Targets of shape {tuple(targets.shape)} do not fit logits of shape {tuple(logits.shape)}.")
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
