r"""StabilityGap: the score of every task seen so far, at every step, while a module learns the next one.

Use it wherever the data changes over a run: measured at the end of tasks only, training looks stable while the score of
earlier tasks collapses right after each switch and recovers. It changes nothing of training. Cost: one pass over at
most ``subset`` samples of each task seen, every ``every_n_steps`` optimizer steps.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import StabilityGap
    >>> trainer = Trainer(callbacks=[StabilityGap(every_n_steps=5)], logger=False, enable_checkpointing=False)
"""

import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._averaging import AveragedWeights
from lightning_stable.callbacks._gap_files import find_folder, write_files
from lightning_stable.callbacks._gap_log import GapLog
from lightning_stable.callbacks._gap_record import summary_table
from lightning_stable.callbacks._host import refuse_sharded
from lightning_stable.callbacks._settings import check_choice, check_count
from lightning_stable.callbacks._task_evaluation import TaskEvaluation
from lightning_stable.callbacks._task_gradients import gradient_parts
from lightning_stable.callbacks._task_scores import TaskScore
from lightning_stable.callbacks._tasks import TaskClock

__all__ = ["StabilityGap"]


class StabilityGap(Callback):
    r"""Evaluate every seen task inside training, and tell how deep each falls when another begins (arXiv 2205.13452).

    Evaluated are fixed samples of each task, every ``every_n_steps`` optimizer steps, once before the first update of
    each task, and at the end of each epoch. From the curves follow average accuracy, forgetting, minimum accuracy,
    worst-case accuracy, windowed forgetting and plasticity, and the depth of each gap and the steps to recover from it:
    see :class:`lightning_stable.metrics.ContinualMetrics` for the equations.

    Which task is trained on is, in this order: what :meth:`start_task` says; ``task_steps``; the datamodule's
    ``current_task``; the number of ``trainer.fit`` calls with this object and this module.

    Args:
        loaders: One dataloader for each task. ``None``: the datamodule's ``task_dataloaders()``, or else the Trainer's
            validation dataloaders, one a task. Samples are read from their datasets, without their workers.
        every_n_steps: Optimizer steps between evaluations. Windows count evaluations.
        subset: Most samples of a task, chosen once with ``seed``.
        score: ``"accuracy"``; ``"loss"``, that of the module's own ``training_step`` in evaluation mode; a torchmetrics
            metric of logits and labels; a function ``(pl_module, batch)`` that returns one value for each sample or
            their mean; or the dotted path of one.
        windows: Numbers of evaluations over which forgetting and plasticity are looked for, each 2 or more.
        weights: ``"live"``, ``"ema"`` or ``"both"``. ``None``: both where :class:`.EMA` or :class:`.BalancedEMA` is in
            the Trainer, else the live ones.
        gradients: Log the norms of the gradients of the loss on the present task (plasticity) and on the earlier ones
            (stability) over these samples, and their cosine, at each evaluation.
        higher_is_better: Whether a higher score is better; has to be said for a function.
        logits: Dotted name of the submodule that puts out the logits. ``None``: the module's ``forward`` does, given
            the first entry of a batch, or all but the labels of a dictionary.
        labels: Key or place of the labels in a batch. ``None``: the second entry, or ``"labels"``.
        batch_size: Most samples of one pass.
        cache: Where the samples stay: ``"device"``, that of the module, or ``"cpu"``.
        seed: Seed of the choice of samples.
        directory: Where ``stability_gap.json`` and the picture go. ``None``: the logger's directory.
        picture: Draw ``stability_gap.png`` at the end of each fit.
        strict: Let a failed evaluation end the run. By default it is reported once, and training goes on.
        task_steps: Optimizer steps after which tasks 1, 2, ... begin.

    Raises:
        ValueError: At construction for a value out of range; at the start of training if there is nothing to evaluate
            on, tasks share samples, a task is empty, or the logits are not found.
    """

    def __init__(
        self,
        loaders: Sequence[Any] | None = None,
        every_n_steps: int = 1,
        subset: int = 1000,
        score: Any = "accuracy",
        windows: Sequence[int] = (10, 100),
        weights: str | None = None,
        gradients: bool = False,
        higher_is_better: bool | None = None,
        logits: str | None = None,
        labels: str | None = None,
        batch_size: int = 1024,
        cache: str = "device",
        seed: int = 0,
        directory: str | None = None,
        picture: bool = True,
        strict: bool = False,
        task_steps: list[int] | None = None,
    ) -> None:
        check_count("every_n_steps", every_n_steps, 1, "optimizer steps")
        check_count("subset", subset, 1, "samples")
        check_count("batch_size", batch_size, 1, "samples")
        for window in windows:
            check_count("windows", window, 2, "evaluations")
        if weights is not None:
            check_choice("weights", weights, ("live", "ema", "both"))
        check_choice("cache", cache, ("device", "cpu"))
        self.every_n_steps = every_n_steps
        self.subset = subset
        self.score = score
        self.windows = tuple(windows)
        self.weights = weights
        self.gradients = gradients
        self.logits = logits
        self.labels = labels
        self.cache = cache
        self.seed = seed
        self.directory = directory
        self.picture = picture
        self.strict = strict
        self.task_clock = TaskClock("StabilityGap", task_steps)
        scored = TaskScore(score, higher_is_better, logits, labels)
        self.higher_is_better = scored.higher_is_better
        self._evaluation = TaskEvaluation(
            scored,
            loaders=loaders,
            limit=subset,
            seed=seed,
            batch_size=batch_size,
            keep_on_device=cache == "device",
        )
        self._log = GapLog(scored.name, scored.higher_is_better, every_n_steps, self.windows)
        self._module: weakref.ref[LightningModule] | None = None
        self._restored: dict[str, Any] | None = None
        self._checked = False
        self._failed = False
        self._last_step = 0
        self._told = -1
        self._folder: Path | None = None

    def start_task(self, task: int) -> None:
        """Say that the next batch is the first of a task, from 0; from then on tasks change only by this.

        Raises:
            ValueError: If ``task`` is no whole number from 0 on.
        """
        self.task_clock.ask(task)

    def summary(self) -> str:
        """Return a table of the metrics at the end of each task, the present one as if it ended now."""
        return summary_table(self.record())

    def record(self) -> dict[str, Any]:
        """Return what ``stability_gap.json`` holds."""
        return self._log.record()

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(trainer, self, "it was not tried with weights that are sharded over processes")
        if self.weights in ("ema", "both") and _averaging(trainer) is None:
            raise ValueError(
                f"StabilityGap(weights={self.weights!r}) needs EMA or BalancedEMA in the same Trainer, and there is "
                "none. Add one, or leave weights to None."
            )
        self.task_clock.begin(trainer, pl_module)
        if self._module is None or self._module() is not pl_module:
            self._forget()
            self._module = weakref.ref(pl_module)
        self._restored, self._checked = None, False

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()
            self.task_clock.forget()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self.task_clock.load_state_dict(self._restored["clock"])
            self._log.load_state_dict(self._restored["log"])
            self._restored = None
        self._last_step = trainer.global_step
        self._evaluation.begin(trainer, pl_module)
        self._folder = find_folder(trainer, self.directory)
        if self._folder is None:
            rank_zero_info(
                "StabilityGap writes no stability_gap.json: the Trainer's logger has no directory. Give one: "
                "StabilityGap(directory=...)."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        switched = self.task_clock.advance(trainer)
        if not self._log.begun:
            self._first(trainer, pl_module)
        elif not self._checked:
            self._choose(trainer, self._log.tasks)  # of an earlier fit
        if switched:
            self._switch(trainer, pl_module)
        # Up to here nothing has been trained in this fit: what did not fit has ended it.
        self._checked = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = (trainer.global_step - self._last_step) // max(1, len(trainer.optimizers))
        if not steps:
            return
        self._last_step = trainer.global_step
        before = self._log.done
        self._log.done += steps
        if self._log.done // self.every_n_steps > before // self.every_n_steps:
            self._evaluate(trainer, pl_module, self.task_clock.task, self._log.tasks)
        every = max(1, cast(Any, trainer).log_every_n_steps)
        if self._log.done // every > before // every:
            self._report(trainer, self._log.latest())

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not in on_train_end, where the module may hold an average already.
        if self._log.begun and self._log.evaluated != self._log.done:
            self._evaluate(trainer, pl_module, self.task_clock.task, self._log.tasks)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._log.begun:
            return
        self._report(trainer, self._log.latest())
        rank_zero_info(f"StabilityGap at the end of training:\n{self.summary()}")
        self._told = self._log.done
        if trainer.is_global_zero:
            self._write(self.record(), picture=self.picture)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._evaluation.end()
        if self._log.begun and trainer.is_global_zero:
            self._write(self.record(), picture=False)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._evaluation.end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"clock": self.task_clock.state_dict(), "log": self._log.state_dict()} if self._log.begun else {}

    # ------------------------------------------------------------------ helpers

    def _forget(self) -> None:
        """Forget everything of an earlier module or run."""
        self._evaluation.forget()
        self._log.forget()
        self._failed, self._told = False, -1

    def _first(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first task: evaluate it before any update, and tasks to come where they have loaders."""
        present = self.task_clock.task
        tasks = sorted({*self._evaluation.tasks, present})
        self._choose(trainer, tasks)
        if len(tasks) > 1:
            self._log.set_baseline(tasks, self._evaluation.evaluate(trainer, pl_module, tasks, self._classes(trainer)))
        self._begin_task(trainer)
        self._evaluate(trainer, pl_module, present, [present])

    def _switch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the task before, and evaluate the new one before its first update."""
        previous, present = self.task_clock.previous, self.task_clock.task
        if previous is not None:
            if self._log.evaluated != self._log.done:
                self._evaluate(trainer, pl_module, previous, self._log.tasks)
            self._log.end(previous)
            self._conclude(trainer, previous)
        with self._tolerance():
            self._choose(trainer, [present])
        self._begin_task(trainer)
        self._evaluate(trainer, pl_module, present, [present])

    def _choose(self, trainer: Trainer, tasks: Sequence[int]) -> None:
        """Choose the samples of tasks, where they have none yet."""
        for note in self._evaluation.choose(trainer, tasks):
            rank_zero_info(f"StabilityGap: {note}.")

    def _begin_task(self, trainer: Trainer) -> None:
        """Note that the present task begins."""
        present, names = self.task_clock.task, self.task_clock.names(trainer) or []
        name = names[present] if present < len(names) else f"task {present}"
        self._log.switch(present, name, self._evaluation.samples(present))

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, present: int, tasks: Sequence[int]) -> None:
        """Evaluate tasks with each set of weights, and note it as made while ``present`` is trained on."""
        tasks = [task for task in tasks if self._evaluation.samples(task)]
        if not tasks:
            return
        classes = self._classes(trainer)
        for name, weights in self._weight_sets(trainer, pl_module).items():
            scores = torch.full((len(tasks),), torch.nan, device=pl_module.device)
            with self._tolerance():
                scores = self._evaluation.evaluate(trainer, pl_module, tasks, classes, weights)
            self._log.add(name, tasks, present, scores)
        if self.gradients:
            with self._tolerance():
                earlier = [task for task in self._log.tasks if task != present and self._evaluation.samples(task)]
                self._log.add_gradients(gradient_parts(self._evaluation, trainer, pl_module, present, earlier))
        self._log.evaluated = self._log.done

    def _weight_sets(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, dict[str, Tensor] | None]:
        """Return the sets of weights to evaluate with; ``None`` stands for those in the module."""
        found: dict[str, dict[str, Tensor] | None] = {} if self.weights == "ema" else {"live": None}
        average = _averaging(trainer)
        values = average.averaged() if average is not None and self.weights != "live" else {}
        if values:
            live = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
            found["ema"] = {name: value.to(live[name]) for name, value in values.items()}
        return found

    def _classes(self, trainer: Trainer) -> dict[int, Tensor] | None:
        """Return the classes that compete in each task, if the task is known at evaluation."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not getattr(datamodule, "task_incremental", False):
            return None
        return {task: torch.tensor(classes) for task, classes in enumerate(datamodule.task_classes)}

    @contextmanager
    def _tolerance(self) -> Iterator[None]:
        """Let an evaluation fail without an end to training, once the first of the fit has worked."""
        try:
            yield
        except Exception as error:
            if self.strict or not self._checked:
                raise
            self._complain(f"an evaluation failed ({type(error).__name__}: {error})")

    def _complain(self, what: str) -> None:
        """Report a failure, once."""
        if not self._failed:
            warnings.warn(
                f"StabilityGap: {what}. Training goes on; what fails from now on is not said again. With strict=True a "
                "failed evaluation ends the run.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._failed = True

    def _report(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write values to the loggers, and complain of scores that are not numbers."""
        if self._log.broken:
            what = f"the score of task {min(self._log.broken)} is not a number"
            self._log.broken = set()
            if self.strict:
                raise RuntimeError(f"StabilityGap: {what}.")
            self._complain(what)
        for logger in trainer.loggers:
            # The host logs what comes of a step under the number of steps before it, of one optimizer.
            logger.log_metrics(
                {name: value for name, value in values.items() if math.isfinite(value)},
                step=max(0, trainer.global_step // max(1, len(trainer.optimizers)) - 1),
            )

    def _conclude(self, trainer: Trainer, task: int) -> None:
        """Report the end of a task."""
        self._report(trainer, self._log.ended())
        if trainer.is_global_zero:
            record = self._log.record(provisional=False)
            if self._told != self._log.done:  # else the end of a fit was just told
                rank_zero_info(f"StabilityGap at the end of task {task}:\n{summary_table(record)}")
            self._write(record, picture=False)

    def _write(self, record: dict[str, Any], *, picture: bool) -> None:
        """Write the files, if there is a folder for them; a full disk is no reason to lose the run."""
        try:
            if self._folder is not None:
                write_files(record, self._folder, picture=picture)
        except (OSError, ValueError) as error:
            self._complain(f"its files could not be written ({type(error).__name__}: {error})")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None}


def _averaging(trainer: Trainer) -> AveragedWeights | None:
    """Return the callback that averages the weights, if there is one."""
    return next((one for one in cast(Any, trainer).callbacks if isinstance(one, AveragedWeights)), None)
