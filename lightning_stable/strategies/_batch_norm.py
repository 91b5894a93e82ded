"""Batch normalisation on averaged weights: its statistics belong to the weights that were averaged, not to the mean."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_stable._glue.progress import progress
from lightning_stable.strategies._consolidation import float_buffers
from lightning_stable.strategies._workers import Workers

__all__ = ["reestimate_batch_norm"]

_BATCHES = 100


@torch.no_grad()
def reestimate_batch_norm(trainer: Trainer, module: LightningModule, workers: Workers) -> None:
    """Replace the running statistics by the mean over some batches of all workers' training data.

    The batches are seen by the present weights, which are equal on all of them.
    Layers in eval mode, whose statistics are frozen, keep them. Nothing is logged, and the random numbers of training
    go on as if nothing had been read.
    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training and layer.track_running_stats
    ]
    if not layers or trainer.train_dataloader is None:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        # Without a momentum it keeps a plain mean over the batches.
        layer.momentum = None
    logging = {name: module.__dict__.pop(name, None) for name in ("log", "log_dict")}
    module.__dict__ |= dict.fromkeys(logging, _log_nothing)
    try:
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            _see(trainer, module)
    finally:
        for name, own in logging.items():
            del module.__dict__[name]
            if own is not None:
                module.__dict__[name] = own
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    workers.position = "the mean of the batch normalisation at the end of training"
    workers.mean(float_buffers(module))


def _see(trainer: Trainer, module: LightningModule) -> None:
    plugin = trainer.precision_plugin
    loaders = trainer.train_dataloader
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    limit = min(_BATCHES, trainer.num_training_batches)
    told = "Statistics of batch normalisation"
    for index, (batch, _, _) in enumerate(progress(trainer, combined, told, limit)):
        if index >= limit:
            return
        moved = trainer.strategy.batch_to_device(plugin.convert_input(batch))
        with plugin.forward_context():
            module.training_step(*((moved, index) if takes_index else (moved,)))


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for the module's logging."""
