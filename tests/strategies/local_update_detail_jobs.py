"""What the two processes of ``test_local_update.py`` run. Each sees samples of its own."""

import os
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from strategies.local_update_jobs import Said
from torch import Tensor, nn

from lightning_stable.strategies import CO2Strategy, LocalSGDStrategy
from lightning_stable.testing.harness import fit
from lightning_stable.testing.modules import Net, TwoOptimizerNet
from lightning_stable.testing.streams import FEATURES, Stream


def rank() -> int:
    return int(os.environ["RANK"])


class Apart(Net):
    """Sees other numbers on every rank, and counts its batches in a buffer that has no mean."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mask", torch.full((2,), torch.finfo(torch.float32).min))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self.seen += 1 + rank()
        return super().training_step((batch[0] + 0.5 * rank(), batch[1]), batch_idx)


class TermAt(Callback):
    """Sends SIGTERM to one rank after a step."""

    def __init__(self, step: int, to: int) -> None:
        self.step = step
        self.to = to

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.to:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_by_signal(to: int, *, saving: bool = True, **settings: Any) -> dict[str, Any]:
    """Train until a signal to one rank ends it; return where, with which weights, what was saved, said and the code."""
    folder = tempfile.mkdtemp()
    module, strategy = Apart(), CO2Strategy(local_steps=3, **settings)
    callbacks = [TermAt(4, to), *([OnExceptionCheckpoint(folder, "end")] if saving else [])]
    code: Any = "no exception"
    with Said() as said, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit([strategy, *callbacks], module=module, max_steps=40, devices=2, enable_checkpointing=saving)
        except SIGTERMException as end:
            code = end.code
    saved = torch.load(Path(folder) / "end.ckpt", weights_only=True)["state_dict"] if saving and not rank() else None
    return {
        "step": module.trainer.global_step,
        "weights": dict(module.state_dict()),
        "saved": saved,
        "code": code,
        "said": [*said.lines, *(str(warning.message) for warning in caught)],
    }


def listen_to_plans(plans: list[dict[str, Any]], **settings: Any) -> list[list[str]]:
    """Return what is said of checkpoints before the first step of fits that save at different times."""
    heard = []
    for plan in plans:
        trainer = {name: plan[name] for name in ("val_check_interval", "accumulate_grad_batches") if name in plan}
        saves = {name: value for name, value in plan.items() if name not in trainer}
        saver = ModelCheckpoint(tempfile.mkdtemp(), **saves)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            strategy = LocalSGDStrategy(**{"local_steps": 3, **settings})
            validation = Stream(seed=3) if "val_check_interval" in plan else None
            fit(
                [strategy, saver],
                module=Apart(),
                validation=validation,
                max_steps=1,
                devices=2,
                enable_checkpointing=True,
                **trainer,
            )
        heard.append([str(w.message) for w in caught if "saves a checkpoint" in str(w.message)])
    return heard


def keep_buffers() -> dict[str, Any]:
    """Train, save in the middle of a round, train on; return the buffers at both points."""
    module, path = Apart(), Path(tempfile.mkdtemp()) / "middle.ckpt"
    seen: dict[str, Any] = {}

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)
                seen["counted"] = int(module.seen)

    fit([LocalSGDStrategy(local_steps=3), Save()], module=module, max_steps=8, devices=2)
    return {**seen, "mask": module.mask, "ended": int(module.seen)}


class InTurns(TwoOptimizerNet):
    """Steps one of its two optimizers at each batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        optimizer = self.optimizers()[batch_idx % 2]
        loss = self.loss((batch[0] + 0.5 * rank(), batch[1]))
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Weights(Callback):
    """Remembers the weights of a module's two parts after every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        parts = [nn.utils.parameters_to_vector(part.parameters()) for part in (pl_module.body, pl_module.head)]
        self.seen.append((parts[0].detach().clone(), parts[1].detach().clone()))


def take_turns(save_at: int) -> dict[str, Any]:
    """Train with optimizers that take turns, straight and resumed."""
    path = Path(tempfile.gettempdir()) / f"turns-{os.environ['MASTER_PORT']}.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == save_at:
                trainer.save_checkpoint(path)

    found = {}
    for name, ckpt in (("straight", None), ("resumed", str(path))):
        watch = Weights()
        callbacks = [watch, *([Save()] if ckpt is None else [])]
        module = InTurns(norm=False)
        fit([LocalSGDStrategy(local_steps=2), *callbacks], module=module, max_steps=10, devices=2, ckpt_path=ckpt)
        found[name] = [torch.cat(parts) for parts in watch.seen]
    return found


def warm_up_with_two() -> list[tuple[Tensor, Tensor]]:
    """Warm up with two optimizers that both step at every batch."""

    class Both(TwoOptimizerNet):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return super().loss((batch[0] + 0.5 * rank(), batch[1]))

    watch = Weights()
    fit([LocalSGDStrategy(local_steps=4, warmup_steps=3), watch], module=Both(norm=False), max_steps=10, devices=2)
    return watch.seen


class NoIndex(Apart):
    """Its training step takes the batch only, of two loaders."""

    def training_step(self, batch: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().training_step(batch[0], 0)


def merge_with_two_loaders() -> dict[str, Any]:
    """Estimate batch normalisation anew at the end, from two loaders and a step without an index."""
    module = NoIndex()
    before = torch.random.get_rng_state()
    fit(
        [LocalSGDStrategy(local_steps=100, final_merge=True)],
        module=module,
        train=[Stream(), Stream(seed=9)],
        max_steps=6,
        devices=2,
    )
    after = torch.random.get_rng_state()
    layer = module.body[1]
    return {
        "calls": module.calls,
        "mean": layer.running_mean.clone(),
        "momentum": layer.momentum,
        "log": "log" in module.__dict__,
        "random": torch.equal(before, after),
    }


def train_in_half(**settings: Any) -> dict[str, Tensor]:
    """Train in bfloat16 weights."""
    module = Apart(norm=False)
    strategy = CO2Strategy(local_steps=2, **settings)
    fit([strategy], module=module, max_steps=9, devices=2, precision="bf16-true")
    moved = nn.utils.parameters_to_vector(module.parameters()) - nn.utils.parameters_to_vector(
        Apart(norm=False).to(torch.bfloat16).parameters()
    )
    return {"moved": moved.detach(), "weights": nn.utils.parameters_to_vector(module.parameters()).detach()}


class Tied(LightningModule):
    """Two parameters on one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(FEATURES, 1, bias=False)
        self.other = nn.Linear(FEATURES, 1, bias=False)
        self.other.weight.data = self.one.weight.data

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return (self.one(batch[0]) + self.other(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
