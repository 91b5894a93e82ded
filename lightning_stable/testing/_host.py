"""Work of the host that comes to the same each time, left out: the fits here are short, and there are thousands."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType, ModuleType
from typing import Any

import torch
from lightning.fabric.utilities import registry
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.utilities import signature_utils

__all__ = ["hastened"]

_CPU = torch.device("cpu")


@contextmanager
def hastened() -> Iterator[None]:
    """Let Trainers of this process begin and log faster while this lasts; within another one it does nothing."""
    if vars(signature_utils).get("inspect") is _INSPECT:
        yield
        return
    with ExitStack() as undo:
        # Every Trainer reads what all installed packages offer.
        _replace(undo, registry, "entry_points", lambda read: functools.partial(_offered, read))
        # At each hook a signature is read.
        _replace(undo, signature_utils, "inspect", lambda module: _INSPECT)
        # Whenever a value is logged, all that is known of its name is gone through and moved to where the value is.
        _replace(undo, getattr(result, "_ResultMetric", None), "to", _unless_there)
        yield


def _replace(undo: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put what is made of an attribute in its place until ``undo`` is closed; a host without it is left as it is."""
    if owner is not None and name in vars(owner):
        before = vars(owner)[name]
        undo.callback(setattr, owner, name, before)
        setattr(owner, name, make(before))


def _offered(read: Callable[..., Any], **selection: str) -> Any:
    """Return what the installed packages offer, read again only where packages come from elsewhere."""
    return _offered_on(tuple(sys.path), read, **selection)


@functools.lru_cache(maxsize=100)
def _offered_on(path: tuple[str, ...], read: Callable[..., Any], **selection: str) -> Any:
    return read(**selection)


def _arguments(function: Any) -> inspect.FullArgSpec:
    """Read a signature, that of a method once for all objects of its class.

    A function of one object is not kept: it may hold a module.
    """
    if isinstance(function, MethodType):
        of_class = getattr(type(function.__self__), function.__name__, None)
        if of_class is function.__func__:
            return _arguments_of_class(of_class)
    return inspect.getfullargspec(function)


_arguments_of_class = functools.lru_cache(maxsize=1000)(inspect.getfullargspec)


class _Inspect(ModuleType):
    """The module ``inspect``, all of it, but with signatures that are remembered."""

    getfullargspec = staticmethod(_arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)


_INSPECT = _Inspect("inspect")


def _unless_there(move: Any) -> Any:
    """Return a method that moves what is kept of a logged value, unless it is on the CPU and stays there."""

    @functools.wraps(move)
    def to(metric: Any, *args: Any, **kwargs: Any) -> Any:
        value = metric.value if metric.is_tensor else None
        if value is not None and value.device == _CPU and args == (_CPU,) and not kwargs:
            return metric
        return move(metric, *args, **kwargs)

    return to
