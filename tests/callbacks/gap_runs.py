"""What the tests of StabilityGap train."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stable.testing.harness import QUIET

FEATURES, CLASSES = 5, 4


def samples(count: int, classes: tuple[int, ...], seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=generator)]
    x = torch.randn(count, FEATURES, generator=generator) + 2 * nn.functional.one_hot(labels, FEATURES)
    return TensorDataset(x, labels)


def loaders(tasks: int = 2, count: int = 12) -> list[DataLoader]:
    return [
        DataLoader(samples(count, (2 * task % CLASSES, 2 * task % CLASSES + 1), 10 + task), batch_size=5)
        for task in range(tasks)
    ]


def train(seed: int = 0, count: int = 24) -> DataLoader:
    return DataLoader(samples(count, (0, 1, 2, 3), seed), batch_size=4)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def run(*callbacks: Callback, module: LightningModule | None = None, data: Any = None, **settings: Any) -> Trainer:
    settings = {**QUIET, "devices": 1, "max_steps": 8, **settings}
    trainer = Trainer(callbacks=list(callbacks), **settings)
    validation = settings.pop("validation", None)
    module = Classifier() if module is None else module
    if isinstance(data, LightningDataModule):
        trainer.fit(module, datamodule=data)
    else:
        trainer.fit(module, train() if data is None else data, validation)
    return trainer
