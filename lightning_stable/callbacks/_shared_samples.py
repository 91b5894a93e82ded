"""Keep the same samples in every process, from batches of which each has a part.

The whole batch is that of process 0, then that of process 1, and so on. Every process decides alike which of it are
kept, by the same random numbers; only those are sent.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed
from torch.utils.data import default_collate

from lightning_stable.callbacks._samples import SampleStore, count_samples, sample_rows, sample_shapes
from lightning_stable.functional.replay import Placing

__all__ = ["SharedSamples", "count_everywhere", "gather_classes", "gather_samples"]


class SharedSamples(NamedTuple):
    """Samples that are to be kept, alike in every process.

    Attributes:
        rows: Their tensors, by where they are in a batch.
        places: Where each sample goes, each place once.
    """

    rows: dict[str, Tensor]
    places: list[int]


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
        ValueError: If it cannot be taken apart into samples; on every process alike, if their samples, or those that
            are kept, look different.
    """
    size, shapes = count_samples(batch, owner), sample_shapes(batch)
    _refuse_one_tensor_each(trainer, batch, size, owner)
    if trainer.world_size == 1:
        store.check(shapes)
        return [size]
    own = torch.tensor([size, zlib.crc32(repr(shapes).encode())], device=pl_module.device)
    everyones = torch.stack(_gather(own, trainer.world_size)).tolist()
    if len({signature for _, signature in everyones}) > 1:
        raise ValueError(
            f"{owner}: the processes have samples that look different, this one {shapes}, so they cannot keep the same "
            "ones. Pad sequences to one length for the whole run, and crop or resize images to one size."
        )
    store.check(shapes)
    return [size for size, _ in everyones]


def gather_samples(trainer: Trainer, batch: Any, sizes: list[int], chosen: Placing) -> SharedSamples:
    """Return some samples of a batch of all processes, as copies.

    Args:
        trainer: The Trainer.
        batch: This process's part.
        sizes: What :func:`count_everywhere` returned.
        chosen: Which samples of the whole batch, and the place where each is to go, alike in every process.
    """
    pairs = sorted(zip(*chosen, strict=True))
    if not pairs:
        return SharedSamples({}, [])
    ends = list(accumulate(sizes))
    parts = [
        [source - end + size for source, _ in pairs if end - size <= source < end]
        for size, end in zip(sizes, ends, strict=True)
    ]
    own = torch.tensor(parts[trainer.global_rank], dtype=torch.long)
    rows = {path: tensor.detach()[own.to(tensor.device)] for path, tensor in sample_rows(batch).items()}
    if trainer.world_size > 1:
        rows = {path: _gather_rows(tensor, [*map(len, parts)]) for path, tensor in rows.items()}
    return SharedSamples(rows, [place for _, place in pairs])


def gather_classes(classes: Tensor, sizes: list[int]) -> list[int]:
    """Return the class of each sample of a batch of all processes.

    Args:
        classes: Those of this process's part, on the module's device.
        sizes: What :func:`count_everywhere` returned.
    """
    found: list[int] = (classes if len(sizes) == 1 else _gather_rows(classes, sizes)).tolist()
    return found


def _gather_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """Return the rows of all processes, one process after the other; each knows how many all have."""
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    found = _gather(padded, len(counts))
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def _gather(tensor: Tensor, world_size: int) -> list[Tensor]:
    """Return the tensor of each process; all have the same shape."""
    found = [torch.empty_like(tensor) for _ in range(world_size)]
    distributed.all_gather(found, tensor)
    return found


def _refuse_one_tensor_each(trainer: Trainer, batch: Any, size: int, owner: str) -> None:
    """Raise if a list has one tensor for each sample: the first dimension that these share is not that of samples."""
    loader = trainer.train_dataloader
    expected = getattr(loader, "batch_size", None)
    # The last batch may be smaller, so its number of tensors tells nothing; torch's own collate makes no such lists.
    if size == expected or trainer.is_last_batch or getattr(loader, "collate_fn", None) is default_collate:
        return
    if any(len(tensors) == expected for tensors in _lists_of_tensors(batch)):
        raise ValueError(
            f"{owner} takes batches apart into samples, along a first dimension that all tensors of the batch have in "
            f"common. This batch has a list of {expected} tensors, as many as batch_size of its loader, and they have "
            f"{size} rows each: one tensor for each sample, it seems. Let collate_fn stack them to one tensor."
        )


def _lists_of_tensors(batch: Any) -> Iterator[Sequence[Tensor]]:
    """Yield the lists and tuples within a batch that hold tensors of one shape and nothing else."""
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(parts, (list, tuple)):
        return
    if not isinstance(batch, Mapping) and parts and all(isinstance(part, Tensor) for part in parts):
        if len({part.shape for part in parts}) == 1:
            yield parts
        return
    for part in parts:
        yield from _lists_of_tensors(part)
