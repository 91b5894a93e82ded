r"""L2 anchor: hold the weights near where the last task left them, for any module and optimizer.

Use it as the first thing to try when tasks follow each other and no old samples may be kept, above all from a
pretrained model. It holds all weights alike; :class:`~lightning_stable.callbacks.EWC` holds those most that the old
tasks need. Not for tasks of new classes with one head: keep samples there. Cost: one copy of the weights that are held,
and one fused pass over them for each optimizer step.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import L2Anchor
    >>> trainer = Trainer(callbacks=[L2Anchor(lam=0.1)], logger=False, enable_checkpointing=False)
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_stable.callbacks._anchor import WeightAnchor
from lightning_stable.callbacks._gradients import OptimizerStep

__all__ = ["L2Anchor"]


class L2Anchor(WeightAnchor):
    r"""Penalise the squared distance to the weights that the last task ended with (arXiv 2203.17269).

    .. math:: L \leftarrow L + \lambda \sum_i (\theta_i - \theta^*_i)^2

    from the first switch of tasks on. The penalty reaches the optimizer as its gradient
    :math:`2\lambda(\theta - \theta^*)`, which is added to the gradient that an optimizer step starts from:
    accumulated, unscaled, synchronised, not yet clipped. So it counts once a step, whatever is accumulated, and is not
    in the loss that the module logs. At the next switch the anchor is replaced: only the last one is kept, in which
    the earlier tasks have their share.

    The task is what :meth:`start_task` said, or the number of ``task_steps`` that have passed, or the datamodule's
    ``current_task``, or the number of fits of the module. Logs ``l2_anchor/penalty``, the penalty with its weight,
    every ``log_every_n_steps`` steps; several optimizers log under names that end in ``/0``, ``/1`` and so on.

    Args:
        lam: Weight :math:`\lambda` of the penalty; 0 switches the callback off.
        parameters: Patterns over parameter names, such as ``["backbone.*"]``: those that match one are held. ``None``
            for all that train. What is frozen at the switch is held from where it begins to train.
        log_every_n_steps: Optimizer steps from one log to the next.
        task_steps: Optimizer steps after which tasks 1, 2, ... begin, in a single fit over all tasks.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy, LBFGS, or a
            pattern that matches no parameter; in training for sparse gradients.
    """

    log_name = "l2_anchor"

    def __init__(
        self,
        lam: float = 0.1,
        parameters: Sequence[str] | None = None,
        log_every_n_steps: int = 50,
        task_steps: list[int] | None = None,
    ) -> None:
        super().__init__(lam=lam, parameters=parameters, log_every_n_steps=log_every_n_steps, task_steps=task_steps)
        # Those that were frozen at the switch: no copy of them is needed as long as they are.
        self._frozen: set[str] = set()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "frozen": sorted(self._frozen)}

    @override
    def reset(self) -> None:
        super().reset()
        self._frozen = set()

    # ------------------------------------------------------------------ helpers

    @override
    def _take_over(self, state: dict[str, Any]) -> None:
        super()._take_over(state)
        self._frozen = set(state["frozen"])

    @override
    def _end_task(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        selected = self._selected(pl_module)
        self._anchor = {name: value.detach().clone() for name, value in selected.items() if value.requires_grad}
        self._frozen = selected.keys() - self._anchor.keys()

    @override
    def _transform(self, step: OptimizerStep) -> None:
        # At its first step a weight that was frozen is still what it was at the switch.
        for name in [name for name in step.parameters if name in self._frozen]:
            self._anchor[name] = step.parameters[name].detach().clone()
            self._frozen.discard(name)
        super()._transform(step)
