"""Callbacks that keep samples, in one process that sees them as two processes do together.

All processes keep the same samples, in the order in which the processes have them: that of a batch as the contracts'
stream deals it out, the share of rank 0 first.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_stable.callbacks import EWC, RefreshLearning

PROCESSES = 2


def dealt(batch: list[Tensor], epoch: int) -> list[Tensor]:
    """Return a batch in the order of the shares of an epoch."""
    first = [(rank + epoch) % PROCESSES for rank in range(PROCESSES)]
    return [torch.cat([part[start::PROCESSES] for start in first]) for part in batch]


class SharedEWC(EWC):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, dealt(batch, trainer.current_epoch), batch_idx)


class SharedRefreshLearning(RefreshLearning):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, dealt(batch, trainer.current_epoch), batch_idx)
