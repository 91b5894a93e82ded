"""Give a module's plain attributes back what they held, after a pass that is not to count."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

__all__ = ["attributes_kept"]

_KINDS = (list, deque, set, dict)

# How many entries a container may have so that these are looked into, too: beyond that it is what a validation collects
# or looks up, and walking through it at each batch would cost more than the batch.
_MOST_ENTRIES = 1000
# Tensors are copied where there are only so many beside each other, and of so many numbers: sums are few and small.
_MOST_TENSORS, _MOST_NUMBERS = 64, 1 << 22

# Attributes that every module has, with its parameters, buffers and parts among them.
_INHERITED = frozenset(vars(LightningModule()))


@contextmanager
def attributes_kept(module: LightningModule) -> Iterator[None]:
    """Give a module's own attributes their values back, and take those away that were made in the meantime.

    Lists, deques, sets and dictionaries get their contents back, those within each other too unless the outer one has
    more than 1000 entries. Tensors of at most 2^22 numbers, among the attributes or in containers of at most 64
    entries, get their values back. Parameters and buffers are the caller's.
    """
    own = {name: value for name, value in vars(module).items() if name not in _INHERITED}
    containers: dict[int, tuple[Any, Any]] = {}
    found: dict[int, Tensor] = {}
    _look_into(own.values(), containers, found, with_tensors=True)
    for known in (*module.parameters(), *module.buffers()):
        found.pop(id(known), None)
    tensors = [(value, _version(value), value.detach().clone()) for value in found.values() if _is_a_sum(value)]
    try:
        yield
    finally:
        for name in [name for name in vars(module) if name not in _INHERITED and name not in own]:
            del vars(module)[name]
        vars(module).update(own)
        for container, content in containers.values():
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        with torch.no_grad():
            for tensor, version, value in tensors:
                _put_back(tensor, version, value)


def _look_into(
    values: Iterable[Any], containers: dict[int, tuple[Any, Any]], tensors: dict[int, Tensor], *, with_tensors: bool
) -> None:
    """Find containers, with what is in them, and tensors among values and within each other, by identity."""
    for value in values:
        if isinstance(value, Tensor) and with_tensors:
            tensors[id(value)] = value
        if not isinstance(value, _KINDS) or id(value) in containers:
            continue
        content = dict(value) if isinstance(value, dict) else list(value)
        containers[id(value)] = (value, content)
        if len(content) <= _MOST_ENTRIES:
            entries = content.values() if isinstance(content, dict) else content
            few = with_tensors and len(content) <= _MOST_TENSORS
            _look_into(entries, containers, tensors, with_tensors=few)


def _is_a_sum(tensor: Tensor) -> bool:
    """Tell whether a tensor is small and plain, so that it may be copied and written to."""
    # What was made under inference mode cannot be changed outside of it.
    changeable = torch.is_inference_mode_enabled() or not tensor.is_inference()
    plain = tensor.layout == torch.strided and not tensor.is_meta and not isinstance(tensor, nn.Parameter)
    return changeable and plain and tensor.numel() <= _MOST_NUMBERS


def _version(tensor: Tensor) -> int | None:
    """Return a number that grows when a tensor is changed in place, ``None`` if it has none."""
    return None if tensor.is_inference() else int(tensor._version)


def _put_back(tensor: Tensor, version: int | None, value: Tensor) -> None:
    """Give a tensor its value back, if it may have changed: a graph may need it as it is."""
    if version is None or version != _version(tensor):
        tensor.copy_(value)
