"""What the processes of the robust strategy's tests run: fits in which some ranks send wrong gradients."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stable.testing.harness import QUIET

FEATURES, CLASSES = 8, 3
BATCHES, BATCH_SIZE = 6, 16


def rank() -> int:
    return int(os.environ["RANK"])


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


# ------------------------------------------------------------------------------------------------------------- faults


def _garbage(gradient: Tensor) -> Tensor:
    return 100 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(gradient.numel()))


def _nan(gradient: Tensor) -> Tensor:
    broken = gradient.clone()
    broken.view(-1)[-1] = torch.nan
    return broken


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "garbage": _garbage,
    "nan": _nan,
    "infinity": lambda gradient: gradient / 0,
    "flipped": lambda gradient: -10 * gradient,
    "huge": lambda gradient: 1e30 * torch.ones_like(gradient),
}


class FaultyRanks(Callback):
    """Makes some ranks send something else than their gradients.

    Args:
        fault: A key of :data:`FAULTS`.
        ranks: Which ranks.
        within: Change each gradient within the backward pass, before DDP averages, instead of after it.
    """

    def __init__(self, fault: str, ranks: tuple[int, ...], *, within: bool = False) -> None:
        self.fault = FAULTS[fault]
        self.here = rank() in ranks
        self.within = within

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters() if self.here and self.within else ():
            parameter.register_hook(self.fault)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in pl_module.parameters() if self.here and not self.within else ():
            if parameter.grad is not None:
                parameter.grad.copy_(self.fault(parameter.grad))


class Death(Callback):
    """Ends the process of one rank after so many optimizer steps, without a word."""

    def __init__(self, rank_of: int, step: int) -> None:
        self.here = rank() == rank_of
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.here and trainer.global_step == self.step:
            os._exit(1)


class FaultyStatistics(Callback):
    """Makes the running statistics of one rank no numbers."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.here = rank() in ranks

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.here:
            pl_module.norm.running_mean[0] = torch.nan


class Witness(Callback):
    """Keeps what a rank had: its own accumulated gradients, what the step saw, and the loss given to the host."""

    def __init__(self) -> None:
        self.own: list[dict[str, Tensor]] = []
        self.seen: list[dict[str, Tensor]] = []
        self.statistics: list[Tensor] = []
        self.losses: list[float] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The last micro-batch of a step is the one that counts: gradients are accumulated.
        self.own[len(self.seen) :] = [_gradients(pl_module)]
        self.statistics[len(self.seen) :] = [pl_module.norm.running_mean.clone()]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append(_gradients(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        if outputs is not None and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------- modules


class Classifier(LightningModule):
    """A small network with statistics, a spare layer that only some ranks use, and two groups of parameters."""

    def __init__(self, lr: float = 0.05, spare_on: tuple[int, ...] = (), decay: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(FEATURES, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, CLASSES)
        self.spare = nn.Linear(16, CLASSES)
        self.register_buffer("mask", torch.tensor([-torch.inf, torch.finfo(torch.float32).min, 0.0, 0.1]))
        self.lr = lr
        self.spare_on = spare_on
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.body(x)))
        return self.head(hidden) + self.spare(hidden) if rank() in self.spare_on else self.head(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [*self.body.parameters(), *self.norm.parameters()]},
            {"params": [*self.head.parameters(), *self.spare.parameters()], "lr": self.lr / 2},
        ]
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, weight_decay=self.decay)


class TwoOptimizers(Classifier):
    """Steps two optimizers itself."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD([*self.body.parameters(), *self.norm.parameters()], lr=self.lr)
        return [first, torch.optim.SGD(self.head.parameters(), lr=self.lr)]


class Lbfgs(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


class Complex(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))


class Sparse(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 16, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)) + self.table((x[:, 0] > 0).long()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


MODULES: dict[str, Callable[..., LightningModule]] = {
    "plain": Classifier,
    "two optimizers": TwoOptimizers,
    "lbfgs": Lbfgs,
    "sparse": Sparse,
    "complex": Complex,
}


def batches(seed: int, count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    """Return batches of points whose largest of the first coordinates is their class."""
    x = torch.randn(count * BATCH_SIZE, FEATURES, generator=torch.Generator().manual_seed(seed))
    return list(zip(x.split(BATCH_SIZE), x[:, :CLASSES].argmax(1).split(BATCH_SIZE), strict=True))


# ------------------------------------------------------------------------------------------------------------- jobs


def ready() -> int:
    """Answer once everything is imported, so that a later job is timed without start-up."""
    from lightning_stable.strategies import RobustDDPStrategy

    return len(RobustDDPStrategy.__name__)


def train(
    settings: dict[str, Any] | None,
    fault: str | None = None,
    faulty: tuple[int, ...] = (),
    faulty_statistics: tuple[int, ...] = (),
    module: str = "plain",
    arguments: dict[str, Any] | None = None,
    scaler: bool = False,
    death: tuple[int, int] = (-1, 0),
    save_to: str | None = None,
    resume_from: str | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    """Fit a module on data of each rank's own; return what the rank ends with.

    Args:
        settings: Those of the robust strategy; ``None``: plain DDP, whose gradients are changed before it averages.
        fault: What the faulty ranks do to their gradients.
        faulty: Which ranks do.
        faulty_statistics: Which ranks break their running statistics.
        module: A key of :data:`MODULES`.
        arguments: Its arguments.
        scaler: Train in float16 with a gradient scaler.
        death: The rank that dies, and after how many steps.
        save_to: Where to save a checkpoint at the end.
        resume_from: A checkpoint to go on from.
        trainer: Settings of the Trainer.
    """
    from lightning_stable.strategies import RobustDDPStrategy

    network = MODULES[module](**(arguments or {}))
    before = copy.deepcopy(network.state_dict())
    witness = Witness()
    faults = [FaultyRanks(fault, faulty, within=settings is None)] if fault else []
    fitted = Trainer(
        **{**QUIET, "max_epochs": 1, "devices": world_size(), **trainer},
        strategy="ddp_find_unused_parameters_true" if settings is None else RobustDDPStrategy(**settings),
        # The faults first: what is witnessed is what was sent.
        callbacks=[*faults, FaultyStatistics(faulty_statistics), Death(*death), witness],
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if scaler else None,
    )
    fitted.fit(network, DataLoader(batches(100 + rank()), batch_size=None), ckpt_path=resume_from)
    if save_to is not None:
        fitted.save_checkpoint(save_to)
    network.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches(7), strict=True))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(network(x), y))
    return {
        "before": before,
        "weights": network.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in fitted.optimizers],
        "own": witness.own,
        "seen": witness.seen,
        "statistics": witness.statistics,
        "losses": witness.losses,
        "loss": loss,
    }


def error_of(**arguments: Any) -> str:
    """Return the error that a fit ends with, empty if it ends well."""
    try:
        train(**arguments)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
