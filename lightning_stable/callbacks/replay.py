r"""Rehearsal from a small memory, for any LightningModule under automatic optimisation.

Use it when the data changes over time and some of what came before may be kept: of all methods against forgetting it is
the simplest. Where no sample may be kept, use EWC, L2Anchor or LwF. Cost: a second forward and backward pass for each
batch, of ``batch_size`` samples; main memory for ``capacity`` samples in each process, which are in the checkpoint too.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import Replay
    >>> trainer = Trainer(callbacks=[Replay(capacity=500)], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import QuietPass, is_quiet, loss_of
from lightning_stable.callbacks._closure import is_trained_on, may_repeat, repeated_batch
from lightning_stable.callbacks._host import refuse_iterator, refuse_manual, refuse_sharded, run_first
from lightning_stable.callbacks._replay_memory import POLICIES, ReplayMemory
from lightning_stable.callbacks._samples import count_samples, find_labels, rebuild
from lightning_stable.callbacks._shared_samples import count_everywhere, gather_classes, gather_samples
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.functional._settings import check_choice, check_count, check_not_negative

__all__ = ["Replay"]


class Replay(Callback):
    r"""Train on stored samples beside each new batch (experience replay, arXiv 1902.10486).

    .. math:: L = w\,L_\text{new} + (1 - w)\,L_\text{replay}

    with both losses from the module's own ``training_step``: once for the batch that came, once for stored samples in
    the same structure. The stored samples are drawn before the batch is trained on and the batch is stored after, so a
    sample is never replayed beside itself. As long as there is nothing to replay, the loss is :math:`L_\text{new}`.
    Terms that other callbacks add to the loss are of the new batch and keep their own weight.

    The second pass logs nothing of the module's and counts no metric; it moves batch statistics and random numbers,
    since it is trained on. Where SAM runs a batch again, the same samples are replayed.

    Under DDP all processes keep the same samples, those that one process would keep whose batch is theirs one after the
    other, and each replays its share of one draw.

    Args:
        capacity: How many samples are kept.
        policy: ``"reservoir"``: any sample so far is kept with the same probability, and all that are kept are
            replayed equally, those of the present task too. ``"class_balanced"``: the same, with as many samples of
            each class. ``"power_law"``: as many samples of each task are kept, and past tasks are replayed with
            probability :math:`\propto (k - i)^{-a}`, task :math:`i` while task :math:`k` is learned (arXiv
            2401.10393); nothing is replayed in task 0.
        batch_size: How many samples are replayed beside each batch, in each process; ``None``: as many as it has.
        weight: :math:`w`, the weight of the new batch, in (0, 1]; 1 switches the callback off, and nothing is stored.
        exponent: :math:`a` of ``"power_law"``; 0 replays past tasks equally. What the paper uses is not known here.
        labels: Where ``"class_balanced"`` finds the classes in a batch: a key, an attribute or, as in ``"1"``, a
            position. ``None``: the second entry, or what is called "labels", "label", "y", "targets" or "target".
        seed: Of the callback's own random numbers.
        task_steps: Optimizer steps after which tasks 1, 2, ... begin. ``None``: :meth:`start_task`, the datamodule's
            ``current_task``, or one task for each fit. Only ``"power_law"`` asks for tasks.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, a sharded
            strategy or a training step that takes ``dataloader_iter``; in training for a batch without samples to tell
            apart, samples of changing shape, no labels, or more classes than ``capacity``.
    """

    def __init__(
        self,
        capacity: int = 1000,
        policy: str = "reservoir",
        batch_size: int | None = None,
        weight: float = 0.5,
        exponent: float = 1.0,
        labels: str | None = None,
        seed: int = 0,
        task_steps: list[int] | None = None,
    ) -> None:
        check_count("capacity", capacity, 1, "samples")
        check_choice("policy", policy, tuple(POLICIES))
        if batch_size is not None:
            check_count("batch_size", batch_size, 1, "samples")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            raise ValueError(
                f"weight={weight!r} is not in (0, 1]: it is the weight of the new batch, and 1 - weight that of the "
                "replayed one. Usual values are 0.3 to 0.7; 1 replays nothing."
            )
        check_not_negative("exponent", exponent, "how fast the probability of a task falls with its age")
        if labels is not None and policy != "class_balanced":
            raise ValueError(f"labels={labels!r} has no meaning for policy={policy!r}, which looks at no class.")
        check_count("seed", seed, 0, "a generator")
        self.capacity = capacity
        self.policy = policy
        self.batch_size = batch_size
        self.weight = weight
        self.exponent = exponent
        self.labels = labels
        self.seed = seed
        self.task_clock = TaskClock("Replay", task_steps)

        self._module: weakref.ref[LightningModule] | None = None
        self._wrap: MethodWrap | None = None
        self._quiet = QuietPass(training=True)
        self._restored: dict[str, Any] | None = None
        # The present batch as it came, what is replayed beside it, and beside each micro-batch of this optimizer step
        # if one of them may run again.
        self._batch: Any = None
        self._drawn: Any = None
        self._prepared: list[Any] = []
        self._last_step = 0
        # How many samples each process has in the present batch, and whether it was trained on.
        self._sizes: list[int] = []
        self._trained = False
        self._memory = self._new_memory()

    def start_task(self, task: int) -> None:
        """Say which task, from 0, is trained on from the next batch on."""
        self.task_clock.ask(task)

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None
        if stage != "fit":
            return
        refuse_manual(pl_module, self, "there is no returned loss to add the replayed one to")
        refuse_sharded(trainer, self, "it was not tried with weights that are sharded over processes")
        refuse_iterator(pl_module, self)
        # The innermost of all wraps of the training step: what others add to the loss is not weighted.
        run_first(trainer, self)
        self.task_clock.begin(trainer, pl_module)
        if self._module is None or self._module() is not pl_module:
            self._memory = self._new_memory()
            self._module = weakref.ref(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.task_clock.forget()
            self._memory = self._new_memory()  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._memory.load_state_dict(self._restored["memory"])
            self.task_clock.load_state_dict(self._restored["task_clock"])
            self._restored = None
        self._undo()
        if self.weight == 1:
            return  # nothing is replayed, so nothing has to be kept

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._training_step(pl_module, original, args, kwargs)

        self._wrap = MethodWrap(pl_module, "training_step", around)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepared, self._last_step = [], trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.task_clock.advance(trainer)
        if self._wrap is None:
            return
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._prepared = []  # what an epoch that was cut within a step has left
        self._trained = False
        # A training step may take entries out of the batch.
        self._batch = rebuild(batch)
        self._sizes = count_everywhere(trainer, pl_module, self._memory.store, batch, "Replay")
        world = trainer.world_size
        count = sum(self._sizes) if self.batch_size is None else self.batch_size * world
        places = self._memory.draw(count, self.task_clock.task)[trainer.global_rank :: world]
        self._drawn = self._memory.store.batch(places, batch) if places else None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._memory.end_batch()
        if self._trained:
            self._keep(trainer, pl_module, self._batch)
        self._batch, self._drawn, self._trained = None, None, False
        if trainer.global_step != self._last_step:
            self._prepared, self._last_step = [], trainer.global_step

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict(), "task_clock": self.task_clock.state_dict()}

    # ------------------------------------------------------------------ the loss

    def _training_step(
        self, pl_module: LightningModule, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in for ``training_step``."""
        again = repeated_batch(pl_module)
        if again is None and (is_quiet(pl_module) or not is_trained_on(pl_module.trainer)):
            # Another callback's own pass, beside those that are trained on; or a validation step that calls this one.
            return original(*args, **kwargs)
        replayed = self._drawn if again is None else self._prepared[again]
        if again is None and may_repeat(pl_module):
            self._prepared.append(replayed)
        # The new batch first: where it runs again, random numbers begin at it.
        output = original(*args, **kwargs)
        loss = loss_of(output)
        self._trained = self._trained or loss is not None
        if loss is None or replayed is None:
            return output  # a skipped step, or what the host refuses; or nothing to replay
        with self._quiet(pl_module):
            old = loss_of(original(rebuild(replayed), *args[1:], **kwargs))
        if old is None:
            return output
        term = (1 - self.weight) * old
        pl_module.log("replay_loss", term.detach(), on_step=True, on_epoch=False, sync_dist=True)
        total = self.weight * loss + term
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    # ------------------------------------------------------------------ the memory

    def _keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Keep some samples of a batch, which on every process is its part of the whole one."""
        groups = [self.task_clock.task] * sum(self._sizes)
        if self.policy == "class_balanced":
            groups = gather_classes(self._classes(batch).to(pl_module.device), self._sizes)
        chosen = self._memory.choose(groups)
        self._memory.store.put_rows(*gather_samples(trainer, batch, self._sizes, chosen))

    def _classes(self, batch: Any) -> Tensor:
        """Return the class of each sample of this process's part."""
        labels, size = find_labels(batch, self.labels, "Replay"), count_samples(batch, "Replay")
        whole = not labels.is_floating_point() and not labels.is_complex()
        if not whole or tuple(labels.shape) != (size,):
            raise ValueError(
                f"Replay: policy='class_balanced' needs one class for each sample, as whole numbers of shape ({size},),"
                f" and found {labels.dtype} of shape {tuple(labels.shape)}. Name where the classes are with the "
                "argument labels, or take policy='reservoir'."
            )
        return labels.long()

    def _new_memory(self) -> ReplayMemory:
        return ReplayMemory(self.capacity, self.policy, self.exponent, self.seed)

    def _undo(self) -> None:
        """Take the wrap off the module."""
        self._batch, self._drawn, self._prepared, self._trained = None, None, [], False
        self._quiet = QuietPass(training=True)
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        left_out: dict[str, Any] = dict.fromkeys(("_module", "_wrap", "_batch", "_drawn"))
        return {**vars(self), **left_out, "_prepared": [], "_quiet": QuietPass(training=True)}
