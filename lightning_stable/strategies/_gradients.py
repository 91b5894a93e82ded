"""Gradients averaged over the workers, for the steps that are synchronous."""

import torch
from torch.optim import Optimizer

from lightning_stable.strategies._flat import FlatBuffers
from lightning_stable.strategies._workers import Workers

__all__ = ["average_gradients"]


@torch.no_grad()
def average_gradients(optimizer: Optimizer, workers: Workers) -> None:
    """Replace the gradients of an optimizer's parameters by their mean over the workers.

    A worker on which a parameter got no gradient counts as zero, unless it got none anywhere.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not parameters:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if any(gradient.is_sparse for gradient in own):
        raise ValueError(
            f"{workers.owner} cannot average sparse gradients. Build the embedding with sparse=False, or set "
            "warmup_steps=0 and workers='process'."
        )
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=own[0].device)
    buffers = FlatBuffers([*own, there], multiple=workers.slices)
    buffers.read([*own, there])
    workers.launch(buffers).wait()
    buffers.write([*own, there])
    for parameter, gradient, share in zip(parameters, own, there.tolist(), strict=True):
        if share > 0:
            parameter.grad = gradient
