"""Plugins with passes of their own that break the contract on failures in one of them alone, on purpose."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class _TwoPasses(Callback):
    """Runs a step twice, and takes its own wrap off after a failure."""

    method = "training_step"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        step = getattr(pl_module, self.method)

        def both(*args: Any, **kwargs: Any) -> Any:
            return self.run(pl_module, lambda: step(*args, **kwargs))

        setattr(pl_module, self.method, both)

    def run(self, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        raise NotImplementedError

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(pl_module).pop(self.method, None)


class LeavesItsOwnPoint(_TwoPasses):
    """Looks at the weights first, then trains at others, and does not give the first ones back after a failure."""

    def run(self, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        with torch.no_grad():
            step()
        kept = _move(pl_module)
        output = step()
        _put_back(pl_module, kept)
        return output


class LeavesItsOwnPointOfValidation(LeavesItsOwnPoint):
    """The same in a validation."""

    method = "validation_step"


class LeavesAWrapOfItsSecondPass(_TwoPasses):
    """Mutes the module for a second pass, and leaves it mute if that fails."""

    def run(self, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        output = step()
        pl_module.log = lambda *args, **kwargs: None
        with torch.no_grad():
            step()
        del pl_module.log
        return output


class LeavesThePointOfItsBackward(Callback):
    """Holds other weights from the loss to the update, and does not give the live ones back after a failure."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.kept = _move(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        _put_back(pl_module, self.kept)


class TakesAnUpdateBack(Callback):
    """Puts back after a failure what it kept before the batch, though the update has been made."""

    kept: list[Tensor] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(self, *args: Any) -> None:
        self.kept = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.kept is not None:
            _put_back(pl_module, self.kept)


def _move(pl_module: LightningModule) -> list[Tensor]:
    """Move the weights unseen by the graph that they are in, and return what they were."""
    kept = [parameter.detach().clone() for parameter in pl_module.parameters()]
    for parameter in pl_module.parameters():
        parameter.data.mul_(0.9)
    return kept


def _put_back(pl_module: LightningModule, kept: list[Tensor]) -> None:
    for parameter, value in zip(pl_module.parameters(), kept, strict=True):
        parameter.data.copy_(value)
