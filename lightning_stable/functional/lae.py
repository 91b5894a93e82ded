r"""LAE (learning, accumulation, ensemble): adapters that learn, a slow copy of them, and a prediction by both.

With the adapters' weights :math:`\theta_t` after step :math:`t` (online) and their copy :math:`\bar\theta` (offline),
which begins as :math:`\theta` where the first task ends,

.. math:: \bar\theta \leftarrow \beta\bar\theta + (1 - \beta)\,\theta_t

and class :math:`c` of a sample is given the score

.. math:: s_c = \max\bigl(\mathrm{softmax}(z)_c,\; \mathrm{softmax}(\bar z)_c\bigr)

with :math:`z`, :math:`\bar z` the logits with the online and the offline adapters and all other weights the same.
:math:`\beta` (``decay``) and :math:`s` have no unit; scores of a sample add up to between 1 and 2. Their logarithms are
returned, as logits: a softmax over them divides the scores by their sum, and the largest stays the largest.

arXiv 2303.10070, and its released code (read, not run): :math:`\beta = 0.9999`, one update a training step. Adapters in
half precision have a copy in float32 here, where a step of one ten-thousandth is not lost in rounding (ours).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_stable.functional.ema import lerp_shadow

__all__ = ["accumulate", "ensemble_logits", "init_offline"]


@torch.no_grad()
def init_offline(online: Sequence[Tensor]) -> list[Tensor]:
    """Begin the offline copy at the present values, in float32 or wider.

    Args:
        online: Floating-point weights, of any shapes.
    """
    return [tensor.detach().to(dtype=_wide(tensor), copy=True) for tensor in online]


def accumulate(offline: Sequence[Tensor], online: Sequence[Tensor], decay: float) -> None:
    """Take the online weights into the offline copy after a step, in place.

    Args:
        offline: The copy.
        online: The weights, in its order.
        decay: Share of the copy that is kept, in [0, 1).
    """
    lerp_shadow(offline, online, 1.0 - decay)


def ensemble_logits(online: Tensor, offline: Tensor) -> Tensor:
    """Return the logarithm of the larger of both probabilities, for each class.

    Args:
        online: Logits of shape (..., classes).
        offline: Logits of the same shape.

    Returns:
        Of the shape and the precision of ``online``; computed in float32 or wider. A class that both exclude by a logit
        of minus infinity stays excluded.
    """
    surer = torch.maximum(
        torch.log_softmax(online.to(_wide(online)), -1), torch.log_softmax(offline.to(_wide(online)), -1)
    )
    return surer.to(online.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the precision that a tensor is computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
