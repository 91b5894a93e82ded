"""What the tests of gradient transforms share: a module with any optimizer, and a look at the gradients before."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_stable.testing.harness import Net


class NetWith(Net):
    """The net of the contracts with an optimizer of the test's choice; keeps the weights after each step."""

    def __init__(self, make: Callable[[Any], Optimizer], **settings: Any) -> None:
        super().__init__(**settings)
        self.make = make
        self.history: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        pass

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.history.append(weights(self))


class Watches(Callback):
    """Keeps the gradients of each step at its place among the callbacks, and says what to do with them before."""

    def __init__(self, change: Callable[[int, Tensor], None] | None = None) -> None:
        self.change = change
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for _, parameter in pl_module.named_parameters():
            if self.change is not None and parameter.grad is not None:
                self.change(len(self.seen), parameter.grad)
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def entries(logged: list[tuple[int, dict[str, float]]], name: str) -> dict[int, float]:
    """The values logged under a name, by step."""
    return {step: values[name] for step, values in logged if name in values}
