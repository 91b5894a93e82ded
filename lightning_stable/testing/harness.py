"""What the contracts run: fits on a deterministic stream that compare bit by bit, in one process or in two.

Nothing here knows a method by name.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from typing_extensions import override

from lightning_stable.testing._host import hastened
from lightning_stable.testing.feeding import Feeder, is_metric, place, without_metric
from lightning_stable.testing.modules import (
    MODULES,
    OUTPUTS,
    AdamNet,
    DictNet,
    ManualNet,
    Net,
    PlainBoring,
    Step,
    TwoOptimizerNet,
    module_settings,
)
from lightning_stable.testing.streams import BATCHES, EndlessStream, Stream
from lightning_stable.testing.workers import processes

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
    "once",
    "vector",
]

Kept = TypeVar("Kept")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Settings of a Trainer in a test: one process on the CPU, no files, no output, no other order than the stream's."""


class MemoryLogger(Logger):
    """Keeps what is logged.

    Attributes:
        entries: The step and the values of each call.
    """

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int, dict[str, float]]] = []

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append((step or 0, {name: float(value) for name, value in metrics.items()}))

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def entries_so_far(trainer: Trainer) -> int:
    """Return how many entries the memory logger of a Trainer has; 0 if it has another one."""
    return len(trainer.logger.entries) if isinstance(trainer.logger, MemoryLogger) else 0


class SaveAt(Callback):
    """Saves a full checkpoint after an optimizer step: at the end of its batch, or of the validation after it.

    Args:
        step: The optimizer step.
        path: The file.
        moment: ``"batch end"`` or ``"validation end"``.
        unseen: Plugins that saving must change nothing for, nor for the module, the optimizers and the random numbers.

    Attributes:
        logged: How many entries the logger had by then: a run that goes on from there does not make them again.
    """

    def __init__(self, step: int, path: str, moment: str = "batch end", unseen: list[Any] | None = None) -> None:
        self.step = step
        self.path = path
        self.moment = moment
        self.unseen = unseen
        self.logged = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, "batch end")

    @override
    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._save(trainer, "validation end")

    def _save(self, trainer: Trainer, moment: str) -> None:
        if moment != self.moment or trainer.global_step != self.step:
            return
        before = self._state(trainer)
        trainer.save_checkpoint(self.path)
        assert_same(self._state(trainer), before, "saving a checkpoint changed training: after against before")
        self.logged = entries_so_far(trainer)

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        if self.unseen is None:
            return {}
        return {**Run(trainer, trainer.lightning_module, self.unseen).snapshot(), "random": torch.get_rng_state()}


class AskAt(Callback):
    """Asks something of a plugin after a given optimizer step, as a user's own callback would."""

    def __init__(self, step: int, plugin: Any, ask: Callable[[Any], None]) -> None:
        self.step = step
        self.plugin = plugin
        self.ask = ask

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.ask(self.plugin)


@dataclass
class Run:
    """A fit that is over.

    Attributes:
        trainer: Its Trainer.
        module: What was trained.
        plugins: The plugins under contract.
        logged: The step and the values of each entry of the logger.
    """

    trainer: Trainer
    module: LightningModule
    plugins: list[Any]
    logged: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        """What the module's optimizer recorded."""
        steps: Any = self.module.steps
        return cast("list[Step]", steps)

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


@hastened()
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


_KEPT: dict[Any, tuple[Any, Any]] = {}


def once(owner: Any, what: str, make: Callable[[], Kept]) -> Kept:
    """Return what was made before for this owner and modules of the present kind, else make and keep it.

    For fits that are deterministic and needed again and again: without a plugin, or with a fresh one of a row. Not in
    two processes, where one must not wait for what the other has kept.
    """
    if processes() > 1:
        return make()
    key = (id(owner), what, *module_settings())
    if key not in _KEPT:
        _KEPT[key] = owner, make()  # the owner, too, so that no other takes its place in memory
    kept: Kept = _KEPT[key][1]
    return kept


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


def vector(weights: dict[str, Tensor]) -> Tensor:
    """Return all weights end to end."""
    return torch.cat([value.detach().flatten() for value in weights.values()])


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
