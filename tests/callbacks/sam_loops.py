"""Sharpness-aware training written out by hand in plain torch, and the job that runs the callback in two processes."""

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import Net, fit
from lightning_stable.testing.streams import BATCHES, Stream

RHO = 0.2
STEPS = 20


def loop(
    accumulate: int = 1, clip: float | None = None, bf16: bool = False, shares: int = 1, norm: bool = True
) -> dict[str, Tensor]:
    """Train ``Net`` with SAM and SGD of two groups, and return its weights."""
    module = Net(norm=norm).train()
    optimizer = module.configure_optimizers()
    stream, parameters = Stream(), list(module.parameters())
    for step in range(STEPS):
        steps_an_epoch = BATCHES // accumulate
        first = accumulate * (step % steps_an_epoch)
        batches = [stream.batch(index) for index in range(first, first + accumulate)]
        found = []
        for share in range(shares):
            part = [tuple(values[share::shares] for values in batch) for batch in batches]
            clean = gradient(module, parameters, part, bf16)
            length = torch.sqrt(sum((g**2).sum() for g in clean))
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, g in zip(parameters, clean, strict=True):
                    p.add_(RHO * g / length)
            found.append(gradient(module, parameters, part, bf16))
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=True):
                    p.copy_(value)
        for p, *several in zip(parameters, *found, strict=True):
            p.grad = sum(several) / shares
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return {name: value.detach() for name, value in module.named_parameters()}


def gradient(module: Net, parameters: list[Tensor], batches: list[Any], bf16: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = sum(module.loss(batch) for batch in batches) / len(batches)
    return list(torch.autograd.grad(loss, parameters))


def two_process_job(bucket_view: bool = False, **settings: Any) -> dict[str, Tensor]:
    os.chdir(tempfile.mkdtemp())
    strategy = DDPStrategy(gradient_as_bucket_view=bucket_view)
    run = fit([SAM(rho=RHO, **settings)], module=Net(norm=False), max_steps=STEPS, devices=2, strategy=strategy)
    return {name: value.detach() for name, value in run.module.named_parameters()}


class TurnsNan(Net):
    """Its training loss is not a number at step 3; with several processes only that of the last one."""

    def loss(self, batch: Any) -> Tensor:
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        return super().loss(batch) * (float("nan") if last and self.training and len(self.steps) == 3 else 1.0)


class SkipsThem(Callback):
    """Takes over updates that are not finite, as a guard does."""

    skips_non_finite_updates = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                parameter.grad = None


def nan_job(skips: bool) -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    module, error = TurnsNan(norm=False), ""
    try:
        fit([SAM(), *([SkipsThem()] if skips else [])], module=module, max_steps=6, devices=2, strategy="ddp")
    except ValueError as found:
        error = str(found)
    return {"error": error, "weights": {name: value.detach() for name, value in module.named_parameters()}}
