r"""OrthoGrad: gradients without the part that only scales the weights, for any optimizer.

Use it when a model fits all its training samples long before it generalises (grokking), or where
:class:`~lightning_stable.callbacks.SoftmaxCollapseMonitor` shows samples that teach nothing any more. Where the loss
of training is far from 0, or weight decay balances the length of the weights, do not expect gains. Cost: some passes
over weights and gradients for each optimizer step, no memory.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import OrthoGrad
    >>> trainer = Trainer(callbacks=[OrthoGrad()], logger=False, enable_checkpointing=False)
"""

from typing_extensions import override

from lightning_stable.callbacks._gradients import GradientTransform, OptimizerStep
from lightning_stable.functional.orthograd import orthogonal_gradients

__all__ = ["OrthoGrad"]


class OrthoGrad(GradientTransform):
    r"""Step orthogonally to the weights (arXiv 2501.04697).

    .. math:: g \leftarrow g_\perp \|g\| / \|g_\perp\|, \qquad g_\perp = g - \frac{\langle w, g\rangle}{\|w\|^2}\, w

    for each tensor :math:`w` of weights that trains, biases and norms' gains too, before the optimizer sees the
    gradient. The gradient is the one an optimizer step starts from: accumulated, unscaled, synchronised, not yet
    clipped; clipping acts on the result, which has the same norm. A tensor of one entry has no direction beside its
    own and does not move. Weight decay of the optimizer acts as ever.

    Raises:
        ValueError: At the start of a fit for a sharded strategy or LBFGS; in training for sparse gradients.
    """

    def __init__(self) -> None:
        super().__init__()

    @override
    def _transform(self, step: OptimizerStep) -> None:
        orthogonal_gradients(step.gradients, list(step.parameters.values()))
