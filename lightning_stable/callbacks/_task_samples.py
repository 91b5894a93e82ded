"""Samples of the present task, drawn evenly from its batches, for what has to be computed when the task ends."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_stable.callbacks._samples import SampleStore
from lightning_stable.callbacks._shared_samples import count_everywhere, put_everywhere
from lightning_stable.functional.replay import reservoir_places

__all__ = ["TaskSamples"]


class TaskSamples:
    """A reservoir of the present task's samples, the same in every process; each sample is as likely to be in it.

    Args:
        capacity: The largest number of samples.
        owner: Class name of the callback, for messages.
        seed: Of its own random numbers.
    """

    def __init__(self, capacity: int, owner: str, seed: int) -> None:
        self._owner = owner
        self._seed = seed
        self._store = SampleStore(capacity, owner)
        self._seen = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._store)

    def keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Take in this process's part of a batch.

        Raises:
            ValueError: If it has no samples to tell apart, or other ones than those that are kept.
        """
        sizes = count_everywhere(trainer, pl_module, self._store, batch, self._owner)
        chosen = reservoir_places(self._seen, sum(sizes), self._store.capacity, self._generator)
        put_everywhere(trainer, self._store, batch, sizes, *chosen)
        self._seen += sum(sizes)

    def share(self, trainer: Trainer, pl_module: LightningModule, like: Any) -> Iterator[Any]:
        """Yield this process's share of the samples, each a batch by itself on the module's device.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            like: A batch in whose structure they are put.
        """
        for place in range(trainer.global_rank, len(self._store), trainer.world_size):
            yield self._store.batch([place], like, pl_module.device)

    def clear(self) -> None:
        """Begin a task without samples; random numbers go on."""
        self._store.clear()
        self._seen = 0

    def reset(self) -> None:
        """Be as new."""
        self.clear()
        self._generator.manual_seed(self._seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load."""
        return {"samples": self._store.state_dict(), "seen": self._seen, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it has more samples than there is room for.
        """
        self._store.load_state_dict(state["samples"])
        self._seen = state["seen"]
        self._generator.set_state(state["generator"].cpu())
