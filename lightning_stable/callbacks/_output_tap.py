"""The logits of a step, whatever runs it, by a forward hook; and the classes that its batch has for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_stable._glue.quiet import quiet_depth
from lightning_stable.callbacks._head import list_heads

__all__ = ["OutputTap", "Targets", "find_targets", "same_as_inputs"]

Targets = Callable[[Any], Tensor] | str | int | None


class OutputTap:
    """A forward hook on one module, which keeps what it puts out only inside :meth:`recording`.

    Args:
        owner: Class name of the callback, for messages.
        name: Dotted name of the submodule in the LightningModule; ``None`` for the LightningModule itself.

    Raises:
        ValueError: If ``name`` is no name.
    """

    def __init__(self, owner: str, name: str | None) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(
                f"logits={name!r} is not the dotted name of a submodule. None takes what the module itself returns."
            )
        self._owner = owner
        self._name = name
        self._handle: RemovableHandle | None = None
        self._outputs: list[Any] | None = None
        self._depth = 0

    @property
    def attached(self) -> bool:
        """Whether the hook is on a module."""
        return self._handle is not None

    def attach(self, pl_module: LightningModule) -> None:
        """Put the hook on.

        Raises:
            ValueError: If the module has no submodule of that name.
        """
        self.detach()
        parts: dict[str, nn.Module] = dict(pl_module.named_modules())
        if self._name is not None and self._name not in parts:
            raise ValueError(
                f"logits={self._name!r} of {self._owner} is no submodule of {type(pl_module).__name__}. "
                f"{list_heads(pl_module)}"
            )

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            # Not what callbacks run beside the step that is recorded.
            if self._outputs is not None and quiet_depth(pl_module) == self._depth:
                self._outputs.append(output)

        self._handle = parts[self._name or ""].register_forward_hook(keep)

    def detach(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._outputs = None, None

    @contextmanager
    def recording(self, pl_module: LightningModule) -> Iterator[list[Any]]:
        """Keep what the module puts out, in the order of its calls."""
        outer = self._outputs, self._depth
        outputs: list[Any] = []
        self._outputs, self._depth = outputs, quiet_depth(pl_module)
        try:
            yield outputs
        finally:
            self._outputs, self._depth = outer

    def logits(self, outputs: list[Any], pl_module: LightningModule) -> Tensor:
        """Return the logits of the last call.

        Raises:
            ValueError: If there was no call, or it put out no logits.
        """
        what = f"the output of {self._name!r}" if self._name else f"what {type(pl_module).__name__} itself returns"
        if not outputs:
            raise ValueError(
                f"{self._owner}: {self._name or type(pl_module).__name__!r} was not called in the step, so there are "
                f"no logits. Name the submodule that computes them, as in logits='head'. {list_heads(pl_module)}"
            )
        output = found = outputs[-1]
        if isinstance(output, Mapping):
            found = output.get("logits")
        elif hasattr(output, "logits"):
            found = output.logits
        elif isinstance(output, Sequence) and output:
            found = output[0]
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise ValueError(
                f"{self._owner}: {what} is {type(output).__name__}{shape}, not logits. It has to be a floating-point "
                f"tensor of shape (samples, ..., classes), or hold one under 'logits' or as its first entry. "
                f"{list_heads(pl_module)}"
            )
        return found.detach()


def find_targets(owner: str, batch: Any, where: Targets) -> Tensor:
    """Return the classes within a batch.

    Args:
        owner: Class name of the callback, for messages.
        batch: The batch.
        where: A function of the batch, or the key, the place or the dotted path of them; ``None``: ``labels`` of a
            mapping or an object, else the second entry.

    Raises:
        ValueError: If there is no tensor.
    """
    found: Any
    if callable(where):
        found = where(batch)
    else:
        steps = _path(batch, where)
        found = batch
        for step in steps:
            found = _entry(found, step)
    if not isinstance(found, Tensor):
        kind = f"a {type(batch).__name__}"
        if isinstance(batch, Mapping):
            kind = f"a mapping with {', '.join(map(repr, batch))}"
        elif isinstance(batch, (list, tuple)):
            kind = f"a {type(batch).__name__} of {len(batch)}"
        raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
            f"{owner}(targets={where!r}) finds no tensor of classes in a batch, which is {kind}. Give the key or the "
            "place of the classes, as in targets='labels' or targets=1."
        )
    return found


def same_as_inputs(batch: Any, targets: Tensor, ignore_index: int) -> bool:
    """Tell whether targets are a batch's own ``input_ids`` but where they are ignored: one read from the device."""
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else getattr(batch, "input_ids", None)
    if not isinstance(inputs, Tensor) or inputs.shape != targets.shape:
        return False
    return bool(torch.where(targets == ignore_index, inputs, targets).equal(inputs))


def _path(batch: Any, where: str | int | None) -> list[str | int]:
    """Return the keys and places on the way to the classes."""
    if where is None:
        return [1 if isinstance(batch, (list, tuple)) else "labels"]
    if isinstance(where, int):
        return [where]
    if isinstance(batch, Mapping) and where in batch:
        return [where]  # a key with a dot in it
    return [int(part) if part.removeprefix("-").isdigit() else part for part in where.removeprefix("batch.").split(".")]


def _entry(found: Any, step: str | int) -> Any:
    """Return one entry or attribute, ``None`` if there is none."""
    if isinstance(found, Mapping):
        return found.get(step)
    if isinstance(step, str):
        return getattr(found, step, None)
    inside = isinstance(found, (list, tuple)) and -len(found) <= step < len(found)
    return found[step] if inside else None
