"""What the two processes run to hold the simulation of `benchmarks/co2_quality.py` to the real strategies."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stable.testing import harness

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _co2_quality_runs as co2_quality
from _co2_quality_runs import Job


def build(job: Job) -> Any:
    """Return the package's strategy for a job."""
    from lightning_stable import strategies

    method = job.method
    settings: dict[str, Any] = {"local_steps": job.local_steps, "warmup_steps": job.warmup}
    if method.variant != "blocking":
        settings["variant"] = method.variant
    if method.name != "LocalSGD":
        settings |= {"outer_lr": method.outer_lr, "outer_momentum": method.outer_momentum}
    if method.name == "CO2":
        settings |= {"staleness_penalty": method.penalty, "momentum_clip": method.clip}
    return getattr(strategies, f"{method.name}Strategy")(**settings)


class Given:
    """A loader of given batches; the host takes a plain list for many loaders."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


def train(fields: dict[str, Any]) -> Tensor:
    """Train one worker with the real strategy on the samples that the simulation gives it; return the weights."""
    job = Job(**{**fields, "method": co2_quality.Method(**fields["method"])})
    task = co2_quality.load(job.task)
    torch.manual_seed(job.seed)
    module = task.build()
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = job.lr
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: co2_quality.learning_rate(job, step) / job.lr)
    module.training_step = lambda batch, batch_idx: task.loss(module, batch)
    scheduler = {"scheduler": schedule, "interval": "step"}
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": scheduler}
    rank = int(os.environ["RANK"])
    own = [batch.chunk(job.workers)[rank] for batch in co2_quality.samples_of(job).view(job.steps, -1)]
    settings = {"strategy": build(job), "max_steps": job.steps, "gradient_clip_val": 1.0}
    harness.fit([], module=module, train=Given(own), **settings)
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()
