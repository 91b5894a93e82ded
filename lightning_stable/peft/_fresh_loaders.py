"""A pass over the training data beside the run's own: it takes nothing from the run and leaves the order as it is."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_stable._glue.batches import fresh_loaders

__all__ = ["undisturbed_batches"]


@contextmanager
def undisturbed_batches(owner: str, trainer: Trainer) -> Iterator[Iterator[Any]]:
    """Yield an iterator over the run's training batches, not yet moved to a device.

    The loaders are set up as the host does it a little later, who then finds them ready. What they draw from by
    themselves (generators of loaders and samplers, counters of theirs) is afterwards as before; the global generators
    are the caller's to keep.

    Raises:
        ValueError: If the run has no training batches, or a loader can be read only once.
    """
    trainer.fit_loop.setup_data()
    # How several loaders are combined is known to the host's private loop only.
    combined = cast(Any, trainer).fit_loop._combined_loader
    if combined is None or trainer.num_training_batches == 0:
        raise ValueError(
            f"{owner} needs training batches to start the adapters from, and the run has none. Give a train dataloader "
            "that is not empty and limit_train_batches above 0, or an init that needs no data, such as 'pissa'."
        )
    for loader in combined.flattened:
        if isinstance(loader, Iterator) or isinstance(getattr(loader, "dataset", None), Iterator):
            raise ValueError(  # noqa: TRY004  data that does not fit, not a wrong type
                f"{owner}: the training data ({type(loader).__name__}) is an iterator, which gives each batch once: "
                "what the adapters start from would be missing in training. Give a loader or dataset that can be "
                "iterated again, or an init that needs no data, such as 'pissa'."
            )
    kept = [state for loader in combined.flattened for state in _states(loader)]
    fresh = fresh_loaders(combined)
    fresh.limits = combined.limits
    try:
        yield _batches(fresh)
    finally:
        for target, state in kept:
            if isinstance(target, torch.Generator):
                target.set_state(state)
            elif isinstance(state, tuple):
                target.load_state_dict(state[0])
            else:
                vars(target).clear()
                vars(target).update(state)


def _batches(loaders: Any) -> Iterator[Any]:
    """Yield batches, and begin with the first: a loader draws a seed from the global generator when it begins."""
    for batch, _, _ in loaders:
        yield batch


def _states(loader: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what iterating may change, with its present state."""
    dataset = getattr(loader, "dataset", None)
    samplers = [getattr(loader, "sampler", None), batches := getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(batches, "sampler", None))
    if not isinstance(dataset, IterableDataset):
        # Of a dataset with an index only what it draws from: a cache of its own may stay, and may be large.
        for value in getattr(dataset, "__dict__", {}).values():
            if isinstance(value, torch.Generator):
                yield value, value.get_state()
    parts = [*samplers, dataset if isinstance(dataset, IterableDataset) else None]
    for part in {id(each): each for each in [loader, *parts] if each is not None}.values():
        for value in getattr(part, "__dict__", {}).values():
            if isinstance(value, torch.Generator):
                yield value, value.get_state()
        if part is not loader and hasattr(part, "__dict__"):
            yield part, dict(vars(part))
    if not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        yield loader, (copy.deepcopy(loader.state_dict()),)
