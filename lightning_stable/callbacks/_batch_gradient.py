"""The gradient of one batch's training loss, taken apart from those of training."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_stable._glue.quiet import QuietPass, loss_of, run_training_step
from lightning_stable.callbacks._reference import call_with_weights
from lightning_stable.callbacks._worker_state import mean_over_processes

__all__ = ["batch_gradient"]


def batch_gradient(
    trainer: Trainer,
    pl_module: LightningModule,
    batch: Any,
    batch_idx: int,
    points: Mapping[str, Tensor],
    quiet: QuietPass,
) -> dict[str, Tensor] | None:
    """Return the gradient of the loss of a batch, averaged over processes; all of them have to call this.

    The module's own ``training_step`` runs in the module's present mode, under the run's precision; it logs nothing,
    counts no metric, and leaves buffers, random numbers and ``.grad`` as they were. Nothing reaches the hooks of DDP.

    Args:
        trainer: A Trainer in a fit.
        pl_module: Its module, under automatic optimisation.
        batch: The batch, on the module's device.
        batch_idx: Its number.
        points: Where the gradient is taken, by the names of parameters: these themselves, or values in their places.
        quiet: The caller's quiet pass.

    Returns:
        By name, 0 where the loss does not depend on it; ``None`` if no process has a loss.
    """
    live = dict(pl_module.named_parameters())
    values = list(points.values())
    with torch.enable_grad(), quiet(pl_module), trainer.precision_plugin.train_step_context():
        if all(live[name] is value for name, value in points.items()):
            output = run_training_step(pl_module, batch, batch_idx)
        else:
            output = call_with_weights(pl_module, points, lambda: run_training_step(pl_module, batch, batch_idx))
        loss = loss_of(output)
        found = values and loss is not None and loss.requires_grad
        # Not backward(): that would add to the gradients of training and start the reduction over processes.
        gradients = torch.autograd.grad(cast(Tensor, loss), values, allow_unused=True) if found else None
    if not trainer.strategy.reduce_boolean_decision(gradients is not None, all=False):
        return None
    parts = [
        torch.zeros_like(value) if gradient is None else gradient.detach()
        for value, gradient in zip(values, gradients or [None] * len(values), strict=True)
    ]
    # What is no list of numbers is not averaged: the caller refuses it.
    return dict(zip(points, mean_over_processes(trainer, parts), strict=True))
