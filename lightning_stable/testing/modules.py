"""What the contracts train: modules of several kinds that compare bit by bit, on one process or on two.

Weights and rates are recorded inside the optimizer, so that an oracle sees what training did without trusting any hook.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from lightning_stable.testing.streams import BATCHES, FEATURES, EndlessStream, Stream, place_in_group

__all__ = [
    "MODULES",
    "OUTPUTS",
    "AdamNet",
    "Case",
    "DictNet",
    "ManualNet",
    "Net",
    "PlainBoring",
    "Recording",
    "RecordingAdam",
    "RecordingSGD",
    "Step",
    "TwoOptimizerNet",
    "module_settings",
    "prepared_by",
    "trained_by",
]

OUTPUTS = 3
"""How many outputs the head of :class:`Net` has.

Their sum with changing signs, scaled as if there were one, is the prediction: what lowers the loss moves a distribution
over them, which can also move when the loss does not.
"""


class Step(NamedTuple):
    """What one optimizer step did.

    Attributes:
        rates: The learning rate of each parameter group.
        before: The weights before it.
        gradients: The gradients that it was given, before the host clipped them.
        weights: The weights after it.
    """

    rates: list[float]
    before: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Recording(torch.optim.Optimizer):
    """An optimizer that remembers every step it takes; the other base says which steps."""

    def watch(self, module: nn.Module, steps: list[Step]) -> "Recording":
        """Remember what happens to this module, in this list."""
        self.module = module
        self.steps = steps
        self.unclipped: dict[str, Tensor] = {}
        return self

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        before = _copies(self.module)
        result = super().step(closure)
        rates = [float(group["lr"]) for group in self.param_groups]
        self.steps.append(Step(rates, before, self.unclipped, _copies(self.module)))
        return result


class RecordingSGD(Recording, torch.optim.SGD):
    """SGD that remembers its steps."""


class RecordingAdam(Recording, torch.optim.Adam):
    """Adam that remembers its steps."""


_chosen = "sgd"


@contextmanager
def trained_by(optimizer: str) -> Iterator[None]:
    """Let all modules but :class:`AdamNet` train with ``"sgd"``, which is usual, or with ``"adam"``."""
    global _chosen
    before, _chosen = _chosen, optimizer
    try:
        yield
    finally:
        _chosen = before


# What a user's own constructor does to the module besides.
_preparation: Callable[[LightningModule], None] | None = None


@contextmanager
def prepared_by(preparation: Callable[[LightningModule], None] | None) -> Iterator[None]:
    """Let each module be prepared for what it is trained with at the end of its constructor."""
    global _preparation
    before, _preparation = _preparation, preparation
    try:
        yield
    finally:
        _preparation = before


def module_settings() -> tuple[Any, ...]:
    """Return what modules depend on besides their arguments: the optimizer, and what their constructors do."""
    return _chosen, _preparation


def _prepare(module: LightningModule) -> None:
    if _preparation is not None:
        _preparation(module)


def _descent(parameters: Any, rate: float = 0.0, momentum: float = 0.5, recording: bool = False) -> Any:
    """Return the optimizer of the chosen kind; Adam takes rates that are a fifth of those of SGD."""
    groups: list[dict[str, Any]] = (
        parameters if isinstance(parameters, list) else [{"params": list(parameters), "lr": rate}]
    )
    if _chosen == "adam":
        smaller = [{**group, "lr": group["lr"] / 5} for group in groups]
        return (RecordingAdam if recording else torch.optim.Adam)(smaller)
    return (RecordingSGD if recording else torch.optim.SGD)(groups, momentum=momentum)


class Calls:
    """Counts each kind of step at each optimizer step, in an object: a plugin may put a module's attributes back."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()


class Net(LightningModule):
    """A small regressor with batch norm and, if asked, dropout; two parameter groups of different rates.

    Args:
        dropout: The share of hidden units that are left out.
        norm: Whether there is a batch norm.
        rates: The learning rates of the body and of the head.

    Attributes:
        steps: What its optimizer recorded, over all fits.
        fail_at: A kind of step, an optimizer step and, if it is not the first, the number of the call within that step
            in which a failure comes.
    """

    steps: list[Step]
    step_calls: Calls
    fail_at: tuple[str, int] | tuple[str, int, int] | None

    def __init__(self, dropout: float = 0.0, norm: bool = True, rates: tuple[float, float] = (0.05, 0.02)) -> None:
        super().__init__()
        # Not of all devices: those that there are not remember each call, with its traceback.
        torch.default_generator.manual_seed(7)
        self.body = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(8, OUTPUTS)
        self.rates = rates
        self.steps = []
        self.fail_at = None
        self.step_calls = Calls()
        _prepare(self)

    @override
    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        difference: Tensor = outputs[:, ::2].sum(1, keepdim=True) - outputs[:, 1::2].sum(1, keepdim=True)
        return difference / math.sqrt(OUTPUTS)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean squared error of a batch."""
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self._maybe_fail("train")
        loss = self.loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._maybe_fail("validate")
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._maybe_fail("test")
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    @override
    def on_after_backward(self) -> None:
        self._maybe_fail("backward")

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # Callbacks have run, clipping has not: what a gradient transform leaves and an average may look at.
        recording = getattr(optimizer, "optimizer", optimizer)
        recording.unclipped = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}

    @override
    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.body.parameters()), "lr": self.rates[0]},
            {"params": list(self.head.parameters()), "lr": self.rates[1]},
        ]
        # The same list over several fits: what was recorded outlives the Trainer's optimizers.
        return _descent(groups, momentum=0.9, recording=True).watch(self, self.steps)

    def _maybe_fail(self, where: str) -> None:
        if self.trainer.sanity_checking:
            return
        now = where, self.trainer.global_step
        self.step_calls.counts[now] += 1
        place, step, call = (*(self.fail_at or ("", 0)), 1)[:3]
        if (place, step) == now and self.step_calls.counts[now] >= call:
            raise RuntimeError("deliberate failure in the middle of training")


class DictNet(Net):
    """Returns a dictionary from its steps."""

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": batch[0].mean()}


class AdamNet(Net):
    """Trains with Adam, at one rate."""

    @override
    def configure_optimizers(self) -> Any:
        return RecordingAdam(self.parameters(), lr=0.01).watch(self, self.steps)


class ManualNet(Net):
    """Steps one optimizer itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)


class TwoOptimizerNet(Net):
    """Steps two optimizers itself, which Lightning has under manual optimisation only."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    @override
    def configure_optimizers(self) -> Any:
        return [_descent(part.parameters(), 0.05) for part in (self.body, self.head)]


class PlainBoring(BoringModel):
    """Lightning's own example module, without its scheduler, and with epochs as short as those of the others.

    Batches of one sample let its loss jump; the rate is such that it does not diverge of itself.
    """

    def __init__(self) -> None:
        super().__init__()
        _prepare(self)

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        rank, world = place_in_group()
        return DataLoader(Subset(RandomDataset(32, BATCHES * world), range(rank, BATCHES * world, world)))

    @override
    def configure_optimizers(self) -> Any:
        return _descent(self.parameters(), 0.04)


class Case(NamedTuple):
    """A module and its loaders; ``None`` leaves the loaders to the module."""

    module: LightningModule
    train: Any
    validation: Any


MODULES: dict[str, Callable[[], Case]] = {
    "boring": lambda: Case(PlainBoring(), None, None),
    "dict": lambda: Case(DictNet(), Stream(), Stream(2, seed=5)),
    "manual": lambda: Case(ManualNet(), Stream(), Stream(2, seed=5)),
    "two optimizers": lambda: Case(TwoOptimizerNet(), Stream(), Stream(2, seed=5)),
    "iterable": lambda: Case(Net(), DataLoader(EndlessStream(), batch_size=None), Stream(2, seed=5)),
    "no validation": lambda: Case(Net(), Stream(), None),
}
"""The kinds of module that every plugin meets."""


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
