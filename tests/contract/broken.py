"""Plugins that each break one contract on purpose, and the rows that put them under contract."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_stable.testing.harness import Run
from lightning_stable.testing.rows import Row, Settings, resolve


class _Scaling(Callback):
    """Scales gradients by a number that subclasses choose: enough to change training."""

    def factor(self, trainer: Trainer) -> float:
        return 0.5

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor(trainer))


class Honest(_Scaling):
    """Breaks nothing: what the checks have to let through."""

    def __init__(self, factor: float = 0.5) -> None:
        self.scale = factor

    def factor(self, trainer: Trainer) -> float:
        return self.scale


class HonestStrategy(DDPStrategy):
    """A strategy that halves the loss, and breaks nothing."""

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(0.5 * closure_loss, *args, **kwargs)


class HonestPrecision(Precision):
    """A precision that halves the loss by a factor in its state, and breaks nothing."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.scale = factor

    def backward(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(self.scale * tensor, *args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}


class DoesNothing(Callback):
    """Has no effect at all."""


class ForgetsItsState(_Scaling):
    """Counts steps and does not save the count."""

    def __init__(self) -> None:
        self.count = 0

    def factor(self, trainer: Trainer) -> float:
        self.count += 1
        return 1.0 / self.count


class KeepsCounting(ForgetsItsState):
    """Saves its count, but adds a checkpoint's count to what a used object has."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count += state_dict["count"]


class LaysItsCountAside(ForgetsItsState):
    """Saves its count, which it lays aside from the beginning of a validation to the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.count, self.aside = 0, 0

    def on_validation_start(self, *args: Any) -> None:
        self.count, self.aside = 0, self.count

    def on_train_batch_start(self, *args: Any) -> None:
        self.count, self.aside = self.count + self.aside, 0


class LogsItsMemory(Callback):
    """Trains alike after a resume, but logs a count that begins anew."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.count += 1
        pl_module.log("count", float(self.count))


class NeedsAnObject(Callback):
    """Takes what no YAML can say, and has no default for it."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function


class LosesItsArgument(Callback):
    """Says another value than it was given, so that the saved config builds another plugin."""

    made = 0

    def __init__(self, factor: float = 0.5) -> None:
        type(self).made += 1
        self.scale = factor * type(self).made


class DrawsRandomNumbers(Callback):
    """Consumes the global random numbers that dropout draws from."""

    def on_train_batch_start(self, *args: Any) -> None:
        torch.rand(1)


class LeavesEvalMode(Callback):
    """Puts the module in eval mode and forgets to put it back."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.eval()


class DiffersByRank(_Scaling):
    """Scales by the rank, so that processes drift apart."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).mul_(1 + 0.01 * trainer.global_rank)


class DependsOnWorldSize(_Scaling):
    """Keeps ranks equal, but means something else with two processes than with one."""

    def factor(self, trainer: Trainer) -> float:
        return 1.0 / (dist.get_world_size() if dist.is_initialized() else 1)


class CountsBatches(Callback):
    """Does its work on each batch where it should on each optimizer step."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


class LooksAfterClipping(Callback):
    """Records the gradients too late, when clipping has changed them."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if (gradients := [p.grad for p in pl_module.parameters() if p.grad is not None]) and trainer.global_step:
            self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))


class LeavesAWrap(Callback):
    """Wraps the module's training step and never takes it off."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        pl_module.training_step = lambda *args, **kwargs: step(*args, **kwargs)


class LeavesAHook(Callback):
    """Registers a forward hook and forgets it after an exception."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle = pl_module.register_forward_hook(lambda *args: None)

    def on_fit_end(self, *args: Any) -> None:
        self.handle.remove()


class LeavesOtherWeights(Callback):
    """Validates with other weights and does not give the live ones back after an exception."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [p.detach().clone() for p in pl_module.parameters()]
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.9)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for parameter, kept in zip(pl_module.parameters(), self.kept, strict=True):
                parameter.copy_(kept)


class RemembersAFailure(_Scaling):
    """Trains otherwise after an exception, for ever."""

    failed = False

    def factor(self, trainer: Trainer) -> float:
        return 0.1 if self.failed else 0.5

    def on_exception(self, *args: Any) -> None:
        self.failed = True


class ExchangesWeightsOnException(Callback):
    """Puts back weights on an exception that belong to a fit which is over."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = [p.detach().clone() for p in pl_module.parameters()]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with torch.no_grad():
            for parameter, kept in zip(pl_module.parameters(), self.kept, strict=True):
                parameter.copy_(kept)


class RemembersAValidation(_Scaling):
    """Takes a validation on its own for a part of its training."""

    validated = False

    def factor(self, trainer: Trainer) -> float:
        return 0.1 if self.validated else 0.5

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.validated = self.validated or stage == "validate"


class RemembersWhatWasAsked(_Scaling):
    """Goes on with what it was asked in a fit that is over."""

    asked = False

    def factor(self, trainer: Trainer) -> float:
        return 0.1 if self.asked else 0.5

    def ask(self) -> None:
        self.asked = True


class DiscardsASecondFit(Callback):
    """Restores at each end of training the weights it saw first: a stale shadow."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = self.first or [p.detach().clone() for p in pl_module.parameters()]
        with torch.no_grad():
            for parameter, first in zip(pl_module.parameters(), self.first, strict=True):
                parameter.copy_(first)


class BreaksOnReuse(Callback):
    """Cannot be set up twice."""

    ready = False

    def setup(self, *args: Any, **kwargs: Any) -> None:
        assert not self.ready, "set up twice"
        self.ready = True


class NeedsATensorLoss(Callback):
    """Takes it for granted that a training step returns a tensor."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        assert set(outputs) == {"loss"}, "the step returned more than a loss"


class RefusesUnclearly(Callback):
    """Refuses a module with a message that does not say who refuses."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ValueError("this does not work")


class SavesAnObject(Callback):
    """Puts an object into the checkpoint that a safe load refuses."""

    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("somewhere")}


class BreaksInCompany(ForgetsItsState):
    """Resumes alone, but not beside another callback."""

    def factor(self, trainer: Trainer) -> float:
        return super().factor(trainer) if len(trainer.callbacks) > 3 else 0.5


class MovesWhatIsSaved(Callback):
    """Trains on from where the checkpoint is, which is not where training was."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.9)


class NamesOnlyItself(Callback):
    """Refuses another plugin without naming it."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("NamesOnlyItself does not go with that")


def _no_oracle(run: Run, plugin: Any) -> None:
    """Nothing to recompute."""


def _counts_steps(run: Run, plugin: Any) -> None:
    assert plugin.steps == len(run.steps)


def _sees_gradients(run: Run, plugin: Any) -> None:
    expected = [float(torch.cat([g.flatten() for g in step.gradients.values()]).norm()) for step in run.steps]
    assert plugin.norms
    assert set(plugin.norms) <= set(expected), "these are not the gradients of before the clipping"


def row(plugin: type, oracle: Callable[[Run, Any], None] = _no_oracle, **settings: Any) -> Row:
    """Put a plugin under contract."""
    return Row(
        name=plugin.__name__.lower(),
        class_path=f"{plugin.__module__}.{plugin.__name__}",
        settings=Settings(**{"make": plugin, "oracle": oracle, "identities": (plugin,), **settings}),
        find=partial(resolve, f"{plugin.__module__}:ROWS[{plugin.__name__}]"),
    )


ROWS = {plugin.__name__: row(plugin) for plugin in (Honest, HonestStrategy, DiffersByRank, DependsOnWorldSize)}
