"""Keep the same samples in every process, from batches of which each has a part.

The whole batch is that of process 0, then that of process 1, and so on. Every process decides alike which of it are
kept, by the same random numbers; only those are sent.
"""

import zlib
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_stable.callbacks._samples import SampleStore, count_samples, sample_shapes, take_samples

__all__ = ["count_everywhere", "put_everywhere"]


def count_everywhere(
    trainer: Trainer, pl_module: LightningModule, store: SampleStore, batch: Any, owner: str
) -> list[int]:
    """Return how many samples each process has in its part of a batch.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        store: Where samples are kept, alike in every process.
        batch: This process's part.
        owner: Class name of the callback, for messages.

    Raises:
        ValueError: On every process alike, if their samples, or those that are kept, look different.
    """
    size, shapes = count_samples(batch, owner), sample_shapes(batch)
    if trainer.world_size == 1:
        store.check(shapes)
        return [size]
    own = torch.tensor([size, zlib.crc32(repr(shapes).encode())], device=pl_module.device)
    everyones = torch.stack(gather_all_tensors(own)).tolist()
    if len({signature for _, signature in everyones}) > 1:
        raise ValueError(
            f"{owner}: the processes have samples that look different, this one {shapes}, so they cannot keep the same "
            "ones. Pad sequences to one length for the whole run, and crop or resize images to one size."
        )
    store.check(shapes)
    return [size for size, _ in everyones]


def put_everywhere(
    trainer: Trainer, store: SampleStore, batch: Any, sizes: list[int], sources: list[int], places: list[int]
) -> None:
    """Keep samples of a batch of all processes.

    Args:
        trainer: The Trainer.
        store: Where samples are kept, alike in every process.
        batch: This process's part.
        sizes: What :func:`count_everywhere` returned.
        sources: Which samples of the whole batch are kept, alike in every process.
        places: Where each goes, each place once.
    """
    if not sources:
        return
    pairs = sorted(zip(sources, places, strict=True))
    rank = trainer.global_rank
    first = sum(sizes[:rank])
    own = [source - first for source, _ in pairs if first <= source < first + sizes[rank]]
    kept = take_samples(batch, torch.tensor(own, dtype=torch.long))
    if trainer.world_size > 1:
        kept = apply_to_collection(kept, Tensor, _gather)
    store.put(kept, list(range(len(pairs))), [place for _, place in pairs])


def _gather(tensor: Tensor) -> Tensor:
    """Return the rows of all processes, one process after the other."""
    return torch.cat(gather_all_tensors(tensor.detach().contiguous()))
