"""Evaluate a module on fixed samples of several tasks inside training, in few passes, and leave no trace of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_stable.callbacks._evaluate import eval_mode
from lightning_stable.callbacks._quiet import QuietPass
from lightning_stable.callbacks._reference import call_with_weights
from lightning_stable.callbacks._task_scores import TaskScore
from lightning_stable.callbacks._task_subsets import (
    Chunk,
    TaskSubset,
    choose_subset,
    find_loaders,
    join_subsets,
    refuse_overlap,
    to_device,
)

__all__ = ["TaskEvaluation"]


class TaskEvaluation:
    """The fixed samples of each task, and passes over them.

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
        self.quiet = QuietPass()

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
        self._chunks, self.quiet = {}, QuietPass()

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

    def choose(self, trainer: Trainer, tasks: Sequence[int]) -> list[str]:
        """Choose the samples of the tasks that have none yet.

        Returns:
            What the user is to know of it, once.

        Raises:
            ValueError: If a task has no loader or no samples, or tasks overlap.
        """
        notes = []
        for task in tasks:
            if task in self._subsets:
                continue
            if task >= len(self._loaders):
                raise ValueError(
                    f"StabilityGap: task {task} has no samples to evaluate on: {self._source} has {len(self._loaders)} "
                    "loader(s). Give one for each task, in order."
                )
            chosen = choose_subset(
                self._loaders[task], task, self._limit, self._seed, trainer.global_rank, trainer.world_size
            )
            self._subsets[task] = chosen
            try:
                refuse_overlap(self._subsets)
            except ValueError:
                del self._subsets[task]
                raise
            if chosen.samples < self._limit:
                notes.append(f"task {task} has {chosen.samples} samples, fewer than subset={self._limit}: all are used")
        return notes

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
        metrics: dict[int, Metric] = {}
        failure: Exception | None = None
        try:
            if weights is None:
                sums = self._pass(trainer, pl_module, tasks, classes, metrics)
            else:
                sums = call_with_weights(
                    pl_module, weights, lambda: self._pass(trainer, pl_module, tasks, classes, metrics)
                )
        except Exception as error:
            if trainer.world_size == 1:
                raise
            # The other processes wait for this one's share.
            failure, sums = error, torch.full((len(tasks),), torch.nan, device=pl_module.device)
        if self.score.of_metric:
            found = torch.stack([torch.as_tensor(metrics[task].compute()).float() for task in tasks])
        else:
            total: Any = trainer.strategy.reduce(sums, reduce_op="sum") if trainer.world_size > 1 else sums
            counts = torch.tensor([float(self.samples(task)) for task in tasks])
            found = total / counts.to(total, non_blocking=True)
        if failure is not None:
            raise failure
        return found.detach()

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
        with torch.no_grad(), self.quiet(pl_module), eval_mode(pl_module):
            for chunk in self.prepared(trainer, pl_module, tasks, joined=self.score.joined):
                with trainer.precision_plugin.forward_context():
                    found = self.score.sums(pl_module, chunk, classes, metrics)
                for task, value in found.items():
                    sums[task] += value
        return sums[list(tasks)]

    def prepared(
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
                self._chunks[group] = (
                    [self._moved(trainer, pl_module, chunk) for chunk in chunks] if self._keep else chunks
                )
            found += self._chunks[group]
        return found if self._keep else [self._moved(trainer, pl_module, chunk) for chunk in found]

    def _moved(self, trainer: Trainer, pl_module: LightningModule, chunk: Chunk) -> Chunk:
        return chunk._replace(batch=to_device(trainer, pl_module, chunk.batch))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_loaders": [], "_subsets": {}, "_chunks": {}, "quiet": QuietPass()}
