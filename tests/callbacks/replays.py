"""What the tests of Replay have in common: small memories, and samples that tell what they are."""

from typing import Any

import torch
from oracles.replay_twin import Labelled
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stable.callbacks.replay import Replay
from lightning_stable.testing.harness import Run


def small(**settings: Any) -> Replay:
    return Replay(**{"capacity": 12, "batch_size": 4, "weight": 0.4, **settings})


def rows(batch: Any) -> list[float]:
    """Return what tells the samples of a batch apart."""
    return [float(value) for value in batch[0][:, 0]]


def kept(replay: Replay) -> list[float]:
    return rows(replay.state_dict()["memory"]["samples"]["rows"])


def numbered(samples: int = 24, batch: int = 4) -> DataLoader:
    """Samples that are their own number, unscaled gradients aside."""
    numbers = torch.arange(float(samples))[:, None]
    return DataLoader(TensorDataset(numbers.expand(-1, 6), numbers / samples), batch_size=batch)


class Calm(Labelled):
    """Does not learn, so that large inputs do no harm."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(rates=(0.0, 0.0), **settings)


def weights(run: Run) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in run.module.named_parameters()}
