r"""StabilityGap: the score of every task seen so far, at every step, while a module learns the next one.

Use it wherever the data changes over a run: measured at the end of tasks only, training looks stable while the score of
earlier tasks collapses right after each switch and recovers. It changes nothing of training. Cost: one pass over at
most ``subset`` samples of each task seen, every ``every_n_steps`` optimizer steps.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import StabilityGap
    >>> trainer = Trainer(callbacks=[StabilityGap(every_n_steps=5)], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._averaging import AveragedWeights
from lightning_stable.callbacks._gap_log import GapLog
from lightning_stable.callbacks._gap_record import summary_table
from lightning_stable.callbacks._gap_report import GapReport
from lightning_stable.callbacks._host import refuse_sharded
from lightning_stable.callbacks._task_evaluation import TaskEvaluation
from lightning_stable.callbacks._task_gradients import gradient_parts
from lightning_stable.callbacks._task_scores import TaskScore, refuse_own_steps
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.functional._settings import check_choice, check_count

__all__ = ["StabilityGap"]


class StabilityGap(Callback):
    r"""Evaluate every seen task inside training, and tell how deep each falls when another begins (arXiv 2205.13452).

    Evaluated are fixed samples of each task, every ``every_n_steps`` optimizer steps, once before the first update of
    each task, and at the end of each task and epoch. From the curves follow average accuracy, forgetting, minimum and
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
        batch_size: int = 512,
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
        if isinstance(windows, (str, int)):
            raise ValueError(f"windows={windows!r} is not a list of numbers of evaluations like [10, 100].")  # noqa: TRY004
        for window in windows:
            check_count("windows", window, 2, "evaluations")
        if loaders is not None and not isinstance(loaders, (list, tuple)):
            raise ValueError(f"loaders={loaders!r} is not a list with one dataloader for each task.")
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
        self._report = GapReport(self._log, directory, picture=picture, strict=strict)
        self._module: weakref.ref[LightningModule] | None = None
        self._restored: dict[str, Any] | None = None
        self._last_step = 0

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
        if self.gradients:
            refuse_own_steps(pl_module, "gradients=True")
        self.task_clock.begin(trainer, pl_module)
        if self._module is None or self._module() is not pl_module:
            self._forget()
            self._module = weakref.ref(pl_module)
        self._restored = None

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
        self._report.begin(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.task_clock.advance(trainer)
        if not self._report.begun:
            self._begin(trainer, pl_module)
        if self._log.due == "step":
            self._evaluate(trainer, pl_module, self._log.tasks)  # what a failure in the middle of it has left
        # Asked of the log, not of the clock: a switch that was interrupted is taken up again.
        if self._log.present != self.task_clock.task:
            self._switch(trainer, pl_module)
        if self._log.due == "switch":
            self._evaluate(trainer, pl_module, self._at_switch(trainer, pl_module))
        # Up to here nothing has been trained in this fit: what did not fit has ended it.
        self._report.begun = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        optimizers = max(1, len(trainer.optimizers))
        steps = (trainer.global_step - self._last_step) // optimizers
        self._last_step += steps * optimizers
        before, log = self._log.done, self._log
        log.done += steps
        due = log.done // self.every_n_steps > before // self.every_n_steps
        if due or (_is_last(trainer, batch_idx) and log.evaluated != log.done):
            log.due = "step"
            self._evaluate(trainer, pl_module, log.tasks)
        every = max(1, cast(Any, trainer).log_every_n_steps)
        if log.done // every > before // every:
            self._report.send(trainer, log.latest())

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where a run was stopped within an epoch. Not in on_train_end: the module may hold an average by then.
        if self._log.begun and self._log.evaluated != self._log.done:
            self._evaluate(trainer, pl_module, self._log.tasks)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._log.begun:
            self._report.end_of_fit(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._evaluation.end()
        self._report.failure(trainer)

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
        self._report.forget()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose samples before the first update of a fit; of the first fit, measure tasks that are to come, too."""
        loaders = len(self._evaluation.tasks)
        known = max((len(steps) + 1 for steps in _task_steps(trainer)), default=0)
        if known > loaders:
            raise ValueError(
                f"StabilityGap: with task_steps there are {known} tasks, and loaders for {loaders} of them. Give one "
                "for each, in order."
            )
        first = self._log.present is None
        tasks = sorted({*(self._evaluation.tasks if first else self._log.tasks), self.task_clock.task})
        self._choose(trainer, tasks)
        if first and len(tasks) > 1:
            self._log.set_baseline(tasks, self._evaluation.evaluate(trainer, pl_module, tasks, self._classes(trainer)))

    def _switch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the task before end, and the next one begin."""
        log, present = self._log, self.task_clock.task
        previous = log.present
        if previous is not None and log.evaluated != log.done:
            self._evaluate(trainer, pl_module, log.tasks)
        with self._report.tolerance():
            self._choose(trainer, [present])
        names = self.task_clock.names(trainer) or []
        name = names[present] if present < len(names) else f"task {present}"
        log.switch(present, name, self._evaluation.samples(present))
        if previous is not None:
            self._report.end_of_task(trainer, previous)

    def _at_switch(self, trainer: Trainer, pl_module: LightningModule) -> list[int]:
        """Return the tasks to evaluate before the first update of the present one.

        The others were evaluated with these weights, at the end of the task before; not so where a fit began with other
        weights than the last one ended with, such as their average.
        """
        log = self._log
        present = log.present
        earlier = [task for task in log.tasks if task != present and self._evaluation.samples(task)]
        if not self._evaluation.samples(cast(int, present)):
            return earlier  # what gaps are measured from, at least
        if earlier and not self._report.begun:
            found = self._evaluation.evaluate(trainer, pl_module, earlier, self._classes(trainer)).tolist()
            before = log.last_scores()
            moved = any(abs(new - before.get(task, new)) > 1e-6 for task, new in zip(earlier, found, strict=True))
            return [*earlier, cast(int, present)] if moved else [cast(int, present)]
        return [cast(int, present)]

    def _choose(self, trainer: Trainer, tasks: Sequence[int]) -> None:
        """Choose the samples of tasks, where they have none yet."""
        few = self._evaluation.choose(trainer, tasks)
        if few:
            counts = ", ".join(str(self._evaluation.samples(task)) for task in few)
            self._report.once(
                f"StabilityGap: task(s) {', '.join(map(str, few))} have {counts} samples, fewer than subset="
                f"{self.subset}: all are used."
            )

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, tasks: Sequence[int]) -> None:
        """Evaluate tasks with each set of weights; what fails is noted as not a number."""
        present = cast(int, self._log.present)
        tasks = [task for task in tasks if self._evaluation.samples(task)]
        classes, gradients = self._classes(trainer), None
        scores: dict[str, Tensor] = {}
        for name, weights in self._weight_sets(trainer, pl_module).items() if tasks else ():
            scores[name] = torch.full((len(tasks),), torch.nan, device=pl_module.device)
            with self._report.tolerance():
                scores[name] = self._evaluation.evaluate(trainer, pl_module, tasks, classes, weights)
        if self.gradients and self._evaluation.samples(present):
            gradients = torch.full((3,), torch.nan, device=pl_module.device)
            earlier = [task for task in self._log.tasks if task != present and self._evaluation.samples(task)]
            with self._report.tolerance():
                gradients = gradient_parts(self._evaluation, trainer, pl_module, present, earlier)
        self._log.add(tasks, present, scores, gradients)

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

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None}


def _averaging(trainer: Trainer) -> AveragedWeights | None:
    """Return the callback that averages the weights, if there is one."""
    return next((one for one in cast(Any, trainer).callbacks if isinstance(one, AveragedWeights)), None)


def _task_steps(trainer: Trainer) -> list[list[int]]:
    """Return the steps at which tasks begin, as callbacks of the Trainer were given them."""
    clocks = [getattr(callback, "task_clock", None) for callback in cast(Any, trainer).callbacks]
    return [clock.task_steps for clock in clocks if isinstance(clock, TaskClock) and clock.task_steps is not None]


def _is_last(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether an epoch, or training, ends with this batch: what is saved from here on has its evaluation."""
    host = cast(Any, trainer)
    if host.fit_loop.epoch_loop.batch_progress.is_last_batch or batch_idx + 1 >= host.num_training_batches:
        return True
    return bool(host.max_steps and 0 < host.max_steps <= host.global_step)
