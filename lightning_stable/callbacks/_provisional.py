"""A change of weights ahead of an optimizer step, which is taken back if the step makes no update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_stable.callbacks._host import gradient_scaler

__all__ = ["ProvisionalChange"]


class _Changed(NamedTuple):
    """What is needed to take a change back, and to tell whether weights are still as it left them."""

    weights: list[Tensor]
    before: list[Tensor]
    versions: list[int]

    @torch.no_grad()
    def take_back(self) -> None:
        torch._foreach_copy_(self.weights, self.before)

    def is_untouched(self) -> bool:
        return [weight._version for weight in self.weights] == self.versions


class ProvisionalChange:
    """Changes weights in a way that holds only if the optimizer makes an update from there.

    It makes none where another callback has taken all gradients away, or a gradient scaler has found that they
    overflow. Weights that something else has written to in the meantime are then left as they are.

    Args:
        trainer: The Trainer, in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._changed: _Changed | None = None
        self._last_step = trainer.global_step
        # Not a wrap of the module's method: what fails in there after the update does not take the update back.
        torch_ones = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Optimizer)]
        self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in torch_ones]

    @contextmanager
    def change(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Keep what these weights are now, while they are changed in place."""
        kept = _Changed(list(weights), [weight.detach().clone() for weight in weights], [])
        self._changed = kept
        yield
        self._changed = kept._replace(versions=[weight._version for weight in weights])

    def end_batch(self) -> None:
        """Take a change back whose step was counted and not made, at the end of a batch."""
        if self._trainer.global_step == self._last_step:
            return  # the step comes with a later micro-batch
        self._last_step = self._trainer.global_step
        changed, self._changed = self._changed, None
        if changed is not None and gradient_scaler(self._trainer) is not None and changed.is_untouched():
            changed.take_back()

    def take_back(self) -> bool:
        """Take a change back whatever came after it, and tell whether there was one without an update."""
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.take_back()
        return changed is not None

    def undo(self) -> None:
        """Take the hooks off the optimizers."""
        self._changed = None
        for hook in self._hooks:
            hook.remove()

    def _after_step(self, _optimizer: Optimizer, *_: Any) -> None:
        """See what a step of the optimizer did."""
        changed, self._changed = self._changed, None
        if changed is not None and all(weight.grad is None for weight in changed.weights) and changed.is_untouched():
            changed.take_back()
