"""Let a module evaluate with the logits of two sets of weights, whoever asks it to."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import QuietPass, is_quiet, loss_of
from lightning_stable.callbacks._attributes import attributes_kept
from lightning_stable.callbacks._head import HeadTap
from lightning_stable.callbacks._reference import call_with_weights

__all__ = ["EvaluationEnsemble"]

_STEPS = ("validation_step", "test_step", "predict_step")


class EvaluationEnsemble:
    """Puts the logits of an ensemble in the place of the head's output, wherever a module is evaluated.

    Its steps, and ``forward`` outside of a training step, run twice in evaluation mode without gradients: first with
    other weights and quietly, which gives the logits of these; then with the live ones, where a forward hook on the
    head joins both. All that the module does with its logits follows from the ensemble's: loss, metrics, predictions.

    Args:
        owner: Class name of the callback, for messages.
        logits: Dotted name of the submodule that puts the logits out; ``None``: the last ``nn.Linear`` that feeds the
            loss, or where no loss is returned, that ran in the training step.
        combine: Called with the live and the other logits; returns those of the ensemble.
    """

    def __init__(self, owner: str, logits: str | None, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._owner = owner
        self._asked = logits
        self._combine = combine
        self._finder = HeadTap(owner, logits)
        self._module: LightningModule | None = None
        self._weights: Callable[[], Mapping[str, Tensor]] = dict
        self._wraps: list[MethodWrap] = []
        self._handle: RemovableHandle | None = None
        self._quiet = QuietPass()
        # Whether a step runs, within which ``forward`` is a part of it.
        self._inside = False
        self._record: list[Tensor] | None = None
        self._waiting: Iterator[Tensor] | None = None
        self.head: str | None = logits

    def attach(self, pl_module: LightningModule, weights: Callable[[], Mapping[str, Tensor]], head: str | None) -> None:
        """Put wraps and hooks on the module.

        Args:
            pl_module: The module.
            weights: Returns the other weights by name, none as long as there is no ensemble.
            head: The head that was found in an earlier run, if there is one.

        Raises:
            ValueError: If the module has no submodule of the name that was given, or no ``nn.Linear`` to look among.
        """
        self.detach()
        parts = dict(pl_module.named_modules())
        self.head = self._asked or (head if head in parts else None)
        if self.head is None or self._asked:
            self._finder.attach(pl_module)
        if self.head is not None:
            self._hook(pl_module, self.head)
        self._module, self._weights = pl_module, weights
        steps = [name for name in _STEPS if is_overridden(name, pl_module, LightningModule)]
        self._wraps = [
            MethodWrap(pl_module, "training_step", self._training_step),
            *(MethodWrap(pl_module, name, self._evaluate) for name in ("forward", *steps)),
        ]

    @property
    def attached(self) -> bool:
        """Whether wraps and hooks are on a module."""
        return self._module is not None

    def detach(self) -> None:
        """Take wraps and hooks off."""
        for wrap in reversed(self._wraps):
            wrap.undo()
        if self._handle is not None:
            self._handle.remove()
        self._finder.detach()
        self._module, self._wraps, self._handle, self._quiet = None, [], None, QuietPass()

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for ``training_step``: find the head in the first one, and leave all others as they are."""
        module = self._module
        with self._within():
            if module is None or self.head is not None or is_quiet(module):
                return original(*args, **kwargs)
            with self._finder.recording() as record:
                output = original(*args, **kwargs)
            loss = loss_of(output)
            if loss is not None and loss.requires_grad:
                self._finder.resolve(record, loss, module)
                self.head = self._finder.name
            elif record and not module.automatic_optimization:
                self.head = record[-1][0]
            if self.head is not None:
                self.head = _adapted(module, self.head)
                self._hook(module, self.head)
            return output

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a step of evaluation, or for ``forward``."""
        module = self._module
        if module is None or self._inside or module.training or torch.is_grad_enabled() or self.head is None:
            return original(*args, **kwargs)
        weights = self._weights()
        if not weights:
            return original(*args, **kwargs)
        with self._within():
            others: list[Tensor] = []
            self._record = others
            try:
                with self._quiet(module), attributes_kept(module):
                    call_with_weights(module, weights, lambda: original(*args, **kwargs))
            finally:
                self._record = None
            self._waiting = iter(others)
            try:
                output = original(*args, **kwargs)
                left = len(list(self._waiting))
            finally:
                self._waiting = None
            if left:
                raise ValueError(
                    f"{self._owner}: {self.head!r} ran {len(others)} times with the offline copy and "
                    f"{len(others) - left} times with the live weights in the same step. Name a submodule that runs "
                    "equally often with both, with the argument logits."
                )
            return output

    @contextmanager
    def _within(self) -> Iterator[None]:
        """Say that a step runs."""
        outer, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = outer

    def _hook(self, pl_module: LightningModule, name: str) -> None:
        self._finder.detach()
        # Before the hooks of others: they are to see the ensemble's logits.
        self._handle = pl_module.get_submodule(name).register_forward_hook(self._after_head, prepend=True)

    def _after_head(self, head: nn.Module, inputs: Any, output: Any) -> Any:
        """Keep the other weights' logits, or join them with the live ones."""
        if self._record is not None:
            self._record.append(self._logits(output))
            return None
        if self._waiting is None:
            return None
        logits, other = self._logits(output), next(self._waiting, None)
        if other is None or other.shape != logits.shape:
            found = "nothing" if other is None else f"logits of shape {tuple(other.shape)}"
            raise ValueError(
                f"{self._owner}: {self.head!r} puts out logits of shape {tuple(logits.shape)} with the live weights, "
                f"and {found} with the others in the same step. Name a submodule that runs equally often with both, "
                "on equally many samples, with the argument logits."
            )
        return _with_logits(output, self._combine(logits, other))

    def _logits(self, output: Any) -> Tensor:
        """Return the logits within the head's output.

        Raises:
            ValueError: If there are none.
        """
        logits = output
        if isinstance(output, Mapping):
            logits = output.get("logits")
        elif not isinstance(output, Tensor):
            logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 1 or logits.shape[-1] < 2:
            shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
            raise ValueError(
                f"{self._owner}: the output of {self.head!r} is {type(output).__name__}{shape}, not logits of several "
                "classes, classes last. Name another submodule with the argument logits."
            )
        return logits


def _with_logits(output: Any, logits: Tensor) -> Any:
    """Return a head's output with other logits in it."""
    if isinstance(output, Tensor):
        return logits
    changed = copy(output)
    if isinstance(changed, Mapping):
        changed["logits"] = logits  # type: ignore[index]  # of a kind that a module puts together itself
    else:
        changed.logits = logits
    return changed


def _adapted(module: nn.Module, name: str) -> str:
    """Return the layer that an adapter library has put around a linear layer, if this is a part of one."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        outer = ".".join(parts[:end])
        if hasattr(module.get_submodule(outer), "base_layer"):
            return outer
    return name
