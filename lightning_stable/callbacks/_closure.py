"""Run forward and backward of one optimizer step again, with other weights, beside the host's own pass.

The host runs the passes of a step within the closure that it gives to ``LightningModule.optimizer_step``. Wrapping that
method on the instance puts another closure in its place: everything after it (unscaling, hooks, clipping, the update)
stays the host's and runs once. Micro-batches that are accumulated run before it, straight from the host's loop, so a
wrap around ``training_step`` remembers what each was called with and the random numbers it began with.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch.optim import Optimizer

from lightning_stable._glue.method_wrap import MethodWrap, do_nothing
from lightning_stable._glue.quiet import QuietPass, RandomState, is_quiet

__all__ = ["RepeatableStep", "is_trained_on", "may_repeat", "repeated_batch"]

# Modules whose training step runs again at present, with the number of the micro-batch.
_repeating: WeakKeyDictionary[LightningModule, int] = WeakKeyDictionary()

# Modules whose steps are handed over at present.
_repeatable: WeakSet[LightningModule] = WeakSet()


def may_repeat(pl_module: LightningModule) -> bool:
    """Tell whether a training step of this module may run again before its optimizer step is over."""
    return pl_module in _repeatable


def repeated_batch(pl_module: LightningModule) -> int | None:
    """Return which micro-batch of its optimizer step, from 0, runs again at present; ``None`` in a first pass."""
    return _repeating.get(pl_module)


def is_trained_on(trainer: Trainer) -> bool:
    """Tell whether a training step that runs now is trained on: a validation may call the module's own, too."""
    return trainer.training and torch.is_grad_enabled()


class _MicroBatch(NamedTuple):
    """What one call of the training step began with."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    random: RandomState


class RepeatableStep:
    """Hands each optimizer step of a module to a function that may run its passes again.

    Args:
        trainer: The Trainer, in a fit.
        pl_module: Its module, under automatic optimisation.
        wanted: Tells whether the coming optimizer step is to be handed over.
        run: Called within the closure that the host calls, with this object, the optimizer and the host's own closure;
            returns the loss.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        wanted: Callable[[], bool],
        run: Callable[["RepeatableStep", Optimizer, Callable[[], Any]], Any],
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._wanted = wanted
        self._run = run
        self._quiet = QuietPass()
        self._batches: list[_MicroBatch] = []
        _repeatable.add(pl_module)
        self._wraps = [
            MethodWrap(pl_module, "training_step", self._remember),
            MethodWrap(pl_module, "optimizer_step", self._around_optimizer_step),
        ]

    def undo(self) -> None:
        """Take the wraps off."""
        _repeatable.discard(self._module)
        for wrap in reversed(self._wraps):
            wrap.undo()
        self._batches = []

    def forget(self) -> None:
        """Forget the micro-batches: those of a step that was never taken are not of the next one."""
        self._batches = []

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Return a context in which processes do not average gradients."""
        strategy = self._trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def repeat(self) -> None:
        """Compute the gradient of all micro-batches of this step anew, at the weights as they are now.

        Gradients are those of this pass alone, averaged over processes. Dropout draws the same masks; logs, metrics,
        buffers and other callbacks see nothing of it.
        """
        trainer, module = self._trainer, self._module
        module.zero_grad()
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()  # it may train what is not the module's
        muted = [
            MethodWrap(callback, name, do_nothing)
            for callback in cast(Any, trainer).callbacks
            for name in ("on_before_backward", "on_after_backward")
            if getattr(type(callback), name) is not getattr(Callback, name)
        ]
        try:
            with self._quiet(module):
                for number, batch in enumerate(self._batches):
                    _repeating[module] = number
                    batch.random.restore(module.device)
                    last = number == len(self._batches) - 1
                    with nullcontext() if last else self.unsynchronised():
                        self._backward(trainer.strategy.training_step(*batch.arguments, **batch.keywords))
        finally:
            _repeating.pop(module, None)
            for wrap in reversed(muted):
                wrap.undo()

    def _backward(self, output: Any) -> None:
        """Go backward from what a training step returned, as the host does."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is not None:
            self._trainer.strategy.backward(loss / self._trainer.accumulate_grad_batches, None)

    def _remember(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``training_step``."""
        if is_trained_on(self._trainer) and not is_quiet(self._module) and self._wanted():
            self._batches.append(_MicroBatch(args, kwargs, RandomState.capture(self._module.device)))
        return original(*args, **kwargs)

    def _around_optimizer_step(
        self, original: Callable[..., Any], epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any]
    ) -> Any:
        """Stand in for ``optimizer_step``."""
        try:
            if not self._wanted():
                return original(epoch, batch_idx, optimizer, closure)
            return original(epoch, batch_idx, optimizer, lambda: self._run(self, optimizer, closure))
        finally:
            self._batches = []
