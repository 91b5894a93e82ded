"""The data of the contracts: batches that follow from their number, in loaders that know how far they are."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

__all__ = ["BATCHES", "BATCH_SIZE", "FEATURES", "EndlessStream", "Order", "Stream", "place_in_group"]

FEATURES = 6
"""How wide a sample is."""
BATCHES = 6
"""Batches in an epoch."""
BATCH_SIZE = 8
"""Samples in a batch, of all processes together."""


def place_in_group() -> tuple[int, int]:
    """Return this process's rank, and how many processes there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Order(Sampler[list[int]]):
    """Which samples form each batch: batch ``b`` holds the samples from ``b * BATCH_SIZE`` on, in every epoch.

    It knows how far it is. Each process of a group takes a share of the same batch, another one in each epoch, so that
    two processes see together what one sees and no process has a sample for itself.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.position = 0
        self.epoch = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        # A loop that knows the length stops at the last batch and never sees the end of the iterator.
        self.epoch += self.position // self.batches
        self.position %= self.batches
        while self.position < self.batches:
            self.position += 1
            yield self.share(self.position - 1)

    def share(self, batch: int) -> list[int]:
        """Return the samples of a batch that this process takes in this epoch."""
        rank, world = place_in_group()
        indices = list(range(BATCH_SIZE * batch, BATCH_SIZE * (batch + 1)))
        return indices[(rank + self.epoch) % world :: world]


class Stream(DataLoader[tuple[Tensor, ...]]):
    """A loader over a dataset with indices, whose samples follow from the batch's number, and which can be resumed."""

    def __init__(self, batches: int = BATCHES, seed: int = 0) -> None:
        made = [_samples(1000 * seed + index) for index in range(batches)]
        dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*made, strict=True)))
        self.order = Order(batches)
        # Each pass draws a seed for workers; from a generator of its own it leaves the global random numbers alone.
        super().__init__(dataset, batch_sampler=self.order, generator=torch.Generator())

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """Return a whole batch, whoever takes which share of it."""
        return self.dataset[BATCH_SIZE * index : BATCH_SIZE * (index + 1)]

    def state_dict(self) -> dict[str, int]:
        """Return how far it is."""
        return {"position": self.order.position, "epoch": self.order.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.order.position, self.order.epoch = state["position"], state["epoch"]


def _samples(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH_SIZE, FEATURES, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(BATCH_SIZE, 1, generator=generator)


class EndlessStream(IterableDataset[tuple[Tensor, ...]]):
    """A dataset without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        stream = Stream()
        while True:
            yield from iter(stream)
