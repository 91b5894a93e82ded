"""A module, data and a callback that configs of the tests name, and such a config."""

from typing import ClassVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BASE = """
vars: {lr: 0.01, steps: 4, tag: base, marks: [1, 2], wsd_decay: 0.5}
trainer:
  max_steps: ${vars.steps}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: runs, name: cli}
  callbacks:
    - class_path: cli_fixtures.CliProbe
      init_args: {tag: "${vars.tag}", steps: "${vars.marks}"}
model: {class_path: cli_fixtures.CliModule, init_args: {lr: "${vars.lr}"}}
data: {class_path: cli_fixtures.CliData}
"""


class CliModule(LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 3) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(4, width)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class CliData(LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(_labelled(8), self.batch_size)

    def val_dataloader(self):
        return DataLoader(_labelled(2), self.batch_size)


def _labelled(count: int) -> TensorDataset:
    """Samples with labels, which the module has no use for and some callbacks do."""
    return TensorDataset(torch.ones(count, 4), torch.zeros(count, dtype=torch.long))


class CliProbe(Callback):
    """Records what a run was given; fails on demand."""

    seen: ClassVar[list] = []

    def __init__(self, tag: str = "", steps: list[int] | None = None, fail: str | None = None) -> None:
        self.tag = tag
        self.steps = steps
        self.fail = fail

    def on_train_start(self, trainer, pl_module):
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail == "bug":
            raise ValueError("a bug of the user")
        type(self).seen.append((trainer, pl_module))
