"""Load checkpoints of adapted modules without a Trainer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_stable.peft._checkpoint import complete, restore
from lightning_stable.peft._inject import merge
from lightning_stable.peft._record import KEY, Record, find_record, without_compile
from lightning_stable.peft._targets import find_model

__all__ = ["load_adapters", "load_from_checkpoint", "merge_adapters"]

_Module = TypeVar("_Module", bound=nn.Module)
_Lightning = TypeVar("_Lightning", bound=LightningModule)


def load_adapters(
    module: _Module, checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, weights_only: bool = True
) -> _Module:
    """Adapt an untouched module as a checkpoint says, and load the checkpoint's weights, strictly.

    What trained trains, all else is frozen. The result computes what the trained module did, bit by bit on the same
    kind of device.

    Args:
        module: The LightningModule, or the model within it that was adapted, with the weights that it had before
            training. Of a checkpoint's weights a bare model takes its own; a trained head beside it is not loaded.
        checkpoint: A checkpoint of a run with ``Adapters``, or where it is.
        weights_only: Read no objects but tensors and plain values, see ``torch.load``.

    Returns:
        The module itself, adapted in place.

    Raises:
        ValueError: If the checkpoint has no adapters, the module has some already, or its base is another one.
        RuntimeError: If weights are missing, or there are too many.

    Example:
        >>> from lightning_stable.peft import load_adapters
        >>> load_adapters(model, "last.ckpt")  # doctest: +SKIP
    """
    owner = "load_adapters"
    if not isinstance(cast(Any, module), nn.Module):
        told = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise TypeError(f"{owner}: module is {told}. Give a module that is built: load_adapters(Net(), 'last.ckpt').")
    loaded = _read(checkpoint, weights_only)
    _refuse_other(owner, loaded, module)
    loaded = without_compile(loaded, module)
    record = Record.from_checkpoint(owner, loaded[KEY])
    path: str = loaded[KEY]["model"]
    root = isinstance(module, LightningModule) or _has_layers(module, path, record)
    model = find_model(owner, module, path) if root else cast(nn.Module, module)
    prefix = f"{path}." if path and not root else ""
    restored = restore(owner, module, model, loaded, record, trainable=None, upcast=True, prefix=prefix)
    weights = {
        name.removeprefix(prefix): each for name, each in loaded["state_dict"].items() if name.startswith(prefix)
    }
    completed = {"state_dict": weights}
    complete(module, completed, restored)
    module.load_state_dict(completed["state_dict"], strict=getattr(module, "strict_loading", True))
    return module


def load_from_checkpoint(cls: type[_Lightning], checkpoint_path: str | os.PathLike[str], **kwargs: Any) -> _Lightning:
    """Do what ``cls.load_from_checkpoint`` does, for a checkpoint with adapters: the host knows nothing of them.

    The module is built as the host builds it, from saved hyperparameters and ``kwargs``, so its constructor has to give
    the base that it had before training. A checkpoint without adapters is loaded as usual.

    Args:
        cls: The LightningModule's class.
        checkpoint_path: Where the checkpoint is.
        **kwargs: For ``cls.load_from_checkpoint``, such as ``map_location``, ``strict`` and arguments of the
            constructor.

    Raises:
        ValueError: If the base is not the one that was adapted.
    """
    owner = "load_from_checkpoint"
    if not (isinstance(cls, type) and issubclass(cls, LightningModule)):
        raise TypeError(
            f"{owner}: cls is a {type(cls).__name__}, not a LightningModule's class. The class comes first and the "
            "checkpoint second: load_from_checkpoint(Net, 'last.ckpt')."
        )
    target = _class_of(cls, checkpoint_path, kwargs.get("weights_only"))
    original = vars(target).get("on_load_checkpoint")
    inherited = target.on_load_checkpoint

    def adapt_first(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get(KEY) is not None:
            checkpoint.update(without_compile(checkpoint, self))
            record = Record.from_checkpoint(owner, checkpoint[KEY])
            model = find_model(owner, self, checkpoint[KEY]["model"])
            restore(owner, self, model, checkpoint, record, trainable=None, upcast=True)
            complete(self, checkpoint, record)
        inherited(self, checkpoint)

    # Its own hook for the length of the call: a subclass made here would not pass the host's check of what a
    # checkpoint of LightningCLI may name.
    cast(Any, target).on_load_checkpoint = adapt_first
    try:
        loaded: _Lightning = cls.load_from_checkpoint(Path(checkpoint_path), **kwargs)
    finally:
        if original is None:
            del target.on_load_checkpoint
        else:
            cast(Any, target).on_load_checkpoint = original
    return loaded


def merge_adapters(module: _Module) -> _Module:
    """Add a module's adapters to its base weights and give it its plain layers back, in place.

    Parameters train again as before the module was adapted.

    Returns:
        The module itself.

    Raises:
        ValueError: If it has no adapters, or an adapted weight is tied to another.
    """
    merge("merge_adapters", module)
    return module


def _read(checkpoint: str | os.PathLike[str] | Mapping[str, Any], weights_only: bool) -> dict[str, Any]:
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    loaded: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=weights_only)
    return loaded


def _refuse_other(owner: str, checkpoint: Mapping[str, Any], module: nn.Module) -> None:
    """Raise ``ValueError`` unless the checkpoint has adapters and the module has none."""
    if checkpoint.get(KEY) is None:
        raise ValueError(
            f"{owner}: the checkpoint has no adapters. Those of a run with the callback Adapters have them; load "
            "another one with load_state_dict."
        )
    if find_record(module) is not None:
        raise ValueError(
            f"{owner}: {type(module).__name__} has adapters already. Give it as it was before training, built anew."
        )


def _has_layers(module: nn.Module, path: str, record: Record) -> bool:
    """Tell whether the adapted layers are found under the path, and not in the module itself."""
    names = {name for name, _ in module.named_modules()}
    return all((f"{path}.{layer}" if path else layer) in names for layer in record.base)


def _class_of(
    cls: type[LightningModule], path: str | os.PathLike[str], weights_only: bool | None
) -> type[LightningModule]:
    """Return the class that the host will build: what a checkpoint of LightningCLI names, or ``cls``."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    named = checkpoint.get("hyper_parameters", {}).get("_class_path")
    waiting = [cls]
    while waiting:
        each = waiting.pop()
        if f"{each.__module__}.{each.__qualname__}" == named:
            return each
        waiting += each.__subclasses__()
    return cls
