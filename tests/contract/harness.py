"""What the contracts run on: modules of several kinds on a deterministic stream, runs that compare bit by bit.

Nothing here knows a method by name. Weights and rates are recorded inside the optimizer, so that an oracle sees what
training did without trusting any hook.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from contract.feeding import Feeder, is_metric, place, without_metric
from contract.streams import BATCHES, FEATURES, EndlessStream, Stream
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Settings of a Trainer in a test: one process on the CPU, no files, no output, no other order than the stream's.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
# Their sum with changing signs, scaled as if there were one, is the prediction: what lowers the loss moves a
# distribution over them, which can also move when the loss does not.
OUTPUTS = 3


class Step(NamedTuple):
    """What one optimizer step did."""

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        before = _copies(self.module)
        result = super().step(closure)
        rates = [float(group["lr"]) for group in self.param_groups]
        self.steps.append(Step(rates, before, self.unclipped, _copies(self.module)))
        return result


class RecordingSGD(Recording, torch.optim.SGD):
    pass


class RecordingAdam(Recording, torch.optim.Adam):
    pass


class Calls:
    """Counts each kind of step at each optimizer step, in an object: a plugin may put a module's attributes back."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()


class Net(LightningModule):
    """A small regressor with batch norm and, if asked, dropout; two parameter groups of different rates.

    Attributes:
        fail_at: A kind of step, an optimizer step and, if it is not the first, the number of the call within that step
            in which a failure comes.
    """

    def __init__(self, dropout: float = 0.0, norm: bool = True, rates: tuple[float, float] = (0.05, 0.02)) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(8, OUTPUTS)
        self.rates = rates
        self.steps: list[Step] = []
        self.fail_at: tuple[str, int] | tuple[str, int, int] | None = None
        self.step_calls = Calls()

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.head(self.body(x))
        return (outputs[:, ::2].sum(1, keepdim=True) - outputs[:, 1::2].sum(1, keepdim=True)) / OUTPUTS**0.5

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self._maybe_fail("train")
        loss = self.loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._maybe_fail("validate")
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._maybe_fail("test")
        self.log("test_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def on_after_backward(self) -> None:
        self._maybe_fail("backward")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Callbacks have run, clipping has not: what a gradient transform leaves and an average may look at.
        recording = getattr(optimizer, "optimizer", optimizer)
        recording.unclipped = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(self.body.parameters()), "lr": self.rates[0]},
            {"params": list(self.head.parameters()), "lr": self.rates[1]},
        ]
        # The same list over several fits: what was recorded outlives the Trainer's optimizers.
        return RecordingSGD(groups, momentum=0.9).watch(self, self.steps)

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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": batch[0].mean()}


class AdamNet(Net):
    """Trains with Adam, at one rate."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return RecordingAdam(self.parameters(), lr=0.01).watch(self, self.steps)


class ManualNet(Net):
    """Steps one optimizer itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizer = self.optimizers()
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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        for optimizer in self.optimizers():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.5) for part in (self.body, self.head)]


class PlainBoring(BoringModel):
    """Lightning's own example module, without its scheduler, and with epochs as short as those of the others.

    Batches of one sample let its loss jump; the rate is such that it does not diverge of itself.
    """

    def train_dataloader(self) -> DataLoader:
        return DataLoader(RandomDataset(32, BATCHES))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.04, momentum=0.5)


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


class MemoryLogger(Logger):
    """Keeps what is logged."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step or 0, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def entries_so_far(trainer: Trainer) -> int:
    """Return how many entries the memory logger of a Trainer has; 0 if it has another one."""
    return len(trainer.logger.entries) if isinstance(trainer.logger, MemoryLogger) else 0


class SaveAt(Callback):
    """Saves a full checkpoint after an optimizer step: at the end of its batch, or of the validation after it.

    Attributes:
        logged: How many entries the logger had by then: a run that goes on from there does not make them again.
    """

    def __init__(self, step: int, path: str, moment: str = "batch end") -> None:
        self.step = step
        self.path = path
        self.moment = moment
        self.logged = 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, "batch end")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, "validation end")

    def _save(self, trainer: Trainer, moment: str) -> None:
        if moment == self.moment and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            self.logged = entries_so_far(trainer)


class AskAt(Callback):
    """Asks something of a plugin after a given optimizer step, as a user's own callback would."""

    def __init__(self, step: int, plugin: Any, ask: Callable[[Any], None]) -> None:
        self.step = step
        self.plugin = plugin
        self.ask = ask

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.ask(self.plugin)


@dataclass
class Run:
    """A fit that is over."""

    trainer: Trainer
    module: LightningModule
    plugins: list[Any]
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        return self.module.steps

    def snapshot(self, from_step: int = 0) -> dict[str, Any]:
        """Everything that two runs have to agree in: weights, optimizers, plugins, logged values from a step on."""
        return {
            "weights": copy.deepcopy(without_metric(self.module)),
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in self.trainer.optimizers],
            "plugins": [copy.deepcopy(plugin.state_dict()) for plugin in self.plugins if hasattr(plugin, "state_dict")],
            "logged": [entry for entry in self.logged if entry[0] >= from_step],
        }


def attach(
    plugins: list[Any], settings: dict[str, Any], module: LightningModule, *, resumed: bool = False
) -> dict[str, Any]:
    """Put plugins where a Trainer takes them: callbacks, one strategy, and the rest, such as a precision.

    A metric becomes a part of the module, and a callback feeds it.
    """
    metrics = [plugin for plugin in plugins if is_metric(plugin)]
    for metric in metrics:
        place(metric, module, resumed=resumed)
    # Fed before another callback saves.
    callbacks = [*map(Feeder, metrics), *(plugin for plugin in plugins if isinstance(plugin, Callback))]
    strategies = [plugin for plugin in plugins if isinstance(plugin, Strategy)]
    rest = [plugin for plugin in plugins if not isinstance(plugin, (Callback, Strategy)) and not is_metric(plugin)]
    if len(strategies) > 1:
        raise ValueError(f"A Trainer takes one strategy, not {[type(plugin).__name__ for plugin in strategies]}.")
    if strategies:
        settings = {**settings, "strategy": strategies[0]}
    return {**settings, "callbacks": [*settings.get("callbacks", []), *callbacks], "plugins": rest or None}


def fit(
    plugins: list[Any],
    *,
    module: LightningModule | None = None,
    train: Any = None,
    validation: Any = None,
    ckpt_path: str | None = None,
    own_loaders: bool = False,
    trainer: Trainer | None = None,
    **settings: Any,
) -> Run:
    """Fit a module with plugins on the CPU, quietly, and return what is left."""
    module = Net() if module is None else module
    logger = MemoryLogger()
    if trainer is None:
        defaults = {**QUIET, "devices": 1, "logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
        trainer = Trainer(**attach(plugins, {**defaults, **settings}, module, resumed=ckpt_path is not None))
    if own_loaders:
        trainer.fit(module, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, Stream() if train is None else train, validation, ckpt_path=ckpt_path)
    if dist.is_initialized() and dist.get_world_size() == 1:
        # Left by a distributed strategy on its own; the next fit may be without one.
        dist.destroy_process_group()
    return Run(trainer, module, plugins, logger.entries)


def differences(left: Any, right: Any, path: str = "", tolerance: float = 0.0) -> list[str]:
    """List where two nested values differ: at all, or with a tolerance by more than that."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return _tensor_differences(left, right, path, tolerance)
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{path}: keys {sorted(map(str, left.keys() ^ right.keys()))} are on one side only"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}/{key}", tolerance)]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return [f"{path}: {len(left)} entries against {len(right)}"]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{path}[{i}]", tolerance)]
    if isinstance(left, float) and isinstance(right, float):
        same = left == right or (left != left and right != right) or abs(left - right) <= tolerance * (1 + abs(right))
        return [] if same else [f"{path}: {left!r} against {right!r}"]
    return [] if left == right else [f"{path}: {left!r} against {right!r}"]


def assert_same(left: Any, right: Any, what: str, tolerance: float = 0.0) -> None:
    """Fail with the first few differences."""
    found = differences(left, right, tolerance=tolerance)
    assert not found, f"{what}: {len(found)} differences, the first are " + "; ".join(found[:5])


def _tensor_differences(left: Tensor, right: Tensor, path: str, tolerance: float) -> list[str]:
    if left.shape != right.shape or left.dtype != right.dtype:
        return [f"{path}: {left.dtype} {tuple(left.shape)} against {right.dtype} {tuple(right.shape)}"]
    if left.is_floating_point():
        # Without a tolerance nothing but equal numbers is close; what is no number on both sides is the same.
        same = torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        same = torch.equal(left, right)
    if same:
        return []
    return [f"{path}: differs by {(left.double() - right.double()).abs().max():.3g}"]


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
