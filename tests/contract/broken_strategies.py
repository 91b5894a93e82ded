"""A small strategy with local steps, others that each break one contract on purpose, and callbacks beside them."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contract import strategy_oracles
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_stable.testing.harness import Run
from lightning_stable.testing.rows import STEPS, Row, StrategySettings, resolve


class HonestRounds(DDPStrategy):
    """Averages the workers' weights every three steps, in validations, and at checkpoints, and breaks nothing.

    Its callbacks are to leave the weights alone at the end of training: it looks at them after that.
    """

    every = 3
    averages_at_save = True
    averages_optimizers = True
    shares_callbacks = True
    validates_with_the_mean = True
    gives_back = True

    def __init__(self, warmup: int = 0) -> None:
        super().__init__()
        self.warmup = warmup
        self.begin()

    def begin(self) -> None:
        self.count = self.rounds = 0
        self.moved = False
        self.own: list[tuple[Tensor, Tensor]] = []

    def configure_ddp(self) -> None:
        self.begin()  # without DDP around the module, gradients stay where they are

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **settings: Any) -> Any:
        if self.rounds == 0 and self.count < self.warmup and self.world_size > 1:
            closure = partial(self.synchronously, optimizer, closure)
        output = super().optimizer_step(optimizer, closure, model, **settings)
        self.count += 1
        self.moved = self.world_size > 1
        if self.moved and self.count >= self.warmup + self.every:
            self.exchange()
        return output

    def synchronously(self, optimizer: Any, closure: Callable[[], Any]) -> Any:
        output = closure()
        average([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        return output

    def exchange(self) -> None:
        average(self.lightning_module.parameters())
        self.count, self.rounds = self.warmup, self.rounds + 1

    def on_validation_start(self) -> None:
        if self.moved and self.validates_with_the_mean:
            tensors = [*self.lightning_module.parameters(), *self.floating_buffers(), *self.callback_tensors()]
            self.own = [(tensor, tensor.detach().clone()) for tensor in tensors]
            average(tensors)

    def on_validation_end(self) -> None:
        with torch.no_grad():
            for tensor, value in self.own if self.gives_back else []:
                tensor.copy_(value)
        self.own = []

    def on_exception(self, exception: BaseException) -> None:
        self.on_validation_end()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.averages_at_save:
            self.meet()
        return super().lightning_module_state_dict()

    def on_train_end(self) -> None:
        super().on_train_end()
        self.meet()

    def meet(self) -> None:
        module = self.lightning_module
        if not self.moved or module.trainer.interrupted:
            return
        self.on_validation_end()
        self.exchange()
        average(self.floating_buffers())
        if self.averages_optimizers:
            average(momentum for optimizer in self.optimizers for momentum in moments(optimizer))
        if self.shares_callbacks:
            average(self.callback_tensors())
            for callback in module.trainer.callbacks:
                if getattr(callback, "takes_state_of_rank_zero", False):
                    state = self.broadcast(callback.state_dict())
                    if self.global_rank:
                        callback.load_state_dict(state)
        self.moved = False

    def floating_buffers(self) -> list[Tensor]:
        return [buffer for buffer in self.lightning_module.buffers() if buffer.is_floating_point()]

    def callback_tensors(self) -> list[Tensor]:
        callbacks = self.lightning_module.trainer.callbacks
        return [tensor for callback in callbacks for tensor in getattr(callback, "worker_tensors", list)()]

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **settings: Any) -> None:
        checkpoint[type(self).__name__] = self.state()
        super().save_checkpoint(checkpoint, *args, **settings)

    def state(self) -> dict[str, Any]:
        return {"rounds": self.rounds}


def average(tensors: Iterable[Any]) -> None:
    """Replace tensors by their mean over the processes."""
    with torch.no_grad():
        for tensor in tensors:
            dist.all_reduce(tensor.data)
            tensor.div_(dist.get_world_size())


def moments(optimizer: Any) -> list[Tensor]:
    states = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


class SavesWhatRankZeroHas(HonestRounds):
    """Lets the host save the weights of rank 0, which have gone their own way."""

    averages_at_save = False


class KeepsItsOwnMoments(HonestRounds):
    """Averages weights at a checkpoint, and leaves each worker its own momentum."""

    averages_optimizers = False


class LeavesCallbacksApart(HonestRounds):
    """Leaves each worker's callbacks what they have, at a checkpoint."""

    shares_callbacks = False


class ValidatesItsOwnWeights(HonestRounds):
    """Lets each worker measure other weights."""

    validates_with_the_mean = False


class TrainsOnFromTheMean(HonestRounds):
    """Does not give workers their own weights back after a validation."""

    gives_back = False


class ExchangesLate(HonestRounds):
    """Its rounds are longer than it says."""

    every = 4


class ForgetsItsRounds(HonestRounds):
    """Does something else with each round, and does not know after a checkpoint how many there were."""

    def exchange(self) -> None:
        super().exchange()
        with torch.no_grad():
            for parameter in self.lightning_module.parameters():
                parameter.mul_(1 - 0.01 * self.rounds)


class SavesNoState(HonestRounds):
    """Has a state, and does not save it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **settings: Any) -> None:
        DDPStrategy.save_checkpoint(self, checkpoint, *args, **settings)


class SavesAPath(HonestRounds):
    """Saves what a safe load refuses."""

    def state(self) -> dict[str, Any]:
        return {"path": Path("somewhere")}


class DoesSomethingAlone(HonestRounds):
    """Changes training in one process, too."""

    def backward(self, closure_loss: Tensor, *args: Any, **settings: Any) -> Tensor:
        return super().backward(0.5 * closure_loss, *args, **settings)


class PullsToItsAverage(Callback):
    """Pulls gradients to an average of the weights, which strategies with local steps share."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            average = self.average.setdefault(name, parameter.detach().clone())
            average.lerp_(parameter.detach(), 0.2)
            parameter.grad.add_(parameter.detach() - average, alpha=0.5)

    def worker_tensors(self) -> list[Tensor]:
        return list(self.average.values())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.average)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = dict(state_dict)


class PullsToRankZeros(PullsToItsAverage):
    """Lets the others go on with the average of rank 0."""

    takes_state_of_rank_zero = True

    def worker_tensors(self) -> list[Tensor]:
        return []


class PullsToItsOwn(PullsToItsAverage):
    """Keeps to itself that workers have different averages."""

    def worker_tensors(self) -> list[Tensor]:
        return []


def _rounds_of_three(run: Run, plugin: Any) -> None:
    strategy_oracles.local_update(run, plugin, strategy_oracles.averaging)


def strategy_row(plugin: type, **settings: Any) -> Row:
    """Put a strategy under contract."""
    never = partial(plugin, warmup=10 * STEPS)
    usual = {"make": plugin, "oracle": _rounds_of_three, "identities": (never,), "alone": (plugin,), "rounds": True}
    return Row(
        name=plugin.__name__.lower(),
        class_path=f"{plugin.__module__}.{plugin.__name__}",
        settings=StrategySettings(**{**usual, "tolerance": 1e-5, **settings}),
        kind="strategy",
        find=partial(resolve, f"contract.broken_strategies:ROWS[{plugin.__name__}]"),
    )


_STRATEGIES = [kind for kind in vars().values() if isinstance(kind, type) and issubclass(kind, HonestRounds)]
ROWS = {kind.__name__: strategy_row(kind) for kind in _STRATEGIES}
