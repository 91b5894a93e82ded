"""The held-out samples that each task is evaluated on: chosen once, kept as tensors, joined for few large passes."""

import copy
import random
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from lightning_stable.callbacks._samples import count_samples, take_samples

__all__ = [
    "Chunk",
    "TaskSubset",
    "choose_subset",
    "find_loaders",
    "join_subsets",
    "refuse_overlap",
    "share_subset",
]

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
        owners: The task of each sample.
    """

    batch: Any
    parts: list[tuple[int, int, int]]
    owners: Tensor


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
            "StabilityGap has nothing to evaluate on: at the start of training the Trainer has loaded no validation "
            "dataloader, and its datamodule has no task_dataloaders(). Give one loader for each task: "
            "StabilityGap(loaders=[...])."
        )
    return loaders, "the Trainer's validation dataloaders"


def choose_subset(loader: Any, task: int, limit: int, seed: int, rank: int, world_size: int) -> TaskSubset:
    """Take at most ``limit`` samples of a loader's dataset, the same each time, and this process's share of them.

    A dataset without places gives its first samples. Random numbers, and the loader with its sampler, are left as they
    were: what is read is a copy.

    Raises:
        ValueError: If there are no samples, or they cannot be told apart.
    """
    with isolate_rng():
        _seed((seed * _SEED_STRIDE + task) % 2**32)
        if not _has_places(loader):
            return _first_samples(loader, task, limit)
        found = _places(loader)
        places = sorted(found[place] for place in torch.randperm(len(found))[:limit].tolist())
        if not places:
            raise ValueError(_empty(task))
        mine = places[rank::world_size]
        batch = loader.collate_fn([loader.dataset[place] for place in mine]) if mine else None
        return TaskSubset(batch, len(places), _origin(loader.dataset, places), _fingerprints(batch))


def share_subset(subset: TaskSubset, task: int, trainer: Trainer) -> TaskSubset:
    """Settle with the other processes which samples each has; all have to call this, and all raise together.

    Raises:
        ValueError: If the processes chose other samples where a dataset has places.
    """
    if trainer.world_size == 1:
        return subset
    own = 0 if subset.batch is None else count_samples(subset.batch, "StabilityGap")
    chosen = sorted(subset.fingerprints) if subset.origin is None else sorted(subset.origin[1])
    mark = zlib.crc32(repr(chosen).encode())
    everyone: Any = trainer.strategy.all_gather(torch.tensor([own, mark], device=trainer.strategy.root_device))
    counts, marks = everyone[:, 0].tolist(), everyone[:, 1].tolist()
    if subset.origin is not None:
        if len(set(marks)) > 1:
            raise ValueError(
                f"StabilityGap: the processes chose other samples of task {task}. Its dataset or its sampler differs "
                "from process to process; give the same to all."
            )
        return subset
    if len(set(marks)) > 1:
        return subset._replace(samples=int(sum(counts)))  # a stream that gives each process samples of its own
    mine = torch.arange(own)[trainer.global_rank :: trainer.world_size]
    batch = take_samples(subset.batch, mine) if len(mine) else None
    return subset._replace(batch=batch, samples=own, fingerprints=_fingerprints(batch))


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
            held_parts = [part for part in parts if part[1] < part[2]]
            owners = torch.tensor([task for task, start, end in held_parts for _ in range(end - start)])
            chunks.append(Chunk(batch, held_parts, owners))
    return chunks


def _has_places(loader: Any) -> bool:
    """Tell whether a loader's samples can be asked for by their place."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    indexed = hasattr(loader.dataset, "__getitem__") and hasattr(loader.dataset, "__len__")
    return indexed and loader.batch_sampler is not None


def _places(loader: DataLoader[Any]) -> Sequence[int]:
    """Return the places in the dataset that a loader reads: all, unless its sampler is one that chooses."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, (SequentialSampler, DistributedSampler)):
        return range(len(loader.dataset))  # type: ignore[arg-type] # has a length, checked before
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        return range(len(loader.dataset))  # type: ignore[arg-type]
    chosen: Any = copy.deepcopy(loader.batch_sampler)
    if isinstance(getattr(chosen, "sampler", None), Sampler) and getattr(chosen.sampler, "generator", None) is not None:
        chosen.sampler.generator = None  # drawn from the numbers that were seeded for this
    return sorted({int(place) for places in chosen for place in places})


def _seed(seed: int) -> None:
    """Seed every generator that datasets and samplers draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _first_samples(loader: Iterable[Any], task: int, limit: int) -> TaskSubset:
    """Take the first samples that an iterable of batches gives."""
    batches, found = [], 0
    for batch in _copied(loader):
        batches.append(batch)
        found += count_samples(batch, "StabilityGap")
        if found >= limit:
            break
    if not found:
        raise ValueError(_empty(task))
    batch = take_samples(_concatenate(batches), torch.arange(min(found, limit)))
    return TaskSubset(batch, min(found, limit), None, _fingerprints(batch))


def _copied(loader: Any) -> Iterable[Any]:
    """Return an iterable that leaves the loader, its workers and its dataset where they are."""
    if not isinstance(loader, DataLoader):
        copied: Iterable[Any] = copy.deepcopy(loader)
        return copied
    settings: dict[str, Any] = {"collate_fn": loader.collate_fn, "batch_size": loader.batch_size}
    if not isinstance(loader.dataset, IterableDataset):
        settings["sampler"] = copy.deepcopy(loader.sampler)
    return DataLoader(copy.deepcopy(loader.dataset), **settings)


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
    """Return one number for each sample, from all its values; the same in every process."""
    if batch is None:
        return frozenset()
    samples = count_samples(batch, "StabilityGap")
    leaves = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.numel()]
    rows = [leaf.cpu().reshape(samples, -1).contiguous().view(torch.uint8).numpy() for leaf in leaves]
    return frozenset(zlib.crc32(b"".join(row[place].tobytes() for row in rows)) for place in range(samples))


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
