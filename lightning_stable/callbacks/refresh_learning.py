r"""Refresh learning: unlearn each batch a little before it is learned, for any module under automatic optimisation.

Use it on a stream of tasks beside a method that remembers, such as :class:`.Replay` or :class:`.EWC`: by itself it
forgets. Cost: for each optimizer step one forward and backward pass more, on its first micro-batch, a copy of the
weights, noise, and some passes over all of these; the importance of the weights; and at each change of tasks a forward
and backward pass for each of ``samples``.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import RefreshLearning
    >>> trainer = Trainer(callbacks=[RefreshLearning(task_steps=[500])], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import QuietPass
from lightning_stable.callbacks._batch_gradient import batch_gradient
from lightning_stable.callbacks._fisher import fisher_diagonal
from lightning_stable.callbacks._host import refuse_iterator, refuse_manual, refuse_sharded, refuse_unusual_gradient
from lightning_stable.callbacks._provisional import ProvisionalChange
from lightning_stable.callbacks._task_samples import TaskSamples
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.functional._settings import check_count, check_not_negative, check_positive
from lightning_stable.functional.refresh_learning import add_importance, ascend, refresh_weights

__all__ = ["RefreshLearning"]


class RefreshLearning(Callback):
    r"""Move the weights up the loss of the batch that is about to be learned (arXiv 2403.13249).

    .. math:: \theta \leftarrow \theta + \delta\,\frac{\lVert\theta\rVert\, u / \lVert u\rVert + \sigma\,\epsilon}
        {1 + \mu F}, \qquad F \leftarrow \tau F + F_{\text{task}} \text{ when a task ends}

    tensor by tensor, before each optimizer step, with :math:`u` the way that ``unlearn_steps`` steps of gradient ascent
    go on its first micro-batch and :math:`F` the importance of each weight for the tasks that have ended: the mean over
    ``samples`` of their samples of the squared gradient, times the likelihood of the target. The gradient is that of
    the module's own ``training_step``, without what other callbacks add to the loss. That pass logs nothing, counts no
    metric, and leaves random numbers, buffers and ``.grad`` as they were. Then the step is taken as usual; if it fails
    or makes no update, the weights go back to where they were.

    Under DDP the gradient is averaged over processes, and noise is the same in all.

    Args:
        learning_rate: :math:`\eta`, rate of the gradient ascent. Only the direction of the way counts: with one step
            the rate decides no more than which gradients are as short as rounding, and count as none.
        strength: :math:`\delta`, the share of a tensor's length that it moves; 0 switches the callback off.
        noise: :math:`\sigma`, standard deviation of the noise that is added to the direction.
        damping: :math:`\mu`, how much importance slows a weight down.
        decay: :math:`\tau`, the share of the old importance that is kept when a task ends, from 0 to 1.
        samples: How many samples of each task its importance is computed from.
        unlearn_steps: Steps of gradient ascent.
        seed: Of the noise, and of the choice of samples.
        task_steps: Optimizer steps of the fit after which tasks 1, 2, ... begin. ``None``: what :meth:`start_task`
            says, the datamodule's ``current_task``, or one task for each fit.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, a sharded
            strategy or a training step that takes ``dataloader_iter``; in training for a sparse or complex gradient,
            for batches that samples cannot be taken from, and for an importance that is not finite.
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        strength: float = 1e-5,
        noise: float = 1e-3,
        damping: float = 1e-3,
        decay: float = 1e-5,
        samples: int = 200,
        unlearn_steps: int = 1,
        seed: int = 0,
        task_steps: list[int] | None = None,
    ) -> None:
        check_positive("learning_rate", learning_rate, "the rate of the gradient ascent")
        check_not_negative("strength", strength, "the share of its length that a tensor of weights moves")
        check_not_negative("noise", noise, "the standard deviation of the noise in the direction")
        check_not_negative("damping", damping, "how much importance slows a weight down")
        check_not_negative("decay", decay, "the share of the earlier tasks' importance that is kept")
        if decay > 1:
            raise ValueError(
                f"decay={decay!r} is above 1: it is the share of the earlier tasks' importance that is kept."
            )
        check_count("samples", samples, 1, "samples")
        check_count("unlearn_steps", unlearn_steps, 1, "steps of gradient ascent")
        check_count("seed", seed, 0, "a generator")
        self.learning_rate = learning_rate
        self.strength = strength
        self.noise = noise
        self.damping = damping
        self.decay = decay
        self.samples = samples
        self.unlearn_steps = unlearn_steps
        self.seed = seed
        self.task_clock = TaskClock("RefreshLearning", task_steps)
        self._module: weakref.ref[LightningModule] | None = None
        self._kept = TaskSamples(samples, "RefreshLearning", seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._importance: dict[str, Tensor] = {}
        self._restored: dict[str, Any] | None = None
        self._wrap: MethodWrap | None = None
        self._quiet = QuietPass()
        self._unlearned: ProvisionalChange | None = None
        # Random numbers before the batch that is trained on was unlearned, in case it fails.
        self._random_before: Tensor | None = None

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None
        if stage != "fit":
            return
        refuse_manual(pl_module, self, "there is no returned loss whose gradient it could take")
        refuse_sharded(trainer, self, "it moves whole weights along whole gradients")
        refuse_iterator(pl_module, self)
        self.task_clock.begin(trainer, pl_module)
        if self._module is None or self._module() is not pl_module:
            self.reset()
            self._module = weakref.ref(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.task_clock.forget()
            self.reset()  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._take_over(self._restored)
            self._restored = None
        self._place(pl_module)
        self._undo()
        if self.strength == 0:
            return  # nothing moves, so nothing has to be known
        self._unlearned = unlearned = ProvisionalChange(trainer)

        def around(original: Callable[..., Any], batch: Any, batch_idx: int) -> Any:
            response = original(batch, batch_idx)
            if response != -1 and batch_idx % trainer.accumulate_grad_batches == 0:
                self._unlearn(trainer, pl_module, batch, batch_idx, unlearned)
            return response

        # The module's hook comes after those of all callbacks: what they see at the start of a batch, such as the
        # weights that a task ended with, is as it would be without this one.
        self._wrap = MethodWrap(pl_module, "on_train_batch_start", around)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ended = self.task_clock.advance(trainer)
        if self._wrap is None:
            return
        if ended:
            self._end_task(trainer, pl_module, batch)
        self._kept.begin(trainer, pl_module, batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._kept.learn()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._kept.settle()
        if self._unlearned is not None:
            self._unlearned.end_batch()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._unlearned is not None and self._unlearned.take_back() and self._random_before is not None:
            self._generator.set_state(self._random_before)
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()
        self._quiet = QuietPass()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "importance": dict(self._importance),
            "samples": self._kept.state_dict(),
            "generator": self._generator.get_state(),
            "task_clock": self.task_clock.state_dict(),
        }

    # ------------------------------------------------------------------ for users

    def start_task(self, task: int) -> None:
        """Say which task is trained on from the next batch on, counted from 0."""
        self.task_clock.ask(task)

    def reset(self) -> None:
        """Forget the importance of weights and the samples: the next fit starts anew."""
        self._importance = {}
        self._kept.reset()
        self._generator.manual_seed(self.seed)

    # ------------------------------------------------------------------ helpers

    def _unlearn(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        unlearned: ProvisionalChange,
    ) -> None:
        """Move the weights away from a batch."""
        live = {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}
        weights: list[Tensor] = list(live.values())
        walked: list[Tensor] = []
        for _ in range(self.unlearn_steps):
            moved = [(w.detach() + way).to(w.dtype).requires_grad_() for w, way in zip(weights, walked, strict=False)]
            points = dict(zip(live, moved or weights, strict=True))
            gradients = batch_gradient(trainer, pl_module, batch, batch_idx, points, self._quiet)
            if gradients is None:
                return
            for name, gradient in gradients.items():
                refuse_unusual_gradient(self, name, gradient)
            walked = ascend(walked, list(gradients.values()), self.learning_rate)
        self._random_before = self._generator.get_state()
        generator, device = self._generator, pl_module.device
        if device.type != "cpu":
            # Seeded anew for each batch: only the one on the CPU is in the checkpoint.
            seed = int(torch.randint(2**62, (), generator=generator))
            generator = torch.Generator(device).manual_seed(seed)
        importance = [self._importance.get(name) for name in live]
        with unlearned.change(weights):
            refresh_weights(weights, walked, importance, self.strength, self.noise, self.damping, generator)

    def _end_task(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Take in the importance of weights for the task that has ended."""
        names = [name for name, weight in pl_module.named_parameters() if weight.requires_grad]
        self._place(pl_module)
        samples = self._kept.share(trainer, pl_module, batch)
        of_task = fisher_diagonal(trainer, pl_module, samples, names, weighted=True, quiet=self._quiet)
        if not all(bool(value.isfinite().all()) for value in of_task.values()):
            raise ValueError(
                f"RefreshLearning: the importance of weights for task {self.task_clock.previous} is not finite: the "
                "loss of one of its samples, or a gradient of it, overflows at the weights that the task ended with, "
                "in evaluation mode. Look for the cause in the data, the learning rate or the precision."
            )
        self._importance = add_importance(self._importance, of_task, self.decay)
        self._kept.clear()

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self._importance = dict(state["importance"])
        self._kept.load_state_dict(state["samples"])
        self._generator.set_state(state["generator"].cpu())
        self.task_clock.load_state_dict(state["task_clock"])

    def _place(self, pl_module: LightningModule) -> None:
        """Keep the importance of those weights that are there, on their devices."""
        live = dict(pl_module.named_parameters())
        self._importance = {
            name: value.to(live[name].device)
            for name, value in self._importance.items()
            if name in live and live[name].shape == value.shape
        }

    def _undo(self) -> None:
        """Take the wrap off the module, and the hooks off its optimizer."""
        if self._unlearned is not None:
            self._unlearned.undo()
            self._unlearned = None
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None, "_wrap": None, "_unlearned": None, "_quiet": QuietPass()}
