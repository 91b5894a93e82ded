"""Evaluate a module on fixed samples of several tasks inside training, in few passes, and leave no trace of it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_stable._glue.batches import eval_mode, to_device
from lightning_stable._glue.progress import progress
from lightning_stable._glue.quiet import QuietPass
from lightning_stable.callbacks._attributes import attributes_kept
from lightning_stable.callbacks._reference import call_with_weights
from lightning_stable.callbacks._task_scores import TaskScore
from lightning_stable.callbacks._task_subsets import (
    Chunk,
    TaskSubset,
    choose_subset,
    find_loaders,
    join_subsets,
    refuse_overlap,
    share_subset,
)

__all__ = ["TaskEvaluation"]


class TaskEvaluation:
    """The fixed samples of each task, and passes over them.

    A failure on one process does not leave the others waiting: they hear of it, by an error or by a score that is not
    a number.

    Args:
        score: How samples become a score.
        loaders: One for each task; ``None``: those of the datamodule or of the Trainer's validation.
        limit: Most samples of a task.
        seed: Seed of the choice.
        batch_size: Most samples of a pass.
        keep_on_device: Whether the samples stay on the module's device between evaluations.
    """

    def __init__(
        self,
        score: TaskScore,
        *,
        loaders: Sequence[Any] | None,
        limit: int,
        seed: int,
        batch_size: int,
        keep_on_device: bool,
    ) -> None:
        self.score = score
        self._given = loaders
        self._limit = limit
        self._seed = seed
        self._size = batch_size
        self._keep = keep_on_device
        self._loaders: list[Any] = []
        self._source = ""
        self._subsets: dict[int, TaskSubset] = {}
        self._chunks: dict[tuple[int, ...], list[Chunk]] = {}
        self._quiet = QuietPass()

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the loaders and the logits of a fit.

        Raises:
            ValueError: If there is nothing to evaluate on, or no submodule of the name that was given.
        """
        self.end()
        self._loaders, self._source = find_loaders(trainer, self._given)
        self.score.attach(pl_module)

    def end(self) -> None:
        """Let go of the module and of everything that is on its device."""
        self.score.detach()
        self._chunks, self._quiet = {}, QuietPass()

    def forget(self) -> None:
        """Forget the samples, too."""
        self.end()
        self._subsets = {}

    @property
    def tasks(self) -> range:
        """The tasks that have a loader."""
        return range(len(self._loaders))

    def samples(self, task: int) -> int:
        """Return how many samples a task is evaluated on; 0 if none could be chosen."""
        return self._subsets[task].samples if task in self._subsets else 0

    def choose(self, trainer: Trainer, tasks: Sequence[int]) -> list[int]:
        """Choose the samples of the tasks that have none yet.

        Returns:
            Those that have fewer than were asked for.

        Raises:
            ValueError: If a task has no loader or no samples, or tasks overlap.
        """
        few = []
        for task in tasks:
            if task in self._subsets:
                continue
            if task >= len(self._loaders):
                raise ValueError(
                    f"StabilityGap: task {task} has no samples to evaluate on: of {self._source} there are "
                    f"{len(self._loaders)}. Give one loader for each task, in order."
                )
            chosen = self._chosen(trainer, task)
            if chosen.samples < self._limit:
                few.append(task)
            self._subsets[task] = chosen
        return few

    def evaluate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tasks: Sequence[int],
        classes: dict[int, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the score of each task, of shape (tasks,), on the module's device; equal on all processes.

        Args:
            trainer: A Trainer in a fit.
            pl_module: Its module.
            tasks: Which tasks; their samples have been chosen.
            classes: The classes of each task that compete; ``None``: all.
            weights: Values to evaluate with in place of the live ones, by name.
        """
        metrics = self.score.metrics(tasks, pl_module.device)

        def one_pass() -> Tensor:
            return self._pass(trainer, pl_module, tasks, classes, metrics)

        if metrics:
            with agreement(trainer) as outcome, outcome:
                self._with(pl_module, weights, one_pass)
            with warnings.catch_warnings():
                # A process may have no sample of a small task.
                warnings.filterwarnings("ignore", ".*compute.*method of metric.*was called before.*update")
                return torch.stack([torch.as_tensor(metrics[task].compute()).float() for task in tasks]).detach()
        failure: Exception | None = None
        try:
            sums = self._with(pl_module, weights, one_pass)
        except Exception as error:
            if trainer.world_size == 1:
                raise
            # The other processes wait for this one's share, and see that it is not a number: no more is exchanged.
            failure, sums = error, torch.full((len(tasks),), torch.nan, device=pl_module.device)
        total: Any = trainer.strategy.reduce(sums, reduce_op="sum") if trainer.world_size > 1 else sums
        if failure is not None:
            raise failure
        counts = torch.tensor([float(self.samples(task)) for task in tasks])
        return cast(Tensor, total / counts.to(total, non_blocking=True)).detach()

    def accumulate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tasks: Sequence[int],
        add: Callable[[Any, float], None],
    ) -> None:
        """Run ``add`` on each batch of one task, with its share of all samples of ``tasks``; with gradients.

        Raises:
            RuntimeError: If it failed on another process.
        """
        total = sum(self.samples(task) for task in tasks)
        quiet = self._traceless(pl_module, steps=True)
        with agreement(trainer) as outcome, outcome, torch.enable_grad(), quiet:
            for chunk in self._prepared(trainer, pl_module, tasks, joined=False):
                with trainer.precision_plugin.train_step_context():
                    add(_copied(chunk.batch), (chunk.parts[0][2] - chunk.parts[0][1]) / total)

    @staticmethod
    def _with(
        pl_module: LightningModule, weights: Mapping[str, Tensor] | None, one_pass: Callable[[], Tensor]
    ) -> Tensor:
        return one_pass() if weights is None else call_with_weights(pl_module, weights, one_pass)

    def _chosen(self, trainer: Trainer, task: int) -> TaskSubset:
        """Choose the samples of a task, on all processes or on none."""
        chosen: TaskSubset | None = None
        with agreement(trainer) as outcome, outcome:
            chosen = choose_subset(
                self._loaders[task], task, self._limit, self._seed, trainer.global_rank, trainer.world_size
            )
        shared = share_subset(cast(TaskSubset, chosen), task, trainer)
        with agreement(trainer) as outcome, outcome:
            refuse_overlap({**self._subsets, task: shared})
        return shared

    def _pass(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tasks: Sequence[int],
        classes: dict[int, Tensor] | None,
        metrics: dict[int, Metric],
    ) -> Tensor:
        """Return the sum over this process's samples of each task."""
        sums = torch.zeros(max(tasks) + 1, device=pl_module.device)
        with torch.no_grad(), self._traceless(pl_module, steps=self.score.runs_step):
            chunks = self._prepared(trainer, pl_module, tasks, joined=self.score.joined)
            for chunk in progress(trainer, chunks, "StabilityGap: evaluation of tasks", len(chunks)):
                with trainer.precision_plugin.forward_context():
                    # A module may change its batch in place.
                    self.score.add(pl_module, chunk._replace(batch=_copied(chunk.batch)), classes, metrics, sums)
        return sums[list(tasks)]

    @contextmanager
    def _traceless(self, pl_module: LightningModule, *, steps: bool) -> Iterator[None]:
        """Evaluate, and leave the module as it was; steps of a module often collect outputs in its attributes."""
        with self._quiet(pl_module), eval_mode(pl_module), attributes_kept(pl_module) if steps else nullcontext():
            yield

    def _prepared(
        self, trainer: Trainer, pl_module: LightningModule, tasks: Sequence[int], *, joined: bool
    ) -> list[Chunk]:
        """Return the samples of tasks in chunks on the module's device."""
        groups = [tuple(tasks)] if joined else [(task,) for task in tasks]
        found = []
        for group in groups:
            if group not in self._chunks:
                if joined:
                    self._chunks.clear()  # of fewer tasks, not to be seen again
                chunks = join_subsets({task: self._subsets[task] for task in group}, self._size)
                self._chunks[group] = [_moved(trainer, pl_module, chunk) for chunk in chunks] if self._keep else chunks
            found += self._chunks[group]
        return found if self._keep else [_moved(trainer, pl_module, chunk) for chunk in found]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_loaders": [], "_subsets": {}, "_chunks": {}, "_quiet": QuietPass()}


@contextmanager
def agreement(trainer: Trainer) -> Iterator["_Outcome"]:
    """Let what runs inside fail on all processes if it fails on one, so that none waits for another.

    Raises:
        RuntimeError: Where only another process failed.
    """
    outcome = _Outcome()
    yield outcome
    well = outcome.failure is None
    if trainer.world_size > 1:
        well = trainer.strategy.reduce_boolean_decision(well)
    if outcome.failure is not None:
        raise outcome.failure
    if not well:
        raise RuntimeError("it failed on another process, whose output says why")


class _Outcome:
    """Holds an exception back until all processes know of it."""

    failure: Exception | None = None

    def __enter__(self) -> "_Outcome":
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        if isinstance(error, Exception):
            self.failure = error
            return True
        return False


def _copied(batch: Any) -> Any:
    """Return a batch whose containers and tensors are its own."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


def _moved(trainer: Trainer, pl_module: LightningModule, chunk: Chunk) -> Chunk:
    """Move a chunk to the module's device, as a validation would: without what transfers do in training alone."""
    state = cast(Any, trainer).state
    stage, trainer.validating = state.stage, True
    try:
        return chunk._replace(
            batch=to_device(trainer, pl_module, chunk.batch), owners=chunk.owners.to(pl_module.device)
        )
    finally:
        state.stage = stage
