"""What the contracts run: fits on a deterministic stream that compare bit by bit, in one process or in two.

Nothing here knows a method by name.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from contract.feeding import Feeder, is_metric, place, without_metric
from contract.modules import (
    MODULES,
    OUTPUTS,
    AdamNet,
    DictNet,
    ManualNet,
    Net,
    PlainBoring,
    Step,
    TwoOptimizerNet,
)
from contract.streams import BATCHES, EndlessStream, Stream
from contract.workers import processes
from lightning.fabric.utilities import registry
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor

__all__ = [
    "BATCHES",
    "MODULES",
    "OUTPUTS",
    "QUIET",
    "AdamNet",
    "AskAt",
    "DictNet",
    "EndlessStream",
    "ManualNet",
    "MemoryLogger",
    "Net",
    "PlainBoring",
    "Run",
    "SaveAt",
    "Step",
    "Stream",
    "TwoOptimizerNet",
    "assert_same",
    "attach",
    "differences",
    "entries_so_far",
    "fit",
]

# Every Trainer reads what all installed packages offer, and that is the same all the time.
registry.entry_points = functools.cache(registry.entry_points)

# Settings of a Trainer in a test: one process on the CPU, no files, no output, no other order than the stream's.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
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
        defaults = {**QUIET, "devices": processes(), "logger": logger, "log_every_n_steps": 1}
        defaults["num_sanity_val_steps"] = 0
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
