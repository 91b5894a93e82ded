"""A small module with adapters of LoRA, for the tests of ReorthogonaliseLoRA and for the processes that they start."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lightning_stable.testing.harness import QUIET

__all__ = ["AdaptedNet", "Look", "factors", "fit_under", "loader", "product", "refusal_under", "trainer"]

RANK = 3


class AdaptedNet(LightningModule):
    """A regressor whose linear layers have adapters of LoRA; B does not start at 0."""

    def __init__(
        self, optimizer: str = "adamw", freeze_a: bool = False, dtype: torch.dtype = torch.float64, **settings: Any
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
            config = LoraConfig(**{"r": RANK, "lora_alpha": 6, "target_modules": ["0", "2"], **settings})
            inject_adapter_in_model(config, self.model)
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.3)
                if "lora_A" in name and freeze_a:
                    parameter.requires_grad_(False)
        self.to(dtype)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        kinds = {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax, "rmsprop": torch.optim.RMSprop}
        return kinds[self.optimizer](trained, lr=0.02)


class Batches:
    """Batches in order, in a loader that knows how far it is."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def loader(dtype: torch.dtype = torch.float64, shift: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(9 + shift)
    x = torch.randn(16, 4, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Batches([(each, torch.sin(each[:, :5] * 2)) for each in x])


def trainer(callbacks: list[Callback], **settings: Any) -> Trainer:
    return Trainer(callbacks=callbacks, **{**QUIET, "logger": False, "max_epochs": -1, **settings})


def factors(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A and B of each layer, copied."""
    layers = [layer for layer in module.modules() if hasattr(layer, "lora_A") and len(layer.lora_A)]
    return [
        (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
        for layer in layers
    ]


def product(module: nn.Module) -> list[Tensor]:
    return [b @ a for a, b in factors(module)]


class Look(Callback):
    """Copies the factors and the optimizer's state at each end of a batch."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[Tensor, Tensor]]] = []
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(factors(pl_module))
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))


def fit_under(strategy: str, freeze_a: bool = True, steps: int = 6, every: int = 1, **settings: Any) -> Any:
    """Train in this process as one of several, and return its factors at the end and at each end of a batch."""
    from lightning_stable.peft.reorthogonalise_lora import ReorthogonaliseLoRA
    from lightning_stable.strategies import LocalSGDStrategy

    chosen = {"ddp": lambda: "ddp", "local_sgd": lambda: LocalSGDStrategy(local_steps=3, **settings)}[strategy]()
    module, before, after = AdaptedNet(freeze_a=freeze_a), Look(), Look()
    rank = int(os.environ["RANK"])
    host = trainer(
        [before, ReorthogonaliseLoRA(every_n_steps=every), after],
        strategy=chosen,
        devices=2,
        max_steps=steps,
        use_distributed_sampler=False,
    )
    host.fit(module, loader(shift=rank))
    return {"before": before.seen, "after": after.seen, "end": factors(module)}


def refusal_under(**settings: Any) -> str:
    """Return what the error says with which a fit ends."""
    try:
        fit_under(**settings)
    except ValueError as error:
        return str(error)
    return ""
