r"""StableMax: a softmax whose exponential grows linearly, and cross-entropy with it.

.. math::

    s(x) = \begin{cases} x + 1 & x \ge 0 \\ 1 / (1 - x) & x < 0 \end{cases}, \qquad
    p_i = \frac{s(x_i)}{\sum_j s(x_j)}, \qquad \log s(x) = \operatorname{sign}(x)\,\log(1 + |x|)

for logits :math:`x` (no unit) over one dimension (arXiv 2501.04697). A large logit absorbs the others in
floating point far later than with a softmax (:mod:`lightning_stable.functional.softmax_collapse`): in float32 where its
:math:`s` is about :math:`2^{24}` times the sum of the others. Give logits in
float64 where training goes on at a loss near 0. The probabilities are the softmax of :math:`\log s`, whose
derivative is :math:`1 / (1 + |x|)`, 1 at 0.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["StableMaxCrossEntropyLoss", "log_stablemax", "stablemax"]

_REDUCTIONS = ("mean", "sum", "none")


def log_stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Return the logarithm of :func:`stablemax`, of the shape of ``logits``, in float32 or wider."""
    return functional.log_softmax(_log_s(logits), dim=dim)


def stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    """Return probabilities that add up to 1 over ``dim``, of the shape of ``logits``, in float32 or wider.

    Args:
        logits: Floating-point scores.
        dim: The dimension of the classes.
    """
    return functional.softmax(_log_s(logits), dim=dim)


class StableMaxCrossEntropyLoss(nn.Module):
    """Cross-entropy of :func:`stablemax`, with the arguments and the inputs of ``torch.nn.CrossEntropyLoss``.

    Logits are of shape (C), (N, C) or (N, C, d1, …), targets class indices of the same shape without C or
    probabilities of the same shape. The loss is in float32 or wider.

    Args:
        weight: Weight of each class, of shape (C).
        ignore_index: Class index whose samples count for nothing.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].

    Raises:
        ValueError: If ``reduction`` or ``label_smoothing`` is not possible.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown. Choose 'mean', 'sum' or 'none'.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing!r} is not in [0, 1]. 0 is no smoothing.")
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss: one number, or one a sample with ``reduction="none"``."""
        logarithms = _log_s(logits)
        # The softmax inside is over log s(x), so that this is cross-entropy of stablemax with all its options.
        return functional.cross_entropy(
            logarithms,
            target,
            weight=None if self.weight is None else self.weight.to(logarithms.dtype),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def _log_s(logits: Tensor) -> Tensor:
    """Return log s, in float32 or wider."""
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    # Each side sees its own half only, so that the derivative at 0 is 1 and not that of a sign.
    positive = wide >= 0
    above, below = torch.where(positive, wide, 0), torch.where(positive, 0, wide)
    return torch.where(positive, torch.log1p(above), -torch.log1p(-below))
