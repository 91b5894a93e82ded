"""What the processes of the tests of CompressedDDPStrategy run: the twin's network on data of the process's own."""

import copy
import itertools
import os
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from oracles.compressed_ddp_twin import OPTIONAL, SIZES, initial_weights, random_batches
from strategies.local_update_jobs import Batches
from torch import Tensor, nn

from lightning_stable.testing.harness import QUIET

BATCHES = 5


class Net(LightningModule):
    """The twin's network."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        pairs = itertools.pairwise(SIZES)
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairs)
        self.to(dtype)
        self.load_state_dict({name: torch.tensor(value, dtype=dtype) for name, value in initial_weights().items()})
        self.broken: tuple[int, ...] = ()
        self.broken_tensor: str | None = None
        self.without: tuple[int, ...] = ()

    def loss(self, batch: Any) -> Tensor:
        x, y = (part.to(self.layers[0].weight.dtype) for part in batch)
        for number, layer in enumerate(self.layers[:-1]):
            if number != OPTIONAL or self.trainer.global_step not in self.without:
                x = torch.tanh(layer(x))
        return nn.functional.mse_loss(self.layers[-1](x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if not self._is_broken() or self.global_rank == 0:
            return loss
        return loss * torch.nan if self.broken_tensor is None else loss + self._suspect().sum() * torch.nan

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self._is_broken():
            assert self._suspect().grad.isnan().all(), "a gradient that is not finite looked finite"
            self.zero_grad(set_to_none=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def _suspect(self) -> Tensor:
        return self.get_parameter(self.broken_tensor or "layers.0.bias")

    def _is_broken(self) -> bool:
        return self.trainer.global_step in self.broken


class TwoOptimizers(Net):
    """A pass and an optimizer for the first two layers, then both for the last two."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            if self.toggle:
                self.toggle_optimizer(optimizer)
            self.zero_grad(set_to_none=False)
            self.manual_backward(self.loss(batch))
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(part.parameters(), lr=0.05, momentum=0.9) for part in (self.layers[:2], self.layers[2:])
        ]


class Watch(Callback):
    """Records the weights after each step, and saves after one."""

    def __init__(self, save_at: int | None, path: str) -> None:
        self.save_at = save_at
        self.path = path
        self.weights: list[dict[str, Tensor]] = []
        self.buckets: list[list[str]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self.weights.append(copies(pl_module))
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        layouts = getattr(getattr(trainer.strategy, "_hook", None), "_layouts", None)
        self.buckets = (
            [] if layouts is None else [list(layout.names) for stream, _, layout in layouts.now() if stream == 0]
        )


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def build(settings: dict[str, Any]) -> DDPStrategy:
    from lightning_stable.strategies import CompressedDDPStrategy

    return CompressedDDPStrategy(**settings) if "compressor" in settings else DDPStrategy(**settings)


def train(
    settings: dict[str, Any],
    steps: int,
    *,
    kind: str = "plain",
    dtype: str = "float64",
    broken: tuple[int, ...] = (),
    broken_tensor: str | None = None,
    without: tuple[int, ...] = (),
    batches: int = BATCHES,
    save_at: int | None = None,
    path: str = "",
    resume: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Train and return the weights after each step, what was sent and kept, and the warnings."""
    module = Net(getattr(torch, dtype)) if kind == "plain" else TwoOptimizers(toggle=kind == "toggled")
    module.broken, module.broken_tensor, module.without = broken, broken_tensor, without
    strategy = build(settings)
    watch = Watch(save_at, path)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    optimizers = 1 if kind == "plain" else 2
    trainer = Trainer(
        **QUIET,
        strategy=strategy,
        devices=size,
        max_steps=steps * optimizers,
        callbacks=[watch],
        num_sanity_val_steps=0,
        **more,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Batches(random_batches(size, batches)[rank]), ckpt_path=resume)
    if path and save_at is None:
        trainer.save_checkpoint(path)
    hook = getattr(strategy, "_hook", None)
    return {
        "weights": watch.weights,
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "bytes": getattr(strategy, "bytes_sent", 0),
        "own": None if hook is None else hook.own_state(),
        "shared": None if hook is None else hook.shared_state(),
        "buckets": watch.buckets,
        "warnings": [str(warning.message) for warning in caught],
    }


class FailAndSave(Callback):
    """Fails after the third step, and saves then."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise ValueError("deliberate failure")

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        # As the host's own callback for this does on one process; the others may be anywhere.
        if trainer.is_global_zero:
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), self.path)


def fail_and_save(settings: dict[str, Any], path: str) -> str:
    """Return the words of the error."""
    return _error_of(Net(), build(settings), callbacks=[FailAndSave(path)])


def save_weights(settings: dict[str, Any], path: str) -> None:
    """Train a little, and save the weights alone."""
    trainer = _trainer(build(settings))
    trainer.fit(Net(), _data())
    trainer.save_checkpoint(path, weights_only=True)


def twice(settings: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the weights after two fits of the same strategy, from the same start."""
    trainer, found = _trainer(build(settings)), []
    for steps in (4, 8):
        trainer.fit_loop.epoch_loop.max_steps = steps  # counted over both fits
        module = Net()
        trainer.fit(module, _data())
        found.append(copies(module))
    return found


class Special(Net):
    """The twin's network and a scalar parameter, one without entries, or a table with sparse gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "scalar":
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        if kind == "empty":
            self.nothing = nn.Parameter(torch.ones(0, dtype=torch.float64))
        if kind == "sparse":
            self.table = nn.Embedding(4, 2, sparse=True)
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.kind == "scalar":
            return loss * self.scale
        if self.kind == "empty":
            return loss + self.nothing.sum()
        return loss + self.table(torch.tensor([0, 2])).sum() if self.kind == "sparse" else loss


def fit_special(compressor: str, kind: str) -> str:
    """Fit what a compressor may refuse, and return the words of its error."""
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    module = Special(kind).float() if kind == "scaled" else Special(kind)
    return _error_of(module, build({"compressor": compressor}), plugins=[scaled] if kind == "scaled" else [])


def _error_of(module: LightningModule, strategy: DDPStrategy, **more: Any) -> str:
    try:
        _trainer(strategy, **more).fit(module, _data())
    except ValueError as error:
        return str(error)
    return ""


def _trainer(strategy: DDPStrategy, **more: Any) -> Trainer:
    return Trainer(**QUIET, strategy=strategy, devices=2, max_steps=4, num_sanity_val_steps=0, **more)


def _data() -> Batches:
    return Batches(random_batches(2, BATCHES)[int(os.environ["RANK"])])
