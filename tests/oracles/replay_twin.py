"""Replay in one process that sees the samples as two do together, and the jobs that run it in two processes."""

import os
import tempfile
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks._samples import count_samples, take_samples
from lightning_stable.callbacks.replay import Replay
from lightning_stable.testing.harness import Net, fit
from lightning_stable.testing.streams import BATCHES, FEATURES, Stream

STEPS = 14
PROCESSES = 2
DDP: dict[str, Any] = {"devices": PROCESSES, "strategy": "ddp"}


class SharedReplay(Replay):
    """Replay whose batch is that of two processes, one after the other, as the contracts' stream deals it out.

    Each process replays ``batch_size`` samples, so together they replay twice as many; and they keep the samples of
    rank 0 first, then those of rank 1.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.batch_size is not None:
            self.batch_size *= PROCESSES

    @override
    def _keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        numbers = torch.arange(count_samples(batch, "SharedReplay"))
        shares = [numbers[(rank + trainer.current_epoch) % PROCESSES :: PROCESSES] for rank in range(PROCESSES)]
        super()._keep(trainer, pl_module, take_samples(batch, torch.cat(shares)))


class Labelled(Net):
    """Notes the batches of its training steps; its samples may have a class as a third entry."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.notes: list[tuple[Tensor, ...]] = []

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch[:2])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.notes.append(tuple(part.detach().clone() for part in batch))
        return super().training_step(batch, batch_idx)


def labelled(batches: int = BATCHES) -> Stream:
    """Return a stream with the classes 0, 1, 2 and, rarely, 3."""
    stream = Stream(batches)
    numbers = torch.arange(len(stream.dataset))
    classes = torch.where(numbers % 11 == 0, 3, numbers % 3)
    stream.dataset.tensors = (*stream.dataset.tensors, classes)
    return stream


def balanced_job(**settings: Any) -> dict[str, Any]:
    """Run in each of two processes: a stream with classes."""
    os.chdir(tempfile.mkdtemp())
    replay = Replay(policy="class_balanced", labels="2", **settings)
    run = fit([replay], module=Labelled(norm=False), train=labelled(), max_steps=STEPS, **DDP)
    return {**run.snapshot(), "notes": run.module.notes}


def uneven_job(rows: list[int], width: int | None = None, **settings: Any) -> dict[str, Any]:
    """Run in each of two processes: batches of so many samples on each, rank 1's of another width if one is given."""
    os.chdir(tempfile.mkdtemp())
    rank = int(os.environ["RANK"])
    features = width if width is not None and rank == 1 else FEATURES
    numbers = torch.arange(4.0 * rows[rank]) + 1000 * rank
    dataset = TensorDataset(numbers[:, None].expand(-1, features), numbers[:, None])
    replay = Replay(**settings)
    module = Labelled(norm=False, rates=(0.0, 0.0))
    try:
        run = fit([replay], module=module, train=DataLoader(dataset, batch_size=rows[rank]), max_steps=4, **DDP)
    except ValueError as error:
        return {"error": str(error)}
    return {**run.snapshot(), "notes": module.notes}


class Keyed(Labelled):
    """Has batches of two entries of one shape, on rank 1 in the other order."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["inputs"], batch["labels"]), batch_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        entries = {"inputs": batch[0], "labels": batch[0] + 100}
        return dict(sorted(entries.items(), reverse=self.trainer.global_rank == 1))


def keyed_job(**settings: Any) -> dict[str, Any]:
    """Run in each of two processes: two batches of two samples on each, in dictionaries."""
    os.chdir(tempfile.mkdtemp())
    numbers = torch.arange(4.0) + 1000 * int(os.environ["RANK"])
    train = DataLoader(TensorDataset(numbers[:, None].expand(-1, FEATURES)), batch_size=2)
    module = Keyed(norm=False, rates=(0.0, 0.0))
    run = fit([Replay(**settings)], module=module, train=train, max_steps=2, **DDP)
    return {**run.snapshot(), "notes": module.notes}
