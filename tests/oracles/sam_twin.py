"""Slow twins of sharpness-aware minimisation: one flat float64 vector instead of lists of tensors, one step at a time.

The twin is given a function that returns the gradient of one step's loss at any weights.
"""

import math
from collections.abc import Callable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Named = dict[str, Tensor]


def flat(tensors: Named) -> Tensor:
    """Return all tensors as one vector."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])


def shaped(vector: Tensor, like: Named) -> Named:
    """Cut a vector into tensors again."""
    result, start = {}, 0
    for name, tensor in like.items():
        result[name] = vector[start : start + tensor.numel()].reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()
    return result


def dot(left: Tensor, right: Tensor) -> float:
    total = 0.0
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        total += a * b
    return total


def length(vector: Tensor) -> float:
    return math.sqrt(dot(vector, vector))


def perturbation(weights: Tensor, gradient: Tensor, rho: float, adaptive: bool) -> Tensor:
    """Where the loss is worst: along g in a ball; adaptive, along w^2 g in a ball measured in units of the weights."""
    if adaptive:
        # The worst direction of w (1 + e') with |e'| <= rho, multiplied by the weights.
        relative = weights.abs() * gradient
        return weights.abs() * (rho * relative / (length(relative) + 1e-12))
    return rho * gradient / (length(gradient) + 1e-12)


def perpendicular(vector: Tensor, to: Tensor) -> Tensor:
    """Return what of ``vector`` is orthogonal to ``to``."""
    return vector - (dot(vector, to) / dot(to, to)) * to


class SAMTwin:
    """Returns for each step the gradient that the optimizer should see.

    A step perturbs if ``interval`` divides its distance from ``start_step``.
    """

    def __init__(
        self,
        rho: float,
        adaptive: bool = False,
        interval: int = 1,
        start_step: int = 0,
        variant: str = "sam",
        alpha: float | None = None,
    ) -> None:
        self.rho = rho
        self.adaptive = adaptive
        self.interval = interval
        self.start_step = start_step
        self.variant = variant
        self.alpha = alpha
        self.component: Tensor | None = None

    def perturbs(self, number: int) -> bool:
        return number >= self.start_step and (number - self.start_step) % self.interval == 0

    def gradient(self, number: int, weights: Named, gradient_at: Callable[[Named], Named]) -> Named:
        """Return the gradient of step ``number``, counted from 0, that begins at ``weights``."""
        clean = flat(gradient_at(weights))
        if self.perturbs(number):
            start = flat(weights)
            there = start + perturbation(start, clean, self.rho, self.adaptive)
            sharp = flat(gradient_at(shaped(there, weights)))
            if self.variant == "looksam":
                across = perpendicular(sharp, to=clean)
                self.component = across / length(across)
            if self.variant == "gsam":
                sharp = sharp - self.alpha * perpendicular(clean, to=sharp)
            return shaped(sharp, weights)
        if self.variant == "looksam" and self.component is not None:
            clean = clean + self.alpha * length(clean) * self.component
        return shaped(clean, weights)


class SharedSAM(Callback):
    """What SAM means in ``shares`` processes, in one: each share of a batch is perturbed along its own gradient.

    The mean over the shares, every n-th sample from the first, the second and so on, is what the optimizer gets. For
    modules whose ``loss`` of a batch is a mean over its samples, without buffers, one micro-batch a step.
    """

    def __init__(self, rho: float, interval: int = 1, start_step: int = 0, shares: int = 2) -> None:
        self.twin = SAMTwin(rho, interval=interval, start_step=start_step)
        self.shares = shares

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: list[Tensor], *_: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        start = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
        found = []
        for first in range(self.shares):
            share = [part[first :: self.shares] for part in self.batch]

            def gradient_at(weights: Named, share: list[Tensor] = share) -> Named:
                return _gradient(pl_module, weights, share)

            found.append(self.twin.gradient(trainer.global_step, start, gradient_at))
        _put(pl_module, start)
        for name, parameter in pl_module.named_parameters():
            parameter.grad.copy_(sum(gradients[name] for gradients in found) / self.shares)


def _put(module: LightningModule, weights: Named) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


def _gradient(module: LightningModule, weights: Named, batch: list[Tensor]) -> Named:
    _put(module, weights)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(module.loss(batch), parameters), strict=True))
