"""What the processes of the tests of 1-bit Adam run: the twin's network in Lightning, on data of the process's own."""

import copy
import logging
import os
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from oracles.one_bit_adam_twin import HIDDEN, INPUTS, Settings, batch, initial_weights
from torch import Tensor, nn

from lightning_stable.strategies import OneBitAdamStrategy
from lightning_stable.testing.harness import QUIET, MemoryLogger, SaveAt


def rank() -> int:
    return int(os.environ["RANK"])


class Batches:
    """The batches of one process, in order, in a loader that knows how far it is."""

    def __init__(self, count: int, dtype: torch.dtype, dead_input: bool = True) -> None:
        made = [batch(index, rank(), dead_input) for index in range(count)]
        self.batches = [tuple(torch.as_tensor(part).to(dtype) for part in pair) for pair in made]
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


class TwinNet(LightningModule):
    """The twin's network; it records its weights after each step, and the gradients that hooks saw."""

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__()
        self.settings, self.options = settings, options
        self.hidden, self.head = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, 1)
        self.weights: list[Tensor] = []
        self.momentum: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.rates: list[float] = []
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.as_tensor(initial_weights()).float(), self.parameters())

    def on_fit_start(self) -> None:
        if self.dtype == torch.float64:
            with torch.no_grad():
                nn.utils.vector_to_parameters(torch.as_tensor(initial_weights()), self.parameters())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.head(torch.tanh(self.hidden(x))), y)

    def training_step(self, pair: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*pair)
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))

    def on_train_batch_end(self, *args: Any) -> None:
        if len(self.weights) < self.trainer.global_step:
            self.weights.append(nn.utils.parameters_to_vector(self.parameters()).detach().clone())
            states = [self.optimizers().state.get(p, {}) for p in self.parameters()]
            self.momentum.append(torch.cat([state["exp_avg"].flatten() for state in states if state]).clone())
            self.rates.append(self.optimizers().param_groups[0]["lr"])

    def groups(self) -> list[dict[str, Any]]:
        made = self.settings
        pairs = zip(made.beta1, made.beta2, strict=True)
        values = zip(made.rates, pairs, made.eps, made.decay, strict=True)
        return [
            {"params": list(part.parameters()), "lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
            for part, (lr, betas, eps, decay) in zip((self.hidden, self.head), values, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        kind = torch.optim.AdamW if self.settings.decoupled else torch.optim.Adam
        optimizer = kind(self.groups(), **self.options)
        if self.settings.factors is None:
            return optimizer
        factors = [*self.settings.factors, 0.0]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Ask(Callback):
    """Calls a function of the strategy and the module after each batch, and keeps what it returns."""

    def __init__(self, ask: Any) -> None:
        self.ask, self.answers = ask, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.answers.append(self.ask(trainer.strategy, pl_module))


def fit(module: LightningModule, strategy: Any, loader: Any, ckpt_path: str | None = None, **settings: Any) -> Trainer:
    """Fit on the CPU in this group of processes, quietly; a warning is an error."""
    world = int(os.environ["WORLD_SIZE"])
    defaults = {**QUIET, "devices": world, "logger": MemoryLogger(), "log_every_n_steps": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*OneBitAdam|.*step\\(\\).*")
        trainer = Trainer(**{**defaults, "num_sanity_val_steps": 0, **settings}, strategy=strategy)
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def snapshot(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return what ranks, and a run and its resumption, have to agree in."""
    return {
        "weights": copy.deepcopy(module.state_dict()),
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers],
    }


def train(
    settings: Settings,
    precision: str = "32-true",
    options: dict[str, Any] | None = None,
    **trainer_settings: Any,
) -> dict[str, Any]:
    """Train the twin's network with its settings."""
    module = TwinNet(settings, **(options or {}))
    strategy = OneBitAdamStrategy(freeze_step=settings.freeze_step)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    loader = Batches(settings.steps * settings.accumulate, dtype, settings.dead_input)
    traffic = Ask(lambda strategy, _: (strategy.frozen, strategy.bytes_sent))
    trainer = fit(
        module,
        strategy,
        loader,
        precision=precision,
        max_steps=settings.steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        callbacks=[traffic],
        **trainer_settings,
    )
    frozen = next(iter(strategy._frozen.values()))
    return {
        "weights": torch.stack(module.weights),
        "momentum": torch.stack(module.momentum),
        "gradients": torch.stack([g for g in module.gradients if len(g) == len(module.gradients[0])]),
        "errors": frozen.state_dict(),
        "traffic": traffic.answers,
        "steps": [int(state["step"]) for state in trainer.optimizers[0].state.values()],
        "rates": module.rates,
        **{"state": snapshot(trainer, module)},
        "step_is_own": "step" in vars(trainer.optimizers[0]),
    }


def resume(settings: Settings, save_at: int, path: str, precision: str = "32-true") -> dict[str, Any]:
    """Train through, saving on the way, and again from what was saved."""
    loader = Batches(settings.steps, torch.float32)
    arguments: dict[str, Any] = {"max_steps": settings.steps, "precision": precision}
    through = TwinNet(settings)
    strategy = OneBitAdamStrategy(freeze_step=settings.freeze_step)
    callbacks = [SaveAt(save_at, path), FirstGradients()]
    uninterrupted = fit(through, strategy, loader, **arguments, callbacks=callbacks)
    again = TwinNet(settings)
    strategy = OneBitAdamStrategy(freeze_step=settings.freeze_step)
    loader = Batches(settings.steps, torch.float32)
    resumed = fit(again, strategy, loader, path, **arguments, callbacks=[FirstGradients()])
    return {
        "through": snapshot(uninterrupted, through),
        "resumed": snapshot(resumed, again),
        "steps": len(again.weights),
        "callbacks": [run.callbacks[-1 if run is resumed else 1].state_dict() for run in (uninterrupted, resumed)],
    }


def go_on_after_the_end(settings: Settings, end: int, path: str) -> dict[str, Any]:
    """Train through, and again in two fits with a checkpoint that is saved when the first one is over."""
    states = []
    for parts in ([settings.steps], [end, settings.steps]):
        for number, steps in enumerate(parts):
            module = TwinNet(settings)
            strategy = OneBitAdamStrategy(freeze_step=settings.freeze_step)
            loader = Batches(settings.steps, torch.float32)
            trainer = fit(module, strategy, loader, path if number else None, max_steps=steps)
            if steps == end:
                trainer.save_checkpoint(path)
        states.append(snapshot(trainer, module))
    return {"through": states[0], "in two": states[1]}


class FirstGradients(Callback):
    """Sums what it sees of gradients, which are a process' own after the freeze; rank 0's is what counts."""

    takes_state_of_rank_zero = True

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.total += sum(p.grad.sum() for p in pl_module.parameters() if p.grad is not None)
        # Acts on what it has seen, so that a state that is not the saved one leads elsewhere.
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + 0.1 * torch.tanh(self.total))

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"].clone()


def resume_from(settings: Settings, path: str | None, strategy: str = "one_bit_adam") -> dict[str, Any]:
    """Train on, from a checkpoint if there is one, in as many processes as there are, and tell what was said."""
    module = TwinNet(settings)
    chosen = OneBitAdamStrategy(freeze_step=settings.freeze_step) if strategy == "one_bit_adam" else strategy
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = int(os.environ["WORLD_SIZE"])
        trainer = Trainer(**{**QUIET, "devices": world}, max_steps=settings.steps, strategy=chosen)
        trainer.fit(module, Batches(settings.steps, torch.float32), ckpt_path=path)
    return {
        "said": [str(warning.message) for warning in caught],
        "state": snapshot(trainer, module),
        "frozen": getattr(trainer.strategy, "frozen", None),
        "steps": len(module.weights),
    }


class NormNet(TwinNet):
    """Has batch normalisation, and records its statistics as each training step begins."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.norm = nn.BatchNorm1d(INPUTS, affine=False)
        self.seen: list[Tensor] = []

    def training_step(self, pair: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(torch.cat([buffer.flatten().double() for buffer in self.norm.buffers()]))
        return self.loss(self.norm(pair[0]), pair[1])


def buffers(settings: Settings, broadcast: bool) -> dict[str, Any]:
    """Train with batch normalisation."""
    module = NormNet(settings)
    strategy = OneBitAdamStrategy(freeze_step=settings.freeze_step, broadcast_buffers=broadcast)
    loader = Batches(settings.steps * settings.accumulate, torch.float32)
    fit(module, strategy, loader, max_steps=settings.steps, accumulate_grad_batches=settings.accumulate)
    return {"seen": torch.stack(module.seen), "weights": module.weights[-1]}


class ManualNet(TwinNet):
    """Steps two Adams itself, the second one not at every batch, and looks at the gradients after each step."""

    def __init__(self, settings: Settings, every: int = 2) -> None:
        super().__init__(settings)
        self.automatic_optimization = False
        self.every = every
        self.hooks: list[str] = []
        self.kept: list[bool] = []

    def training_step(self, pair: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss(*pair))
        first.step()
        if (batch_idx + 1) % self.every == 0:
            second.step()
        self.kept.append(all(p.grad is not None for p in self.parameters()))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients.append(self.hidden.weight.grad.clone())

    def on_train_batch_end(self, *args: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        made = [torch.optim.Adam(part.parameters(), lr=0.02) for part in (self.hidden, self.head)]
        made[0].register_step_pre_hook(lambda *_: self.hooks.append("before"))
        made[0].register_step_post_hook(lambda *_: self.hooks.append("after"))
        return made


def manual(steps: int) -> dict[str, Any]:
    """Train with two optimizers under manual optimisation, frozen when each has made two steps."""
    module = ManualNet(Settings())
    frozen = Ask(lambda strategy, _: strategy.frozen)
    strategy = OneBitAdamStrategy(freeze_step=2)
    trainer = fit(module, strategy, Batches(steps, torch.float32), max_epochs=1, callbacks=[frozen])
    return {
        "frozen": frozen.answers,
        "gradients": torch.stack(module.gradients),
        "hooks": module.hooks,
        "kept": module.kept,
        "state": snapshot(trainer, module),
        "counts": [[int(s["step"]) for s in optimizer.state.values()] for optimizer in trainer.optimizers],
    }


class Meddle(Callback):
    """Does something to the optimizer after a step."""

    def __init__(self, how: str, step: int) -> None:
        self.how, self.step = how, step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        optimizer = trainer.optimizers[0]
        if trainer.global_step != self.step:
            return
        if self.how == "reset":
            optimizer.state[pl_module.head.weight]["exp_avg_sq"].zero_()
        elif self.how == "restore":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif self.how == "add":
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        elif self.how == "untrain":
            pl_module.head.requires_grad_(False)
        elif self.how == "fail":
            raise RuntimeError("deliberate failure in the middle of training")


def meddle(how: str, step: int) -> str:
    """Train while a callback does something that is not allowed, and return the error."""
    module = TwinNet(Settings())
    strategy = OneBitAdamStrategy(freeze_step=2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        fit(module, strategy, Batches(8, torch.float32), max_steps=8, callbacks=[Meddle(how, step)])
    except (ValueError, RuntimeError) as error:
        assert "step" not in vars(module.optimizers().optimizer)
        return str(error)
    return ""


def sometimes(used: tuple[str, ...]) -> dict[str, Any]:
    """Train a head that has a gradient at some steps on some processes only: "both", "first" or "none"."""

    class Sometimes(TwinNet):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            features = torch.tanh(self.hidden(x))
            now = used[self.trainer.global_step]
            uses = now == "both" or (now == "first" and rank() == 0)
            return nn.functional.mse_loss(self.head(features) if uses else features.sum(1, keepdim=True), y)

    def look(strategy: Any, module: LightningModule) -> dict[str, Any]:
        optimizer = module.optimizers().optimizer
        head = list(module.head.parameters())
        frozen = strategy._frozen.get(id(optimizer))
        return {
            "hidden": nn.utils.parameters_to_vector(module.hidden.parameters()).detach().clone(),
            "head": [p.detach().clone() for p in head],
            "state": [copy.deepcopy(optimizer.state[p]) for p in head],
            "errors": frozen and [part.clone() for place in (2, 3) for part in frozen._errors_of(place)],
        }

    asked = Ask(look)
    module = Sometimes(Settings(decoupled=True, decay=(0.1, 0.1)))
    strategy = OneBitAdamStrategy(freeze_step=2, find_unused_parameters=True)
    fit(module, strategy, Batches(len(used), torch.float32), max_steps=len(used), callbacks=[asked])
    return {"seen": asked.answers}


def late(steps: int) -> dict[str, Any]:
    """Train a module whose head begins to train after the freeze."""

    class Late(TwinNet):
        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            features = torch.tanh(self.hidden(x)).sum(1, keepdim=True)
            return nn.functional.mse_loss(
                features if self.trainer.global_step < 4 else self.head(features.expand(-1, HIDDEN)), y
            )

    module = Late(Settings())
    start = copy.deepcopy(module.head.state_dict())
    strategy = OneBitAdamStrategy(freeze_step=2, find_unused_parameters=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(**{**QUIET, "devices": 2}, max_steps=steps, strategy=strategy).fit(
            module, Batches(steps, torch.float32)
        )
    return {
        "said": [str(warning.message) for warning in caught],
        "head": [start, module.head.state_dict()],
        "weights": module.state_dict(),
    }
