r"""LwF, learning without forgetting: distil from the weights that the last task ended with, for any classifier.

Use it when tasks follow each other and no old samples may be kept: what is held are predictions, not weights, so the
weights are free to move where that changes nothing that was said before. It works best where the new task's samples
look like the old ones. Not for tasks of new classes with one head: keep samples there. Cost: from the first switch of
tasks on, one forward pass more for each batch, and one copy of the weights that train.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import LwF
    >>> trainer = Trainer(callbacks=[LwF(lam=1.0, temperature=2.0)], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.batches import eval_mode
from lightning_stable._glue.quiet import QuietPass
from lightning_stable.callbacks._host import refuse_iterator
from lightning_stable.callbacks._loss import LossTerm
from lightning_stable.callbacks._reference import call_with_weights
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.callbacks._weights import floating_buffers
from lightning_stable.callbacks._worker_state import mean_over_processes, trains_apart
from lightning_stable.functional.lwf import distillation_loss

__all__ = ["LwF"]


class LwF(LossTerm):
    r"""Keep the predictions on each new batch near those of the last task's model (arXiv 1606.09282).

    .. math:: L \leftarrow L + \lambda\,T^2\,\mathrm{mean}_i\,
        \mathrm{KL}\bigl(\mathrm{softmax}(\tilde z_i/T) \,\|\, \mathrm{softmax}(z_i/T)\bigr)

    from the first switch of tasks on, with :math:`\tilde z` the logits of the same batch at the parameters and buffers
    that the last task ended with, in evaluation mode, without gradient. The module's own ``training_step`` makes them,
    before the live pass: it logs nothing, counts no metric, and leaves random numbers and buffers as they were.

    The softmax is over the classes of the past tasks, where the datamodule has ``task_classes``; if it says
    ``task_incremental``, over each past task's by themselves, summed. Otherwise it is over all outputs that the head
    had in the last task. The task is what :meth:`start_task` said, or the number of ``task_steps`` that have passed, or
    the datamodule's ``current_task``, or the number of fits of the module.

    Args:
        lam: Weight :math:`\lambda` of the term; 0 switches the callback off.
        temperature: :math:`T`.
        logits: Dotted name of the submodule whose output are the logits, of shape (samples, ..., classes), or an
            object that holds them as ``.logits``. ``None``: the last ``nn.Linear`` whose output feeds the loss.
        task_steps: Optimizer steps after which tasks 1, 2, ... begin, in a single fit over all tasks.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, a sharded
            strategy or an unknown submodule; in training if no head is found, or another one than in the last task, or
            if the logits of then and now do not fit.
    """

    log_name = "lwf"

    def __init__(
        self,
        lam: float = 1.0,
        temperature: float = 2.0,
        logits: str | None = None,
        task_steps: list[int] | None = None,
    ) -> None:
        super().__init__(logits=logits, lam=lam, temperature=temperature, start_epoch=0)
        self.task_clock = TaskClock(type(self).__name__, task_steps)
        self._module: weakref.ref[LightningModule] | None = None
        self._restored: dict[str, Any] | None = None
        self._quiet = QuietPass()
        # Parameters and buffers that the last task ended with.
        self._teacher: dict[str, Tensor] = {}
        # Parameters that were frozen then: no copy of them is needed as long as they are.
        self._frozen: set[str] = set()
        self._past: list[int] = []
        # How many classes the logits have now, and had in the last task; and of which head they are, and were.
        self._outputs = self._past_outputs = 0
        self._head: str | None = None
        self._past_head: str | None = None

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_iterator(pl_module, self)
        if self._module is None or self._module() is not pl_module:
            self._forget()
            self._module = weakref.ref(pl_module)
        self._restored = None
        self.task_clock.begin(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()  # what an earlier fit of this object left
            self.task_clock.forget()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._restored is not None:
            self._take_over(self._restored)
            self._restored = None
        self._teacher = {name: value.to(pl_module.device) for name, value in self._teacher.items()}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.task_clock.advance(trainer) and self.lam != 0:
            self._end_task(trainer, pl_module)
        if self._frozen:
            # What has been unfrozen since the switch is still what it was then.
            live = {name: value for name, value in pl_module.named_parameters() if name in self._frozen}
            thawed = _kept(trainer, {name: value for name, value in live.items() if value.requires_grad})
            self._teacher |= thawed
            self._frozen -= thawed.keys()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.lam != 0:
            self.task_clock.tell_of_one_task()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "task": self.task_clock.state_dict(),
            "teacher": dict(self._teacher),
            "frozen": sorted(self._frozen),
            "past": list(self._past),
            "outputs": [self._outputs, self._past_outputs],
            "heads": [self._head, self._past_head],
        }

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._quiet = QuietPass()

    # ------------------------------------------------------------------ for users

    def start_task(self, task: int) -> None:
        """Say that from the next batch on this task is trained on.

        Args:
            task: Its number, from 0.

        Raises:
            ValueError: If it is no whole number from 0 on.
        """
        self.task_clock.ask(task)

    # ------------------------------------------------------------------ the term

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        if not self._teacher:
            return None
        buffers = dict(pl_module.named_buffers())
        gone = self._teacher.keys() - buffers.keys() - dict(pl_module.named_parameters()).keys()
        if gone:
            raise ValueError(
                f"LwF: {', '.join(map(repr, sorted(gone)))} of {type(pl_module).__name__} went away since the last "
                "task ended, so its model cannot be run. Change the module's parts between tasks, and do not prune."
            )
        # A module may write to its buffers in evaluation mode, too: to copies.
        teacher = {name: value.clone() if name in buffers else value for name, value in self._teacher.items()}
        # Before the live pass: the module's tensors are what the graph of that one is made of.
        with torch.no_grad(), self._quiet(pl_module), eval_mode(pl_module), self._tap.recording() as record:
            call_with_weights(pl_module, teacher, step)
        return record

    @override
    def _term(self, trainer: Trainer, pl_module: LightningModule, logits: Tensor, prepared: Any) -> Tensor | None:
        self._outputs, self._head = logits.shape[-1], self._tap.name
        if prepared is None:
            return None
        if self.logits is None and self._past_head not in (None, self._head):
            raise ValueError(
                f"LwF: the logits are the output of {self._head!r} now, and were that of {self._past_head!r} in the "
                "last task, whose model knows nothing of the other head. Name a submodule that puts out the logits in "
                "every task with the argument logits."
            )
        past = self._tap.logits(prepared)
        classes = self._past_outputs or past.shape[-1]
        if past.shape[:-1] != logits.shape[:-1] or classes > min(past.shape[-1], logits.shape[-1]):
            raise ValueError(
                f"LwF: the logits of {self._tap.name!r} have the shape {tuple(logits.shape)}, and at the last task's "
                f"weights, in evaluation mode, {tuple(past.shape)}; the last task had {classes} classes. Samples have "
                "to be the same and classes may only be added. Name another submodule with the argument logits."
            )
        groups = self._groups(trainer, classes)
        return distillation_loss(past[..., :classes], logits, self.temperature, groups).mean()

    # ------------------------------------------------------------------ helpers

    def _groups(self, trainer: Trainer, classes: int) -> list[list[int]] | None:
        """Return the sets of classes that compete, where the datamodule names those of its tasks."""
        datamodule = cast(Any, trainer).datamodule
        named = getattr(datamodule, "task_classes", None)
        if named is None:
            return None
        sets = [sorted({int(index) for index in named[task]}) for task in self._past if task < len(named)]
        union = sorted(set().union(*sets))
        if not union or not 0 <= union[0] <= union[-1] < classes:
            raise ValueError(
                f"LwF: {type(datamodule).__name__}.task_classes names {union or 'no classes'} for the past tasks "
                f"{self._past}, and the logits of {self._tap.name!r} had {classes} classes. Name each task's classes "
                "by their places among the logits."
            )
        return sets if getattr(datamodule, "task_incremental", False) else [union]

    def _end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the task that has ended at the module's present weights."""
        if self.task_clock.previous is not None and self.task_clock.previous not in self._past:
            self._past.append(self.task_clock.previous)
        self._past_outputs, self._past_head = self._outputs, self._head
        live = dict(pl_module.named_parameters())
        self._teacher = _kept(trainer, {name: value for name, value in live.items() if value.requires_grad})
        self._frozen = live.keys() - self._teacher.keys()
        # A buffer that is not saved follows from the rest.
        saved = pl_module.state_dict().keys()
        buffers = {name: value.detach() for name, value in pl_module.named_buffers() if name in saved}
        if trainer.world_size > 1 and buffers:
            # Each process has gone on with the statistics of its own batches.
            on_cpu = {name: value.cpu() for name, value in buffers.items()}
            on_cpu = trainer.strategy.broadcast(on_cpu)
            buffers = {name: value.to(pl_module.device) for name, value in on_cpu.items()}
        self._teacher |= {name: value.clone() for name, value in buffers.items()}
        if trains_apart(trainer):
            self._teacher |= _kept(trainer, {n: v for n, v in floating_buffers(pl_module).items() if n in saved})

    def _forget(self) -> None:
        """Know of no task that has ended."""
        self._teacher, self._frozen, self._past = {}, set(), []
        self._outputs = self._past_outputs = 0
        self._head = self._past_head = None

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self.task_clock.load_state_dict(state["task"])
        self._teacher, self._frozen = dict(state["teacher"]), set(state["frozen"])
        self._past = list(state["past"])
        self._outputs, self._past_outputs = state["outputs"]
        self._head, self._past_head = state["heads"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**super().__getstate__(), "_module": None, "_quiet": QuietPass()}


def _kept(trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of floating-point tensors: of their mean over the workers where those train apart."""
    values = [value.detach().clone() for value in tensors.values()]
    return dict(zip(tensors, mean_over_processes(trainer, values) if trains_apart(trainer) else values, strict=True))
