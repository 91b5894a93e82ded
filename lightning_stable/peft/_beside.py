"""Fingerprints of what an untouched base gives back beside the adapted weights, such as a head that does not train."""

import hashlib
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_stable.peft._record import Record, dtype_of, fingerprint
from lightning_stable.peft._targets import Target

__all__ = ["check_beside", "marks_beside", "marks_of"]

_MOST = 256
"""Parameters with a fingerprint of their own in a checkpoint; more of them share one, in and beside the model each."""
_ALL = "*"

_T = TypeVar("_T")


def marks_beside(root: nn.Module, targets: Mapping[str, Target]) -> dict[str, str]:
    """Return the fingerprints of an untouched module's parameters, those of layers to adapt left out."""
    return {name: fingerprint(each) for name, each in _beside(root, targets).items()}


def marks_of(marks: Mapping[str, str], dropped: Collection[str], path: str) -> dict[str, str]:
    """Return what a checkpoint holds of the fingerprints: those of parameters that it leaves out.

    Args:
        marks: Fingerprints by the names in the untouched module.
        dropped: What the checkpoint leaves out, by the names in the adapted module.
        path: Where the adapted model is, which may be loaded alone.
    """
    if any(name.endswith(_ALL) for name in marks):  # taken over from a checkpoint
        return dict(marks)
    pristine = {_pristine(name) for name in dropped}
    held = {name: mark for name, mark in sorted(marks.items()) if name in pristine}
    if len(held) <= _MOST:
        return held
    scopes = {f"{path}.{_ALL}" if path else _ALL, _ALL}
    shared = {scope: _of_scope(scope, scopes, held) for scope in sorted(scopes)}
    return {scope: _one_for_all(marks) for scope, marks in shared.items() if marks}


def check_beside(
    owner: str, root: nn.Module, targets: Mapping[str, Target], record: Record, prefix: str
) -> dict[str, str]:
    """Compare an untouched module with the fingerprints of a checkpoint, and return its own.

    Args:
        owner: What is named in messages.
        root: The outermost module.
        targets: The layers that are to be adapted.
        record: What the checkpoint says of the adapters.
        prefix: What the checkpoint's names begin with and those of ``root`` do not.

    Raises:
        ValueError: If a parameter is another one, naming the first.
    """
    beside = _beside(root, targets)
    trained = {_pristine(name) for name in record.trained}
    held = {prefix + name: each for name, each in beside.items() if prefix + name not in trained}
    scopes = {name for name in record.rest if name.endswith(_ALL)}
    for name, mark in record.rest.items():
        if not name.startswith(prefix):
            continue
        if name in scopes:
            kinds = mark.partition("|")[0]
            found = _one_for_all({n: _mark(p, kinds + "|") for n, p in _of_scope(name, scopes, held).items()})
            # Of several precisions that are others now, nothing can be said.
            if found != mark and found.partition("|")[0] == kinds:
                raise _other(owner, "one of the weights beside the adapted layers")
        elif name in held and _mark(held[name], mark) != mark:
            raise _other(owner, f"{name!r}, which lies beside the adapted layers,")
    return {name: fingerprint(each) for name, each in beside.items()}


def _other(owner: str, what: str) -> ValueError:
    return ValueError(
        f"{owner}: {what} is not what it was when the adapters were made, and the checkpoint does not hold it: another "
        "base model, another seed of a random head, or weights that have been trained since. Load the same weights "
        "first; let such a head train (trainable), or save checkpoints that hold all weights with save='full'."
    )


def _beside(root: nn.Module, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    adapted = {id(getattr(target.layer, "weight", None)) for target in targets.values()}
    return {name: each for name, each in root.named_parameters() if id(each) not in adapted}


def _of_scope(scope: str, scopes: Collection[str], named: Mapping[str, _T]) -> dict[str, _T]:
    """Return what is under a scope such as ``"model.*"``, and under none of the others, which are more narrow."""
    narrow = [other[:-1] for other in scopes if len(other) > len(scope)]
    return {n: e for n, e in named.items() if n.startswith(scope[:-1]) and not any(map(n.startswith, narrow))}


def _mark(parameter: Tensor, as_in: str) -> str:
    """Return the fingerprint in the precision that another one was taken in."""
    dtype = dtype_of(as_in)
    same = dtype is None or not parameter.is_floating_point() or type(parameter.data) is not Tensor
    return fingerprint(parameter if same else parameter.detach().to(dtype or torch.float32))


def _one_for_all(marks: Mapping[str, str]) -> str:
    kinds = "+".join(sorted({mark.partition("|")[0] for mark in marks.values()}))
    text = "\n".join(f"{name}={mark}" for name, mark in sorted(marks.items()))
    return f"{kinds}|{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _pristine(name: str) -> str:
    """Return the name that a parameter had before its layer was adapted."""
    return name.replace(".base_layer.", ".")
