r"""Local SGD: the workers train alone for a round, then take the mean of their weights.

With :math:`\bar\Delta = \frac1N \sum_i (s^i - x^i)`, the mean over the :math:`N` workers of how far each moved in its
round of :math:`\tau` local optimizer steps (from :math:`s^i` to :math:`x^i`), the anchor :math:`a` takes the plain step

.. math:: a \leftarrow a - \bar\Delta

:math:`a`, :math:`s`, :math:`x` and :math:`\bar\Delta` are flat tensors in the units of the weights. In a blocking round
every worker started from :math:`s^i = a`, so that :math:`a - \bar\Delta` is the mean of the workers' weights.

Local SGD: arXiv 1805.09767. The optimizer of the local steps may be any; the paper's own analysis is of plain SGD.
Delayed rounds, where :math:`\bar\Delta` is one round old, are ours for this method
(:mod:`lightning_stable.functional.co2`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["update_local_sgd"]


@torch.no_grad()
def update_local_sgd(anchor: Sequence[Tensor], delta: Sequence[Tensor]) -> None:
    """Take the mean movement of a round, in place.

    Args:
        anchor: The weights shared by all workers, one flat tensor a dtype; changed in place.
        delta: The mean movement over the workers, start minus end, of the shapes of ``anchor``.
    """
    torch._foreach_sub_(list(anchor), list(delta))
