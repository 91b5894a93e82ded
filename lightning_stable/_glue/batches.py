"""Batches and train flags beside the host's own pass, as the host has them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

__all__ = ["eval_mode", "fresh_loaders", "to_device"]


def fresh_loaders(combined: Any) -> CombinedLoader:
    """Return combined loaders again, with iterators of their own.

    The host may have begun to iterate over its loaders, and a loader with persistent workers has one iterator for all:
    a copy without it leaves the host's alone. How loaders are combined is known to a private attribute only, ``_mode``.

    Args:
        combined: A ``CombinedLoader`` of the host. Its limits are not taken over.
    """

    def fresh(loader: Any) -> Any:
        if not isinstance(loader, DataLoader):
            return loader
        copied = copy.copy(loader)
        copied._iterator = None
        return copied

    return CombinedLoader(tree_map(fresh, combined.iterables), combined._mode)


def to_device(trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Move a batch as the host's evaluation loop does.

    The one private call here, ``_on_before_batch_transfer``, is how the host honours that hook on a datamodule.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluate, and give each submodule its own train flag back."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            if type(part).train is not nn.Module.train:
                part.train(flag)  # what it does beside setting the flag
        for part, flag in flags:
            part.training = flag
