"""In which order a task stream is trained on, and which part of it a fit has."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_stable.data._resumable import EpochSampler

__all__ = ["ChosenTask", "StreamSampler"]


class StreamSampler(EpochSampler):
    """Visit the samples of tasks one task after the other, each for some epochs of whole batches over all processes.

    Args:
        dataset: The dataset of all samples.
        samples: The indices of each task's samples.
        epochs: Epochs of each task in one epoch of this sampler.
        batch_size: Samples in a batch of one process.
        seed: Seed of the order.
        rank: This process, from 0.
        world_size: Number of processes that each read their own part.

    Attributes:
        batches: How many batches each task has.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        samples: dict[int, Tensor],
        epochs: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(dataset, seed, rank, world_size)
        self.tasks = list(samples)
        self._samples = samples
        self._epochs = epochs
        self._whole = batch_size * world_size
        self.batches = [len(indices) // self._whole * epochs for indices in samples.values()]
        self.num_samples = sum(self.batches) * batch_size
        self.total_size = self.num_samples * world_size

    @override
    def orders(self, epoch: int) -> Iterator[Tensor]:
        for task, indices in self._samples.items():
            used = len(indices) // self._whole * self._whole
            for place in range(epoch * self._epochs, (epoch + 1) * self._epochs):
                yield indices[self.shuffled(len(indices), place, task)[:used]]


class ChosenTask:
    """Which task the fits train on, ``None`` for the whole stream, and since when its epochs count.

    Attributes:
        task: In the present fit.
        wanted: From the next fit on.
        anew: Whether that was asked for and no fit has begun since.
        begun: Batches that the Trainer had trained on when the present task, or the stream, was begun.
        ready: Batches that it had begun with when the present fit was set up.
    """

    def __init__(self) -> None:
        self.task: int | None = None
        self.wanted: int | None = None
        self.anew = False
        self.begun = 0
        self.ready = 0
        self._insists = False
        self._trainer: Trainer | None = None

    def take(self, trainer: Any) -> None:
        """Begin with what is wanted."""
        total = trainer.fit_loop.epoch_loop.batch_progress.total if trainer is not None else None
        if self.anew or trainer is not self._trainer:
            self.begun = total.processed if total is not None else 0
        self.ready = total.ready if total is not None else 0
        self.task, self._insists, self.anew, self._trainer = self.wanted, self.anew, False, trainer

    def state_dict(self, trainer: Any) -> dict[str, int]:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed if trainer is not None else 0
        return {"task": -1 if self.task is None else self.task, "begun": self.begun, "batches": batches}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        task = None if state["task"] < 0 else state["task"]
        if self._insists and task != self.task:
            self.begun = state["batches"]
        else:
            self.task, self.wanted, self.begun = task, task, state["begun"]
