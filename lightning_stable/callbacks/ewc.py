r"""EWC, elastic weight consolidation: hold those weights near the last task's that the old tasks need.

Use it when tasks follow each other and no old samples may be kept after their task. It tells weights apart by the
Fisher information, where :class:`~lightning_stable.callbacks.L2Anchor` holds all alike; from a pretrained model that
one was reported to do better. Not for tasks of new classes with one head: keep samples there. Cost: two copies of the
weights that are held, one fused pass over them for each optimizer step, ``samples`` samples in main memory, and at each
switch of tasks a forward and backward pass for each of them.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import EWC
    >>> trainer = Trainer(callbacks=[EWC(lam=100.0)], logger=False, enable_checkpointing=False)
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.quiet import QuietPass
from lightning_stable.callbacks._anchor import WeightAnchor
from lightning_stable.callbacks._fisher import fisher_diagonal
from lightning_stable.callbacks._host import refuse_iterator, refuse_manual
from lightning_stable.callbacks._task_samples import TaskSamples
from lightning_stable.functional._settings import check_count
from lightning_stable.functional.ewc import EWCState, check_fisher_decay, update_ewc

__all__ = ["EWC"]


class EWC(WeightAnchor):
    r"""Penalise the distance to the last task's weights by how much each meant to the tasks so far (arXiv 1612.00796).

    .. math:: L \leftarrow L + \lambda \sum_i F_i\,(\theta_i - \theta^*_i)^2, \qquad F \leftarrow \gamma F + F_k

    where :math:`F_k` is the diagonal of the empirical Fisher information of the task that has ended: the mean squared
    gradient of the module's own training loss over ``samples`` of its samples, each by itself, in evaluation mode. It
    is computed at the first batch of the next task; then the anchor :math:`\theta^*` is replaced, which makes this
    online EWC (arXiv 1805.06370). The samples are drawn evenly from the task's batches while it is learned, those
    that come again in a later epoch counted again, and let go of once the task has been taken in.

    The penalty reaches the optimizer as its gradient :math:`2\lambda F(\theta - \theta^*)`, which is added to the
    gradient that an optimizer step starts from: accumulated, unscaled, synchronised, not yet clipped. So it counts once
    a step, whatever is accumulated, and is not in the loss that the module logs.

    The task is what :meth:`start_task` said, or the number of ``task_steps`` that have passed, or the datamodule's
    ``current_task``, or the number of fits of the module. Logs ``ewc/penalty``, the penalty with its weight, every
    ``log_every_n_steps`` steps. Under DDP all processes keep the same samples, and each goes through its share of them.

    Args:
        lam: Weight :math:`\lambda` of the penalty; 0 switches the callback off. The papers' is twice this one.
        decay: :math:`\gamma`, the share of the earlier tasks' Fisher information that is kept at a switch, in [0, 1].
        samples: How many samples of each task its Fisher information is computed from.
        parameters: Patterns over parameter names, such as ``["backbone.*"]``: those that match one are held. ``None``
            for all that train. What is frozen at the switch has no Fisher information and is not held.
        log_every_n_steps: Optimizer steps from one log to the next.
        seed: Of the callback's own random numbers.
        task_steps: Optimizer steps after which tasks 1, 2, ... begin, in a single fit over all tasks.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, a sharded
            strategy, LBFGS, a training step that takes ``dataloader_iter``, or a pattern that matches no parameter; in
            training for sparse gradients, a batch without samples to tell apart, samples of changing shape, or a Fisher
            information that is not finite.
    """

    log_name = "ewc"

    def __init__(
        self,
        lam: float = 100.0,
        decay: float = 1.0,
        samples: int = 200,
        parameters: Sequence[str] | None = None,
        log_every_n_steps: int = 50,
        seed: int = 0,
        task_steps: list[int] | None = None,
    ) -> None:
        super().__init__(lam=lam, parameters=parameters, log_every_n_steps=log_every_n_steps, task_steps=task_steps)
        check_fisher_decay(decay)
        check_count("samples", samples, 1, "samples")
        check_count("seed", seed, 0, "a generator")
        self.decay = decay
        self.samples = samples
        self.seed = seed
        self._quiet = QuietPass()
        self._task_samples = TaskSamples(samples, "EWC", seed)
        self._importance = {}

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_manual(pl_module, self, "there is no returned loss whose gradient it could take for each sample")
            refuse_iterator(pl_module, self)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.lam != 0:
            self._task_samples.begin(trainer, pl_module, batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._task_samples.learn()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._task_samples.settle()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "fisher": dict(self._importance or {}),
            "samples": self._task_samples.state_dict(),
        }

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._quiet = QuietPass()

    # ------------------------------------------------------------------ for users

    @override
    def reset(self) -> None:
        super().reset()
        self._importance = {}
        self._task_samples.reset()

    # ------------------------------------------------------------------ helpers

    @override
    def _take_over(self, state: dict[str, Any]) -> None:
        super()._take_over(state)
        self._importance = dict(state["fisher"])
        self._task_samples.load_state_dict(state["samples"])

    @override
    def _end_task(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        known = EWCState(self._anchor, self._importance or {})
        weights = {
            name: value
            for name, value in self._selected(pl_module).items()
            if value.requires_grad or name in known.fisher
        }
        batches = self._task_samples.share(trainer, pl_module, batch)
        fisher = fisher_diagonal(trainer, pl_module, batches, list(weights), quiet=self._quiet)
        if not all(bool(value.isfinite().all()) for value in fisher.values()):
            raise ValueError(
                f"EWC: the Fisher information of task {self.task_clock.previous} is not finite: the loss of one of its "
                "samples, or a gradient of it, overflows at the weights that the task ended with, in evaluation mode. "
                "Look for the cause in the data, the learning rate or the precision."
            )
        self._anchor, self._importance = update_ewc(known, weights, fisher, self.decay)
        self._task_samples.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**super().__getstate__(), "_quiet": QuietPass()}
