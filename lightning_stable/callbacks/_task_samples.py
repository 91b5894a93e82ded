"""Samples of the present task, drawn evenly from its batches, for what has to be computed when the task ends."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.progress import _BatchProgress

from lightning_stable.callbacks._samples import SampleStore
from lightning_stable.callbacks._shared_samples import SharedSamples, count_everywhere, gather_samples
from lightning_stable.functional.replay import reservoir_places

__all__ = ["TaskSamples"]


class _Pending(NamedTuple):
    """What becomes of the samples when the present batch has been trained on.

    Attributes:
        samples: Those of the batch that are to be kept.
        seen: How many samples of the task came then.
        generator: The random numbers after it.
        progress: The host's counts of batches.
        processed: How many of them had been processed before it.
    """

    samples: SharedSamples
    seen: int
    generator: torch.Generator
    progress: _BatchProgress
    processed: int


class TaskSamples:
    """A reservoir of the present task's samples, the same in every process; each sample is as likely to be in it.

    A batch counts once it has been trained on, not before: one that fails comes again after a resume. An owner hands
    over each batch before it is trained on, and says when it was; its place among the callbacks makes no difference:

    - ``on_train_batch_start``: first what has to be done if a task has ended (:meth:`share`, then :meth:`clear`), then
      :meth:`begin` with the batch. The samples that would be kept are copied and sent to all processes now, so a
      training step may change the batch.
    - ``on_before_backward``: :meth:`learn`. A training step that returns ``None`` has no backward pass, so its batch
      is left out. An owner's own passes, by ``torch.autograd.grad``, do not call that hook.
    - ``on_train_batch_end``: :meth:`settle`.
    - ``state_dict``: :meth:`state_dict`. What another callback saves at the end of a batch before the owner's turn has
      that batch. No process waits for another here.
    - ``setup`` for another module, and ``on_load_checkpoint`` of a fit: :meth:`reset`.

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
        self._pending: _Pending | None = None
        self._learned = False

    def __len__(self) -> int:
        return len(self._store)

    def begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Remember this process's part of the batch that is about to be trained on.

        One before it that was not settled is taken in if the host has processed it, and is dropped otherwise.

        Raises:
            ValueError: If it has no samples to tell apart, or other ones than those that are kept.
        """
        self.settle()
        sizes = count_everywhere(trainer, pl_module, self._store, batch, self._owner)
        generator = torch.Generator()
        generator.set_state(self._generator.get_state())
        seen = self._seen + sum(sizes)
        chosen = reservoir_places(self._seen, sum(sizes), self._store.capacity, generator)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        samples = gather_samples(trainer, batch, sizes, chosen)
        self._pending = _Pending(samples, seen, generator, progress, _processed(progress))

    def learn(self) -> None:
        """Say that the present batch has a loss that is gone backward from."""
        self._learned = True

    def settle(self) -> None:
        """Take in the present batch, if it was trained on; otherwise it is as if it had not come."""
        self._take_in()
        self._pending, self._learned = None, False

    def share(self, trainer: Trainer, pl_module: LightningModule, like: Any) -> Iterator[Any]:
        """Yield this process's share of the samples, each a batch by itself on the module's device.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            like: A batch in whose structure they are put.
        """
        self.settle()
        for place in range(trainer.global_rank, len(self._store), trainer.world_size):
            yield self._store.batch([place], like, pl_module.device)

    def clear(self) -> None:
        """Begin a task without samples; random numbers go on."""
        self.settle()
        self._store.clear()
        self._seen = 0

    def reset(self) -> None:
        """Be as new."""
        self._pending, self._learned = None, False
        self.clear()
        self._generator.manual_seed(self._seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load: with the present batch, if the host has processed it."""
        self._take_in()
        return {"samples": self._store.state_dict(), "seen": self._seen, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it has more samples than there is room for.
        """
        self._pending, self._learned = None, False
        self._store.load_state_dict(state["samples"])
        self._seen = state["seen"]
        self._generator.set_state(state["generator"].cpu())

    def _take_in(self) -> None:
        """Take in the present batch if it was trained on and the host has come to its end."""
        pending = self._pending
        # The host counts a batch as processed after the optimizer step, before anyone's on_train_batch_end.
        if pending is None or not self._learned or _processed(pending.progress) <= pending.processed:
            return
        self._store.put_rows(*pending.samples)
        self._seen, self._generator, self._pending = pending.seen, pending.generator, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        self._take_in()
        return {**vars(self), "_pending": None, "_learned": False}


def _processed(progress: _BatchProgress) -> int:
    """Return how many batches have been through the optimizer, over all epochs."""
    return int(cast(Any, progress.total).processed)
