r"""Gaussian noise on the gradients, less and less of it as training goes on.

Use it where training gets stuck early, as deep networks with a poor start do. Cost: one random tensor as large as the
largest weight, and a pass over the gradients, for each optimizer step.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from {{ cookiecutter.package_name }}.{{ cookiecutter.method_name }} import {{ cookiecutter.class_name }}
    >>> trainer = Trainer(callbacks=[{{ cookiecutter.class_name }}(eta=0.01)], logger=False, enable_checkpointing=False)
"""

import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

__all__ = ["{{ cookiecutter.class_name }}"]

# Steps of different seeds must not share random numbers.
_STRIDE = 1_000_003


class {{ cookiecutter.class_name }}(Callback):
    r"""Add noise to the gradients of each optimizer step (arXiv 1511.06807).

    .. math:: g \leftarrow g + \mathcal{N}(0, \sigma_t^2), \qquad \sigma_t^2 = \frac{\eta}{(1 + t)^\gamma}

    with :math:`t` the optimizer steps before this one. The gradient is the one that an optimizer step starts from:
    accumulated, unscaled, synchronised, not yet clipped. The noise follows from ``seed`` and :math:`t` alone. So there
    is no state: a resumed run has the same noise, and so have all processes.

    Args:
        eta: Variance of the noise of the first step; 0 changes nothing. The paper tried 0.01, 0.3 and 1.
        gamma: How fast the variance falls; the paper's is 0.55.
        seed: Seed of the noise.

    Raises:
        ValueError: If a setting is out of range; in training for a gradient that is sparse.
    """

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> None:
        for name, value in (("eta", eta), ("gamma", gamma)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {value!r}.")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed!r}.")
        self.eta = eta
        self.gamma = gamma
        self.seed = seed

    def deviation(self, step: int) -> float:
        """Return the standard deviation of the noise after so many optimizer steps."""
        return math.sqrt(self.eta / (1 + step) ** self.gamma)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        deviation = self.deviation(trainer.global_step)
        if deviation == 0:
            return
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise ValueError(f"{type(self).__name__} does not work with sparse gradients. Set sparse=False.")
            device = parameter.device
            if device not in generators:
                seed = self.seed * _STRIDE + trainer.global_step
                generators[device] = torch.Generator(device).manual_seed(seed)
            # Drawn in float32 whatever the weights are: other precisions have the same noise, rounded.
            noise = torch.randn(parameter.shape, generator=generators[device], device=device)
            parameter.grad.add_(noise.to(parameter.grad.dtype), alpha=deviation)
