"""Which samples form a batch, compared with what the training step sees: the dataset here puts out its own indices."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_stable.callbacks._sample_ids import SampleIds
from lightning_stable.testing.harness import QUIET

SIZE = 22


class Indices(Dataset[Tensor]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class Watcher(Callback):
    """Notes what the spy says of each batch beside what the batch holds."""

    def __init__(self) -> None:
        self.ids = SampleIds("Watcher", "Use something else.")
        self.pairs: list[tuple[list[int], list[int]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ids.attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ids.check(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ids.next_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ids.next_batch(batch_idx)
        self.pairs.append((self.ids.current, batch.tolist()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.ids.undo()


class Module(LightningModule):
    def __init__(self, loader: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.loader = loader

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.scale * batch.float()).mean()

    def train_dataloader(self) -> Any:
        return self.loader()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def watch(loader: Any, *others: Callback, **settings: Any) -> Watcher:
    """Train for three epochs, and fail unless every batch was known."""
    watcher = Watcher()
    trainer = Trainer(**QUIET, max_epochs=3, callbacks=[watcher, *others], **settings)
    trainer.fit(Module(loader) if callable(loader) else Module(), None if callable(loader) else loader)
    assert watcher.pairs, "no batch was seen"
    for number, (noted, seen) in enumerate(watcher.pairs):
        assert noted == seen, f"batch {number}: noted {noted}, trained on {seen}"
    return watcher


LOADERS: dict[str, dict[str, Any]] = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "drop_last": {"shuffle": True, "drop_last": True},
    "subset": {"sampler": SubsetRandomSampler(range(3, 17))},
    "weighted": {"sampler": WeightedRandomSampler([1.0] * SIZE, 14, replacement=False)},
    "workers": {"shuffle": True, "num_workers": 2},
    "persistent workers": {"shuffle": True, "num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
    "own batch sampler": {"batch_sampler": BatchSampler(RandomSampler(range(SIZE)), 3, drop_last=False)},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_is_exact(kind: str) -> None:
    settings = LOADERS[kind]
    loader = DataLoader(Indices(), **({} if "batch_sampler" in settings else {"batch_size": 4}), **settings)
    sampler = loader.batch_sampler
    watcher = watch(loader)
    assert watcher.ids.samples == SIZE
    assert len(watcher.pairs) == 3 * len(loader)
    assert loader.batch_sampler is sampler, "the spy was left in the loader"
    assert sum(len(batch) for batch in loader) in (SIZE, 20, 14), "the loader does not work on"


@pytest.mark.parametrize("workers", [0, 2])
def test_is_exact_where_epochs_are_cut_short(workers: int) -> None:
    loader = DataLoader(Indices(), batch_size=4, shuffle=True, num_workers=workers)
    assert len(watch(loader, limit_train_batches=3).pairs) == 9


def test_is_exact_where_loaders_are_made_anew() -> None:
    watch(lambda: DataLoader(Indices(), batch_size=4, shuffle=True), reload_dataloaders_every_n_epochs=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_is_exact_in_a_second_fit(workers: int) -> None:
    loader = DataLoader(Indices(), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    watch(loader)
    watch(loader)


def test_is_exact_where_the_same_loader_is_asked_for_again() -> None:
    loader = DataLoader(Indices(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)
    watch(lambda: loader, reload_dataloaders_every_n_epochs=1)


def without_some(samples: list[Tensor]) -> Tensor | None:
    """Give up on batches that hold sample 0, or begin with an odd one."""
    batch = torch.stack(samples)
    return None if bool((batch == 0).any()) or int(batch[0]) % 2 else batch


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
@pytest.mark.parametrize("shuffle", [True, False])
def test_is_exact_where_batches_are_given_up(shuffle: bool) -> None:
    torch.manual_seed(4)
    watcher = watch(DataLoader(Indices(), batch_size=2, shuffle=shuffle, collate_fn=without_some))
    assert 3 < len(watcher.pairs) < 33


def test_the_sampler_can_be_copied_in_a_fit() -> None:
    class Copies(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            copy.deepcopy(trainer.train_dataloader.batch_sampler)

    watch(DataLoader(Indices(), batch_size=4), Copies())


class ReadsToo(Callback):
    """Reads the train loader beside the host."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        list(trainer.train_dataloader)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        next(iter(trainer.train_dataloader))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        list(trainer.train_dataloader)


def test_is_exact_where_others_read_the_loader() -> None:
    watch(DataLoader(Indices(), batch_size=4, shuffle=True), ReadsToo())


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.tensor(1)


class NoLength(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


class Rows:
    """A loader of its own kind."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(12).view(3, 4)

    def __len__(self) -> int:
        return 3


REFUSED: dict[str, tuple[Any, str]] = {
    "iterable": (lambda: DataLoader(Endless(), batch_size=4), "map-style dataset with a length"),
    "not batched": (lambda: DataLoader(Indices(), batch_size=None), "batch_size=None"),
    "no length": (
        lambda: DataLoader(NoLength(), batch_sampler=BatchSampler(range(8), 4, drop_last=False)),
        "NoLength has no length",
    ),
    "with replacement": (
        lambda: DataLoader(Indices(), batch_size=4, sampler=RandomSampler(range(SIZE), replacement=True)),
        "RandomSampler draws with replacement",
    ),
    "weighted": (
        lambda: DataLoader(Indices(), batch_size=4, sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
        "WeightedRandomSampler draws with replacement",
    ),
    "out of order": (
        lambda: DataLoader(Indices(), batch_size=4, num_workers=2, in_order=False),
        "in_order=False",
    ),
    "several": (
        lambda: [DataLoader(Indices(), batch_size=4), DataLoader(Indices(), batch_size=4)],
        "needs one torch DataLoader .* this Trainer has list",
    ),
    "no DataLoader": (lambda: Rows(), "this Trainer has Rows"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        watch(make, max_steps=3)
    assert "Watcher" in str(caught.value)
    assert "Use something else." in str(caught.value)
