"""Loaders whose order is a function of (seed, epoch) and that resume in the middle of an epoch.

The place in the order is not counted here: it is read from the Trainer's own count of trained batches, which is in
every full checkpoint and is right wherever the checkpoint was written. With T batches trained in the whole run, k of
them in the epoch to continue, and n batches an epoch, the loader goes on with batch k of epoch ceil((T - k) / n).

Habits of the host that shape this:

* It restores loaders that have ``state_dict`` and ``load_state_dict``, and calls ``iter`` right after. That call is the
  one to continue from k. Any other reader of the loader gets a whole pass and changes nothing.
* It calls ``iter`` before its own counters are set. A loader with workers would read ahead from the wrong place, so
  nothing is read before the first batch is asked for.
* Its epoch numbers run ahead after some resumes (from an epoch's end with ``max_steps``; from the end of a fit that
  ``max_steps`` cut within an epoch). The count of batches does not.
* It replaces any sampler that is not a ``DistributedSampler`` when several processes train. Ours is one, and splits the
  order itself, so ``Trainer(use_distributed_sampler=True)`` and ``False`` mean the same.

Loaders draw from a generator of their own: how often one is iterated leaves dropout and initialisation unchanged.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

__all__ = ["EpochSampler", "ResumableLoader", "SplitDataModule", "is_real"]

_SEED_STRIDE = 2_654_435_761  # prime: neighbouring seeds do not share an order in neighbouring epochs
_TASK_STRIDE = 1_000_003  # prime as well: nor do neighbouring tasks, see data/task_stream.py


class EpochSampler(DistributedSampler[Any]):
    """Visit a dataset in an order given by (seed, epoch); every rank gets its own part, all parts of one length.

    Rank r of R takes the places r, r + R, ... of the common order; at most R - 1 samples at its end are left out. So
    the b-th batches of all ranks together are the b-th batch of one process with an R times larger batch.

    Args:
        dataset: Map-style dataset with a length.
        seed: Seed of the order.
        rank: This process, from 0.
        world_size: Number of processes that each read their own part.

    Attributes:
        start: Samples of this rank to skip at the beginning of the next iteration.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.start = 0

    @override
    def __iter__(self) -> Iterator[int]:
        # Handed over now: another reader may set both before this iteration is over.
        return self._walk(self.epoch, self.start)

    def orders(self, epoch: int) -> Iterator[Tensor]:
        """Yield the common order of an epoch, in one piece or in several that follow each other."""
        yield self.shuffled(len(self.dataset), epoch)  # type: ignore[arg-type] # sized, see Args

    def shuffled(self, size: int, epoch: int, task: int = 0) -> Tensor:
        """Return the numbers below ``size`` in the order of this seed, epoch and task."""
        # torch's CPU generator reads 32 bits of its seed.
        key = (self.seed * _SEED_STRIDE + task * _TASK_STRIDE + epoch) % 2**32
        return torch.randperm(size, generator=torch.Generator().manual_seed(key))

    def _walk(self, epoch: int, skip: int) -> Iterator[int]:
        for order in self.orders(epoch):
            part = order[self.rank : len(order) // self.num_replicas * self.num_replicas : self.num_replicas]
            yield from part[skip:].tolist()
            skip = max(0, skip - len(part))


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over an :class:`EpochSampler` that takes its place in the order from the Trainer.

    Args:
        dataset: Map-style dataset with a length.
        sampler: The order, and this process's part of it.
        batch_size: Samples in a batch of one process. The incomplete batch at an epoch's end is left out.
        num_workers: Worker processes.
        trainer: Whose progress is followed. Without one each pass is whole, and the epoch is what
            ``loader.sampler.set_epoch`` says.
        begun: Batches that the Trainer had trained on when epoch 0 of this order began.
        settings: Further numbers that fix the order, to be compared when a checkpoint is loaded.
        checksum: A number that stands for which samples there are and where, to be compared as well.
        sources: The settings that the checksum follows from, by their names, to say why it is another one.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        batch_size: int,
        num_workers: int = 0,
        trainer: Trainer | None = None,
        begun: int = 0,
        settings: dict[str, int] | None = None,
        checksum: int | None = None,
        sources: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            drop_last=True,
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self._order = sampler
        self._per_rank = batch_size
        # Any: the host's own annotations lack what is read here.
        self._trainer: Any = trainer
        self._begun = begun
        self._settings = settings or {}
        self._checksum = checksum
        self._sources = sources or {}
        self._continue = False

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator: the place is known at the first batch
        continued, self._continue = self._continue, False
        return self._batches(continued)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that fix the order; the place in it is in the Trainer's progress."""
        samples = len(self.dataset)  # type: ignore[arg-type] # sized, see Args
        global_batch_size = self._per_rank * self._order.num_replicas
        numbers = {
            "seed": self._order.seed,
            "samples": samples,
            "global_batch_size": global_batch_size,
            **self._settings,
        }
        if self._checksum is None:
            return numbers
        return {**numbers, "checksum": self._checksum, "sources": dict(self._sources)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next ``iter`` continue the Trainer's epoch.

        Settings that differ from those in ``state`` are kept, with a warning that the order is another one.
        """
        mine = self.state_dict()
        changed = _changed({name: value for name, value in mine.items() if name not in ("checksum", "sources")}, state)
        if state.get("checksum") != self._checksum:
            changed += _changed(self._sources, state.get("sources", {}))
            changed = changed or ["other samples or labels"]
        if changed:
            rank_zero_warn(
                f"The training data is not the one of the checkpoint ({', '.join(changed)}), so this run does not see "
                "the batches that the first run would have seen. Give the same data, seed and batch_size x processes."
            )
        self._continue = True

    def _batches(self, continued: bool) -> Iterator[Any]:
        done = 0
        if self._trainer is not None:
            progress = self._trainer.fit_loop.epoch_loop.batch_progress
            done = progress.current.ready if continued else 0
            an_epoch = max(1, min(len(self), self._trainer.num_training_batches))
            # `processed`, not `ready`: a batch that was handed out and failed is to be seen again.
            self._order.set_epoch(math.ceil((progress.total.processed - done - self._begun) / an_epoch))
        self._order.start = done * self._per_rank
        yield from super().__iter__()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Return whether a setting is a number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _changed(mine: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Return what differs between two sets of settings."""
    return [f"{name} {before.get(name)} -> {value}" for name, value in mine.items() if before.get(name) != value]


class SplitDataModule(LightningDataModule, ABC):
    """A datamodule of two in-memory parts: training in a resumable order, validation in the data's own.

    A subclass says how the parts are made (:meth:`_load_splits`). There is no third part: tests read the validation
    part.

    Args:
        batch_size: Samples in a batch of one process. In training the incomplete batch of an epoch is left out.
        num_workers: Worker processes of each loader.
        seed: Seed of the split and of the training order.
        validation_share: Share of the data held out, in (0, 1).

    Raises:
        ValueError: If a setting is out of range, or there is no whole training batch for every process.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int, validation_share: float) -> None:
        super().__init__()
        owner = type(self).__name__
        if not _is_whole(batch_size) or batch_size < 1:
            raise ValueError(f"{owner}: batch_size must be 1 or more samples, got {batch_size!r}.")
        if not _is_whole(num_workers) or num_workers < 0:
            raise ValueError(
                f"{owner}: num_workers must be 0 (load in the training process) or more, got {num_workers!r}."
            )
        if not _is_whole(seed):
            raise ValueError(f"{owner}: seed must be a whole number, got {seed!r}.")
        if not is_real(validation_share) or not 0.0 < validation_share < 1.0:
            raise ValueError(
                f"{owner}: validation_share must lie between 0 and 1, both excluded, got {validation_share!r}."
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.validation_share = validation_share
        self._splits: tuple[Dataset[Any], Dataset[Any]] | None = None

    @abstractmethod
    def _load_splits(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return the training and the validation part."""

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load and split the data, once for all stages."""
        self._parts()

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return this process's shuffled, resumable training batches."""
        dataset = self._parts()[0]
        trainer: Any = self.trainer  # as in ResumableLoader
        if trainer is not None and trainer.overfit_batches > 0:
            # The host wants the same few batches in every epoch, and splits a plain loader among the processes itself.
            return self._ordered(dataset)
        sampler = EpochSampler(dataset, self.seed, *self._place())
        if len(sampler) < self.batch_size:
            processes = sampler.num_replicas
            raise ValueError(
                f"batch_size={self.batch_size} on {processes} process(es) needs {self.batch_size * processes} "
                f"training samples for one batch, there are {len(dataset)}. "  # type: ignore[arg-type] # sized
                "Lower batch_size or give more data."
            )
        return ResumableLoader(dataset, sampler, self.batch_size, self.num_workers, trainer)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return the held-out samples in a fixed order."""
        return self._ordered(self._parts()[1])

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the held-out samples: there is no third part."""
        return self.val_dataloader()

    def _parts(self) -> tuple[Dataset[Any], Dataset[Any]]:
        if self._splits is None:
            self._splits = self._load_splits()
        return self._splits

    def _place(self) -> tuple[int, int]:
        """Return this process's rank among those that read their own part, and their number."""
        trainer: Any = self.trainer  # as in ResumableLoader
        split = trainer.distributed_sampler_kwargs if trainer is not None else None
        return (split["rank"], split["num_replicas"]) if split else (0, 1)

    def _ordered(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """Return a plain loader; the host splits it among processes."""
        generator = torch.Generator()
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=False, num_workers=self.num_workers, generator=generator
        )
