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
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

__all__ = ["EpochSampler", "ResumableLoader", "check_settings", "ordered_loader", "training_loader"]

_SEED_STRIDE = 2_654_435_761  # prime: neighbouring seeds do not share an order in neighbouring epochs


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
        # torch's CPU generator reads 32 bits of its seed.
        generator = torch.Generator().manual_seed((self.seed * _SEED_STRIDE + self.epoch) % 2**32)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type] # sized, see Args
        part = order[self.rank : self.total_size : self.num_replicas]
        return iter(part[self.start :].tolist())


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` over an :class:`EpochSampler` that takes its place in the order from the Trainer.

    Args:
        dataset: Map-style dataset with a length.
        sampler: The order, and this process's part of it.
        batch_size: Samples in a batch of one process. The incomplete batch at an epoch's end is left out.
        num_workers: Worker processes.
        trainer: Whose progress is followed. Without one each pass is whole, and the epoch is what
            ``loader.sampler.set_epoch`` says.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        batch_size: int,
        num_workers: int = 0,
        trainer: Trainer | None = None,
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
        self._continue = False

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # a generator: the place is known at the first batch
        continued, self._continue = self._continue, False
        return self._batches(continued)

    def state_dict(self) -> dict[str, int]:
        """Return the settings that fix the order; the place in it is in the Trainer's progress."""
        samples = len(self.dataset)  # type: ignore[arg-type] # sized, see Args
        world_size = self._order.num_replicas
        return {"seed": self._order.seed, "samples": samples, "global_batch_size": self._per_rank * world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next ``iter`` continue the Trainer's epoch.

        Settings that differ from those in ``state`` are kept, with a warning that the order is another one.
        """
        changed = [f"{key} {state[key]} -> {value}" for key, value in self.state_dict().items() if state[key] != value]
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
            self._order.set_epoch(math.ceil((progress.total.processed - done) / an_epoch))
        self._order.start = done * self._per_rank
        yield from super().__iter__()


def training_loader(
    datamodule: LightningDataModule, dataset: Dataset[Any], *, batch_size: int, num_workers: int, seed: int
) -> DataLoader[Any]:
    """Return the shuffled, resumable loader of this process for training.

    Args:
        datamodule: Asked for its Trainer: the processes, the progress, and whether to overfit a few batches.
        dataset: Map-style dataset with a length.
        batch_size: Samples in a batch of one process.
        num_workers: Worker processes.
        seed: Seed of the order.

    Raises:
        ValueError: If there is not one whole batch for every process.
    """
    trainer: Any = datamodule.trainer  # as in ResumableLoader
    if trainer is not None and trainer.overfit_batches > 0:
        # The host wants the same few batches in every epoch, and splits a plain loader among the processes itself.
        return ordered_loader(dataset, batch_size=batch_size, num_workers=num_workers)
    split = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {"num_replicas": 1, "rank": 0}
    sampler = EpochSampler(dataset, seed, split["rank"], split["num_replicas"])
    if len(sampler) < batch_size:
        raise ValueError(
            f"batch_size={batch_size} on {sampler.num_replicas} process(es) needs {batch_size * sampler.num_replicas} "
            f"training samples for one batch, there are {len(dataset)}. "  # type: ignore[arg-type] # sized, see Args
            "Lower batch_size or give more data."
        )

    return ResumableLoader(dataset, sampler, batch_size, num_workers, trainer)


def ordered_loader(dataset: Dataset[Any], *, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Return a plain loader in the dataset's own order, for evaluation. The host splits it among processes."""
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=False, num_workers=num_workers, generator=torch.Generator()
    )


def check_settings(batch_size: int, num_workers: int, validation_share: float) -> None:
    """Raise a ``ValueError`` that names the first setting out of range."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more samples, got {batch_size!r}.")
    if num_workers < 0:
        raise ValueError(f"num_workers must be 0 (load in the training process) or more, got {num_workers!r}.")
    if not 0.0 < validation_share < 1.0:
        raise ValueError(f"validation_share must lie between 0 and 1, both excluded, got {validation_share!r}.")
