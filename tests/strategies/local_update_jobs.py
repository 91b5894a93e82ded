"""What the processes of the local-update tests run: the twin's network in Lightning, on data of the process's own."""

import copy
import logging
import os
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from oracles.local_update_twin import HIDDEN, INPUTS, Inner, Outer, initial_weights, random_data
from torch import Tensor, nn

from lightning_stable.testing.harness import QUIET

BATCHES = 7


def rank() -> int:
    return int(os.environ["RANK"])


def ready() -> int:
    """Answer once everything is imported, so that a later job is timed without start-up."""
    return rank()


def build(outer: Outer, **more: Any) -> Any:
    """Return the package's strategy for the twin's settings."""
    from lightning_stable import strategies

    settings: dict[str, Any] = {"local_steps": outer.local_steps, **more}
    if outer.warmup_steps:
        settings["warmup_steps"] = outer.warmup_steps
    if outer.processes_per_worker > 1:
        settings["workers"] = "node"
    if outer.delayed:
        settings["variant"] = outer.variant
    if outer.method != "co2":
        settings["delayed"] = outer.delayed
    if outer.method != "local_sgd":
        settings |= {"outer_lr": outer.outer_lr, "outer_momentum": outer.outer_momentum}
    if outer.method == "co2":
        settings |= {"momentum_clip": outer.momentum_clip, "staleness_penalty": outer.staleness_penalty}
    names = {"co2": "CO2", "local_sgd": "LocalSGD", "slowmo": "SlowMo", "diloco": "DiLoCo"}
    return getattr(strategies, f"{names[outer.method]}Strategy")(**settings)


class Batches:
    """The batches of one process, in order, in a loader that knows how far it is."""

    def __init__(self, batches: list[tuple[Any, Any]]) -> None:
        self.batches = [tuple(torch.as_tensor(part) for part in batch) for batch in batches]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def loader(samples: int = 3, batches: int = BATCHES) -> Batches:
    """Return this process's training data."""
    return Batches(random_data(rank() + 1, batches, samples)[rank()])


class TwinNet(LightningModule):
    """The twin's network, in double precision."""

    def __init__(self, inner: Inner, norm: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.hidden = nn.Linear(INPUTS, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN) if norm else nn.Identity()
        self.head = nn.Linear(HIDDEN, 1)
        self.double()
        parameters = [*self.hidden.parameters(), *self.head.parameters()]
        nn.utils.vector_to_parameters(torch.tensor(initial_weights()), parameters)
        self.validated: list[dict[str, Tensor]] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(torch.tanh(self.norm(self.hidden(batch[0])))), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(snapshot(self))
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        inner = self.inner
        groups = [
            {"params": [*self.hidden.parameters(), *self.norm.parameters()], "lr": inner.rates[0]},
            {"params": list(self.head.parameters()), "lr": inner.rates[1]},
        ]
        if inner.name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, weight_decay=inner.weight_decay)
        else:
            optimizer = torch.optim.SGD(groups, momentum=inner.momentum, weight_decay=inner.weight_decay)
        if inner.factors is None:
            return optimizer
        factors = inner.factors
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, len(factors) - 1)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def vector(module: nn.Module) -> Tensor:
    """Return all weights as one vector, in the twin's order where the module is the twin's."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Watch(Callback):
    """Records the weights after every optimizer step, then saves where it is asked to, and records them again."""

    def __init__(self, save_at: tuple[int, ...] = (), path: str = "") -> None:
        self.save_at = save_at
        self.path = path
        self.after_step: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self.after_save: dict[int, Tensor] = {}
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if self.steps and self.steps[-1] == step:
            return  # a batch that is accumulated
        if not self.steps and trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self.steps.append(step)
        self.after_step.append(vector(pl_module))
        self.states.append(snapshot(pl_module))
        if step in self.save_at:
            trainer.save_checkpoint(f"{self.path}-{step}.ckpt")
            self.after_save[step] = vector(pl_module)


def make_trainer(strategy: Any, nodes: int = 1, **settings: Any) -> Trainer:
    """Return a quiet Trainer over the processes that the environment tells of."""
    return Trainer(
        **QUIET,
        strategy=strategy,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=nodes,
        num_sanity_val_steps=0,
        **settings,
    )


def train(
    outer: Outer,
    inner: Inner,
    *,
    steps: int,
    save_at: tuple[int, ...] = (),
    path: str = "",
    resume: str | None = None,
    norm: bool = False,
    validate_every: int | None = None,
    nodes: int = 1,
    more: dict[str, Any] | None = None,
    module: LightningModule | None = None,
) -> dict[str, Any]:
    """Fit the twin's network, and return what it went through and what is left."""
    module = TwinNet(inner, norm) if module is None else module
    watch = Watch(save_at, path)
    trainer = make_trainer(
        build(outer, **(more or {})),
        nodes,
        callbacks=[watch],
        max_steps=steps,
        gradient_clip_val=inner.clip,
        accumulate_grad_batches=inner.accumulate,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None if validate_every else 1,
    )
    validation = Batches(random_data(1, 2, seed=9)[0]) if validate_every else None
    trainer.fit(module, loader(), validation, ckpt_path=resume)
    return {
        "steps": watch.steps,
        "after_step": watch.after_step,
        "after_save": watch.after_save,
        "states": watch.states,
        "final": vector(module),
        "state": snapshot(module),
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "validated": module.validated,
    }


class ManualTwinNet(TwinNet):
    """Steps an optimizer for each of its two layers itself, the head's less often."""

    def __init__(self, inner: Inner) -> None:
        super().__init__(inner)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        hidden, head = self.optimizers()
        hidden.zero_grad()
        head.zero_grad()
        self.manual_backward(self.loss(batch))
        hidden.step()
        # Batches are counted over the epochs by the other optimizer's steps.
        if (self.trainer.fit_loop.epoch_loop.total_batch_idx + 1) % self.inner.head_every == 0:
            head.step()

    def configure_optimizers(self) -> Any:
        parts = zip((self.hidden, self.head), self.inner.rates, strict=True)
        return [torch.optim.SGD(part.parameters(), lr=rate, momentum=self.inner.momentum) for part, rate in parts]


def train_manually(outer: Outer, inner: Inner, **settings: Any) -> dict[str, Any]:
    """Fit the twin's network with two optimizers under manual optimisation."""
    return train(outer, inner, module=ManualTwinNet(inner), **settings)


class Failing(TwinNet):
    """At a step of one rank something happens: the process ends, hangs, or raises."""

    def __init__(self, inner: Inner, who: int, at: int, how: str) -> None:
        super().__init__(inner)
        self.who, self.at, self.how = who, at, how

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if rank() == self.who and self.trainer.global_step == self.at:
            if self.how == "exit":
                os._exit(7)
            if self.how == "stall":
                time.sleep(600)
            raise RuntimeError("deliberate failure in the middle of training")
        return super().training_step(batch, batch_idx)


def train_and_fail(
    outer: Outer, inner: Inner, *, who: int, at: int, how: str, timeout: float, **settings: Any
) -> dict[str, Any]:
    """Fit the twin's network until something happens to one rank."""
    more = {"timeout": timedelta(seconds=timeout)}
    return train(outer, inner, module=Failing(inner, who, at, how), more=more, **settings)


def fail_as_a_program(path: str, **settings: Any) -> None:
    """Fit until something happens to one rank, leave the error in a file and end, as a program of one's own does."""
    try:
        train_and_fail(**settings)
    except Exception:
        Path(f"{path}-{rank()}").write_text(traceback.format_exc())
    os._exit(1)


class Slow(TwinNet):
    """One rank waits at a batch until another has begun a later batch, or for so many seconds."""

    def __init__(self, path: str, slow: int, at: int, until: int, patience: float) -> None:
        super().__init__(Inner())
        self.path, self.slow, self.at, self.until, self.patience = path, slow, at, until, patience
        self.begun = 0
        self.seen = -1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.begun += 1
        file = Path(self.path)
        if rank() != self.slow:
            file.with_suffix(".new").write_text(str(self.begun))
            file.with_suffix(".new").replace(file)
        elif self.begun == self.at:
            deadline = time.monotonic() + self.patience
            while self.seen < self.until and time.monotonic() < deadline:
                time.sleep(0.01)
                self.seen = int(file.read_text()) if file.exists() else 0
        return super().training_step(batch, batch_idx)


def train_with_a_slow_rank(
    outer: Outer, path: str, *, slow: int, at: int, until: int, patience: float, steps: int
) -> int:
    """Return how many batches the other rank had begun while the slow one stayed in one."""
    module = Slow(path, slow, at, until, patience)
    train(outer, module.inner, steps=steps, module=module)
    return module.seen


class Said(logging.Handler):
    """Collects what the host and the package log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Said":
        for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_stable"):
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *args: Any) -> None:
        for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_stable"):
            logging.getLogger(name).removeHandler(self)


def train_and_listen(outer: Outer, inner: Inner, **settings: Any) -> dict[str, Any]:
    """Fit the twin's network and return what was said too, in the log and as warnings."""
    with Said() as said, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train(outer, inner, **settings)
    return {**run, "said": [*said.lines, *(str(warning.message) for warning in caught)]}


def start_apart(outer: Outer, how: str) -> str:
    """Start from heads that differ between the processes in more than their values, and return the error."""
    module = TwinNet(Inner())
    if how == "another shape":
        module.head = nn.Linear(HIDDEN, 1 + rank()).double()
    elif rank() == 0:
        pass
    elif how == "another layer":
        module.head = nn.Linear(HIDDEN, 1, bias=False).double()
    elif how == "another type":
        module.head.float()
    else:
        module.head.requires_grad_(False)
    return error_of(build(outer), module)


def train_from_other_weights(outer: Outer, inner: Inner, **settings: Any) -> dict[str, Any]:
    """Fit the twin's network from weights that are the twin's on rank 0 only."""
    module = TwinNet(inner)
    with torch.no_grad():
        module.head.weight += rank()
    return train(outer, inner, module=module, **settings)


class Sharded(TwinNet):
    """Splits one of its layers over the processes before the strategy sees it."""

    def configure_model(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.hidden, mesh=init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),)))


def start_sharded(outer: Outer) -> str:
    """Fit a module with a layer that is sharded, and return the error."""
    return error_of(build(outer), Sharded(Inner()))


def start_without_optimizer(outer: Outer) -> str:
    """Fit a module that has no optimizer, and return the error."""
    module = TwinNet(Inner())
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    return error_of(build(outer), module)


def error_of(strategy: Any, module: LightningModule) -> str:
    """Return the words of the ValueError that a short fit raises, or an empty string."""
    try:
        make_trainer(strategy, max_steps=4).fit(module, loader())
    except ValueError as error:
        return str(error)
    return ""
