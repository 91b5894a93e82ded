"""Which dataset indices form the current training batch, without touching the dataset or the loader's class.

A spy takes the place of the train loader's batch sampler and notes the indices that pass through it. The loader yields
its batches in the order in which it drew their indices, whatever workers and prefetching do, so the n-th batch of a
pass has the n-th indices.

Habits of the host that shape this:

* It prepares the loader and begins a pass before ``on_train_start``, and before ``on_fit_start`` if the module asks for
  the number of steps. So the spy goes in where the host prepares it: a wrap around the strategy's
  ``process_dataloader``, put on in ``setup``.
* Anybody may read the train loader beside the host, which begins a pass too. The host's is the latest one that has not
  ended when the first batch of an epoch arrives.
* A ``DataLoader`` refuses a new ``batch_sampler`` by assignment; the instance's own dictionary takes it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from lightning_stable._glue.method_wrap import MethodWrap

__all__ = ["SampleIds"]


class SampleIds:
    """Knows the dataset indices of the batch that the host trains on.

    Args:
        owner: Class name of the callback, for messages.
        instead: What to use where there are no indices, for messages.

    Attributes:
        samples: Samples in the dataset, once training has begun.
    """

    def __init__(self, owner: str, instead: str) -> None:
        self._owner = owner
        self._instead = instead
        self._wrap: MethodWrap | None = None
        self._spy: _Spy | None = None
        self._pass: _Pass | None = None
        self._first: int | None = None
        self.samples = 0

    def attach(self, trainer: Trainer) -> None:
        """Watch the train loader that the host is about to prepare; in ``setup``."""
        self.undo()

        def around(original: Callable[[Any], Any], loader: Any) -> Any:
            prepared = original(loader)
            # The host prepares the loaders for validation by the same method.
            if trainer.training:
                self._watch(prepared)
            return prepared

        self._wrap = MethodWrap(trainer.strategy, "process_dataloader", around)

    def check(self, trainer: Trainer) -> None:
        """Raise ``ValueError`` unless the Trainer's train loader is the one that is watched."""
        loader = trainer.train_dataloader
        if self._spy is None or not isinstance(loader, DataLoader) or loader.batch_sampler is not self._spy:
            raise ValueError(
                f"{self._owner} needs one torch DataLoader for training, to know which samples form a batch; this "
                f"Trainer has {type(loader).__name__}. {self._instead}"
            )

    def next_epoch(self) -> None:
        """Expect a pass that begins with batch 0; in ``on_train_epoch_start``, which no epoch has that is resumed."""
        self._pass, self._first = None, 0

    def next_batch(self, batch_idx: int) -> None:
        """Go on to the batch that training begins with now, in ``on_train_batch_start``."""
        if self._spy is None:
            return
        if self._pass is None:
            self._pass = self._spy.latest()
            self._first = batch_idx if self._first is None else self._first
        # A batch that a collate function gave up comes as None, and the host calls no hook for it.
        while self._pass and len(self._pass.waiting) > 1 and self._pass.taken < batch_idx - (self._first or 0):
            self._pass.take()
        if not self._pass or not self._pass.waiting:
            raise ValueError(
                f"{self._owner}: a training batch came from outside the DataLoader's own sampling, so its samples are "
                f"not known. {self._instead}"
            )
        self._pass.take()

    @property
    def current(self) -> list[int]:
        """The indices of the batch in training, in its order."""
        return [] if self._pass is None else self._pass.current

    def undo(self) -> None:
        """Take the spy and the wrap off."""
        if self._spy is not None:
            self._spy.leave()
        if self._wrap is not None:
            self._wrap.undo()
        self._wrap, self._spy, self._pass, self._first = None, None, None, None

    def _watch(self, loader: Any) -> None:
        """Put the spy in a loader's batch sampler.

        Raises:
            ValueError: If the loader's samples have no lasting index, or may be drawn several times an epoch.
        """
        if self._spy is not None:
            self._spy.leave()
            self._spy, self._pass = None, None
        if not isinstance(loader, DataLoader):
            return  # check() says so
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            what = type(loader.dataset).__name__ if loader.batch_sampler is not None else "batch_size=None"
            raise ValueError(
                f"{self._owner} keeps a record for each sample of the dataset, and this train loader has none to count "
                f"({what}): it needs a map-style dataset with a length, batched by the DataLoader. {self._instead}"
            )
        if not getattr(loader, "in_order", True):
            raise ValueError(
                f"{self._owner} matches batches to samples by their order, and this train loader has in_order=False. "
                f"Set in_order=True. {self._instead}"
            )
        sampler = getattr(loader.batch_sampler, "sampler", None)
        if isinstance(sampler, (WeightedRandomSampler, RandomSampler)) and sampler.replacement:
            raise ValueError(
                f"{self._owner} needs each sample at most once an epoch, and {type(sampler).__name__} draws with "
                f"replacement. Sample without replacement. {self._instead}"
            )
        try:
            self.samples = len(loader.dataset)  # type: ignore[arg-type] # what has no length is caught
        except TypeError as error:
            raise ValueError(
                f"{self._owner} keeps a record for each sample, and {type(loader.dataset).__name__} has no length. "
                f"{self._instead}"
            ) from error
        # Workers that persist keep the spy of an earlier fit, or of before the host asked for the loader again.
        kept = getattr(getattr(loader, "_iterator", None), "_index_sampler", None)
        self._spy = kept.join() if isinstance(kept, _Spy) else _Spy(loader)


class _Pass:
    """One iteration over the batch sampler."""

    def __init__(self) -> None:
        self.waiting: deque[list[int]] = deque()
        self.current: list[int] = []
        self.taken = 0
        self.begun = False
        self.ended = False

    def take(self) -> None:
        """Go on to the next batch."""
        self.current = self.waiting.popleft()
        self.taken += 1


class _Spy:
    """Stands in for a loader's batch sampler and notes what passes."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._sampler = loader.batch_sampler
        self._passes: list[_Pass] = []
        self._active = True
        vars(loader)["batch_sampler"] = self

    def latest(self) -> _Pass | None:
        """Return the latest pass that goes on, or the latest of all, and forget the others."""
        # Workers that persist begin a pass twice, and use one.
        begun = [one for one in self._passes if one.begun]
        found = ([one for one in begun if not one.ended] or begun)[-1:]
        self._passes = list(found)
        return found[0] if found else None

    def join(self) -> "_Spy":
        """Take the sampler's place again."""
        self._active, self._passes = True, []
        vars(self._loader)["batch_sampler"] = self
        return self

    def leave(self) -> None:
        """Put the sampler back; an iterator that workers keep goes on through this one unnoticed."""
        self._active = False
        if vars(self._loader).get("batch_sampler") is self:
            vars(self._loader)["batch_sampler"] = self._sampler

    def __iter__(self) -> Iterator[Any]:
        if not self._active:
            return iter(self._sampler)  # type: ignore[arg-type] # checked before
        noted = _Pass()
        self._passes.append(noted)
        return self._noting(noted)

    def _noting(self, noted: _Pass) -> Iterator[Any]:
        noted.begun = True
        try:
            for indices in self._sampler:  # type: ignore[union-attr] # checked before
                noted.waiting.append([int(index) for index in indices])
                yield indices
        finally:
            noted.ended = True

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type] # as long as what it stands for

    def __getattr__(self, name: str) -> Any:
        """Be the sampler in everything else: the host asks it for its sampler and sets epochs there."""
        if name.startswith("_"):
            raise AttributeError(name)  # as while a copy is being made, which has no sampler yet
        return getattr(self._sampler, name)
