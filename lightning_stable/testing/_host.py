"""Work of the host that comes to the same each time, left out: the fits here are short, and there are thousands."""

import functools
import inspect
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities import registry
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.utilities import signature_utils

__all__ = ["hasten"]

_CPU = torch.device("cpu")


def hasten() -> None:
    """Let Trainers of this process begin and log faster; a second call changes nothing."""
    # Every Trainer reads what all installed packages offer.
    entry_points: Any = vars(registry)["entry_points"]
    if not hasattr(entry_points, "cache_info"):
        vars(registry)["entry_points"] = functools.cache(entry_points)
    # At each hook a signature is read.
    if vars(signature_utils).get("inspect") is inspect:
        vars(signature_utils)["inspect"] = SimpleNamespace(getfullargspec=_arguments)
    # Whenever a value is logged, all that is known of its name is gone through and moved to where the value is.
    metric: Any = getattr(result, "_ResultMetric", None)
    if metric is not None and not hasattr(metric.to, "__wrapped__"):
        metric.to = _unless_there(metric.to)


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


def _unless_there(move: Any) -> Any:
    """Return a method that moves what is kept of a logged value, unless it is on the CPU and stays there."""

    @functools.wraps(move)
    def to(metric: Any, *args: Any, **kwargs: Any) -> Any:
        value = metric.value if metric.is_tensor else None
        if value is not None and value.device == _CPU and args == (_CPU,) and not kwargs:
            return metric
        return move(metric, *args, **kwargs)

    return to
