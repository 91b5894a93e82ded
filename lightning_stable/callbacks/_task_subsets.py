"""The held-out samples that each task is evaluated on: chosen once, kept as tensors, joined for few large passes."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from lightning_stable.callbacks._samples import count_samples, take_samples

__all__ = ["Chunk", "TaskSubset", "choose_subset", "find_loaders", "join_subsets", "refuse_overlap", "to_device"]

# Apart, so that tasks of the same length do not take samples of the same places.
_SEED_STRIDE = 1_000_003
# Above this share of equal samples two tasks are the same data; below it, data sets have their own duplicates.
_SHARED = 0.05


class TaskSubset(NamedTuple):
    """The samples that one task is evaluated on.

    Attributes:
        batch: Those of this process, collated, on the CPU; ``None`` if it has none.
        samples: How many there are on all processes together.
        origin: The dataset below all ``Subset`` and the indices in it, if they are known: to find overlaps.
        fingerprints: One number for each sample of this process, equal for equal samples.
    """

    batch: Any
    samples: int
    origin: tuple[Any, frozenset[int]] | None
    fingerprints: frozenset[int]


class Chunk(NamedTuple):
    """Samples of several tasks that are evaluated in one pass.

    Attributes:
        batch: The samples.
        parts: For each task in it: the task, and the first sample and the one after the last.
    """

    batch: Any
    parts: list[tuple[int, int, int]]


def find_loaders(trainer: Trainer, given: Sequence[Any] | None) -> tuple[list[Any], str]:
    """Return one loader for each task, and where they come from.

    Raises:
        ValueError: If there are none.
    """
    if given is not None:
        return list(given), "loaders"
    datamodule: Any = getattr(trainer, "datamodule", None)
    if hasattr(datamodule, "task_dataloaders"):
        return list(datamodule.task_dataloaders()), f"{type(datamodule).__name__}.task_dataloaders()"
    found = trainer.val_dataloaders
    if isinstance(found, dict):
        found = list(found.values())
    loaders = list(found) if isinstance(found, (list, tuple)) else [found] if found is not None else []
    if not loaders:
        raise ValueError(
            "StabilityGap has nothing to evaluate on: the Trainer has no validation dataloader, and its datamodule no "
            "task_dataloaders(). Give one loader for each task: StabilityGap(loaders=[...])."
        )
    return loaders, "the Trainer's validation dataloaders"


def choose_subset(loader: Any, task: int, limit: int, seed: int, rank: int, world_size: int) -> TaskSubset:
    """Take at most ``limit`` samples of a loader's dataset, the same each time, and this process's share of them.

    A dataset without a length gives its first samples. Random numbers are left as they were.

    Raises:
        ValueError: If there are no samples.
    """
    with isolate_rng():
        if not _has_places(loader):
            return _first_samples(loader, task, limit, rank, world_size)
        places = _places(loader)
        generator = torch.Generator().manual_seed((seed * _SEED_STRIDE + task) % 2**32)
        places = sorted(places[place] for place in torch.randperm(len(places), generator=generator)[:limit].tolist())
        if not places:
            raise ValueError(_empty(task))
        mine = places[rank::world_size]
        batch = loader.collate_fn([loader.dataset[place] for place in mine]) if mine else None
        return TaskSubset(batch, len(places), _origin(loader.dataset, places), _fingerprints(batch))


def refuse_overlap(subsets: dict[int, TaskSubset]) -> None:
    """Raise ``ValueError`` if two tasks are evaluated on the same samples.

    Indices of a common dataset may not meet at all. Where there are none, samples are compared: data sets have a few
    duplicates of their own.
    """
    known = list(subsets.items())
    for place, (task, subset) in enumerate(known):
        for other, earlier in known[:place]:
            shared, smaller = _shared(subset, earlier)
            if shared:
                raise ValueError(
                    f"Tasks {other} and {task} overlap in evaluation: {shared} of {smaller} samples of the smaller one "
                    "are in both, so forgetting of one cannot be told from the other. Give each task loader samples "
                    "of its own."
                )


def join_subsets(subsets: dict[int, TaskSubset], size: int) -> list[Chunk]:
    """Return the samples of all tasks in chunks of at most ``size``, joined over tasks where their shapes allow it."""
    held = [(task, subset.batch) for task, subset in subsets.items() if subset.batch is not None]
    chunks: list[Chunk] = []
    for group in _groups(held):
        sizes = [count_samples(batch, "StabilityGap") for _, batch in group]
        joined = _concatenate([batch for _, batch in group])
        ends = torch.tensor(sizes).cumsum(0).tolist()
        spans = [(task, end - length, end) for (task, _), length, end in zip(group, sizes, ends, strict=True)]
        for first in range(0, ends[-1], size):
            last = min(first + size, ends[-1])
            parts = [(task, max(start, first) - first, min(end, last) - first) for task, start, end in spans]
            whole = first == 0 and last == ends[-1]
            batch = joined if whole else take_samples(joined, torch.arange(first, last))
            chunks.append(Chunk(batch, [part for part in parts if part[1] < part[2]]))
    return chunks


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Move a batch as the host's evaluation loop does.

    The one private call here, ``_on_before_batch_transfer``, is how the host honours that hook on a datamodule.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _has_places(loader: Any) -> bool:
    """Tell whether a loader's samples can be asked for by their place."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    indexed = hasattr(loader.dataset, "__getitem__") and hasattr(loader.dataset, "__len__")
    return indexed and loader.batch_sampler is not None


def _places(loader: DataLoader[Any]) -> Sequence[int]:
    """Return the places in the dataset that a loader reads: all, unless its sampler is one that chooses."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        return range(len(loader.dataset))  # type: ignore[arg-type] # has a length, checked before
    chosen: Any = loader.batch_sampler
    return sorted({int(place) for places in chosen for place in places})


def _first_samples(loader: Iterable[Any], task: int, limit: int, rank: int, world_size: int) -> TaskSubset:
    """Take the first samples that an iterable of batches gives."""
    batches, found = [], 0
    for batch in loader:
        batches.append(batch)
        found += count_samples(batch, "StabilityGap")
        if found >= limit:
            break
    found = min(found, limit)
    if not found:
        raise ValueError(_empty(task))
    mine = torch.arange(found)[rank::world_size]
    batch = take_samples(_concatenate(batches), mine) if len(mine) else None
    return TaskSubset(batch, found, None, _fingerprints(batch))


def _empty(task: int) -> str:
    return (
        f"StabilityGap: task {task} has no samples to evaluate on. Give it some, or leave the task out of the loaders."
    )


def _origin(dataset: Any, places: list[int]) -> tuple[Any, frozenset[int]]:
    """Follow a chain of subsets down to the dataset that they are of."""
    while isinstance(dataset, Subset):
        places = [int(dataset.indices[place]) for place in places]
        dataset = dataset.dataset
    return dataset, frozenset(places)


def _shared(one: TaskSubset, other: TaskSubset) -> tuple[int, int]:
    """Return how many samples two tasks share, if that is too many, and how many the smaller has."""
    if one.origin is not None and other.origin is not None and one.origin[0] is other.origin[0]:
        return len(one.origin[1] & other.origin[1]), min(len(one.origin[1]), len(other.origin[1]))
    smaller = min(len(one.fingerprints), len(other.fingerprints))
    shared = len(one.fingerprints & other.fingerprints)
    return (shared if shared > _SHARED * smaller else 0), smaller


def _fingerprints(batch: Any) -> frozenset[int]:
    """Return one number for each sample, from all its values."""
    if batch is None:
        return frozenset()
    rows = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
    return frozenset(hash(b"".join(row[place].numpy().tobytes() for row in rows)) for place in range(len(rows[0])))


def _groups(held: Sequence[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Yield the tasks whose samples can be joined, in order: equal structures and shapes."""
    groups: dict[Any, list[tuple[int, Any]]] = {}
    for task, batch in held:
        leaves, structure = tree_flatten(batch)
        shapes = [(leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        groups.setdefault((str(structure), str(shapes)), []).append((task, batch))
    yield from groups.values()


def _concatenate(batches: list[Any]) -> Any:
    """Join batches of the same structure along the samples."""
    if len(batches) == 1:
        return batches[0]
    flattened = [tree_flatten(batch)[0] for batch in batches]
    joined = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*flattened, strict=True)]
    return tree_unflatten(joined, tree_flatten(batches[0])[1])
