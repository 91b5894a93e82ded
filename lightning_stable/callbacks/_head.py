"""Read the logits of a training step by forward hooks, from a named submodule or from the head that is found."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lightning_stable._glue.quiet import quiet_depth

__all__ = ["HeadTap", "list_heads"]

# What ran, in order: the submodule's name and its output.
Record = list[tuple[str, Any]]

_MOST_NAMES = 12


class HeadTap:
    """Forward hooks on the module that computes the logits; they record only inside :meth:`recording`.

    Without a name, the outputs of all ``nn.Linear`` are recorded until :meth:`resolve` has been given a loss: of those
    that the loss was computed from, the one that ran last is the head.

    Args:
        owner: Class name of the callback, for messages.
        name: Dotted name of the submodule in the LightningModule, or ``None``.

    Raises:
        ValueError: If ``name`` is no name.
    """

    def __init__(self, owner: str, name: str | None) -> None:
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"logits={name!r} is not the dotted name of a submodule. None finds the head by itself.")
        self._owner = owner
        self._asked = name
        self.name = name
        self._handles: list[RemovableHandle] = []
        self._record: Record | None = None
        self._depth = 0
        self._module: LightningModule | None = None

    def attach(self, pl_module: LightningModule) -> None:
        """Put the hooks on.

        Raises:
            ValueError: If the module has no submodule of that name, or no ``nn.Linear`` to find the head among.
        """
        self.detach()
        self.name, self._module = self._asked, pl_module
        linears: dict[str, nn.Module] = {
            name: part for name, part in pl_module.named_modules() if name and isinstance(part, nn.Linear)
        }
        if self._asked is None and not linears:
            raise ValueError(
                f"{self._owner} looks for the logits at the last nn.Linear, and {type(pl_module).__name__} has none. "
                f"Name the submodule that computes them, as in logits='head'. {_list_names(pl_module, {})}"
            )
        if self._asked is None:
            for name, part in linears.items():
                self._hook(name, part)
            return
        parts = dict(pl_module.named_modules())
        if self._asked not in parts or not self._asked:
            raise ValueError(
                f"logits={self._asked!r} of {self._owner} is no submodule of {type(pl_module).__name__}. "
                f"{_list_names(pl_module, linears)}"
            )
        self._hook(self._asked, parts[self._asked])

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._record, self._module = None, None

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Record what the hooked modules put out, without that of quiet passes within the one to be recorded."""
        record: Record = []
        outer, self._record = self._record, record
        outer_depth, self._depth = self._depth, self._present_depth()
        try:
            yield record
        finally:
            self._record, self._depth = outer, outer_depth

    def resolve(self, record: Record, loss: Tensor, pl_module: LightningModule) -> None:
        """Settle which module is the head, once; nothing happens if it is known.

        Raises:
            ValueError: If no recorded output led to the loss.
        """
        if self.name is not None:
            return
        reached = _nodes(loss)
        feeding = [name for name, output in record if isinstance(output, Tensor) and output.grad_fn in reached]
        if not feeding:
            raise ValueError(
                f"{self._owner} found no nn.Linear of {type(pl_module).__name__} whose output feeds the loss. Name the "
                f"submodule that computes the logits, as in logits='head'. {_list_names(pl_module, {})}"
            )
        self.name = feeding[-1]
        self.detach()
        self._module = pl_module
        self._hook(self.name, pl_module.get_submodule(self.name))
        rank_zero_info(
            f"{self._owner}: the logits are the output of {self.name!r}, the last nn.Linear that feeds the loss. "
            "Name another submodule with the argument logits."
        )

    def logits(self, record: Record) -> Tensor:
        """Return the logits of a record; those of several calls one after the other along the first dimension.

        Raises:
            ValueError: If the head did not run, or its output holds no tensor of logits.
        """
        found = [_as_logits(output, self._owner, name) for name, output in record if name == self.name]
        if not found:
            raise ValueError(
                f"{self._owner}: {self.name!r} did not run in the training step, so there are no logits. Name the "
                "submodule that computes them with the argument logits."
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def _present_depth(self) -> int:
        return 0 if self._module is None else quiet_depth(self._module)

    def _hook(self, name: str, part: nn.Module) -> None:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._record is not None and self._present_depth() == self._depth:
                self._record.append((name, output))

        self._handles.append(part.register_forward_hook(keep))


def _as_logits(output: Any, owner: str, name: str) -> Tensor:
    """Return the tensor of logits within a module's output."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(
            f"{owner}: the output of {name!r} is {type(output).__name__}{shape}, not logits. It has to be a "
            "floating-point tensor of shape (samples, ..., classes), or hold one under 'logits'."
        )
    return logits


def _nodes(loss: Tensor) -> set[Any]:
    """Return all nodes of the graph that a loss was computed by."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def list_heads(pl_module: LightningModule) -> str:
    """Name the submodules that may put out the logits, in a sentence."""
    return _list_names(
        pl_module, {name: part for name, part in pl_module.named_modules() if isinstance(part, nn.Linear)}
    )


def _list_names(module: nn.Module, linears: dict[str, nn.Module]) -> str:
    """Name the candidates: the linear layers, or where there are none, all parts that have no parts."""
    leaves = {name: part for name, part in module.named_modules() if name and not list(part.children())}
    names = list(linears or {name: part for name, part in leaves.items() if not isinstance(part, Metric)})
    shown = ", ".join(map(repr, names[-_MOST_NAMES:])) or "none"
    return f"Candidates{f' (the last {_MOST_NAMES})' if len(names) > _MOST_NAMES else ''}: {shown}."
