"""What is known of the adapters of a module: kept on the adapted module, and written to checkpoints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FORMAT", "KEY", "Record", "dtype_of", "find_record", "fingerprint", "forget", "keep"]

KEY = "lightning_stable_adapters"
"""Where a checkpoint has the record."""
FORMAT = 1

_ATTRIBUTE = "_lightning_stable_adapters"
_SAMPLE = 4096  # elements whose bits enter a fingerprint as they are


@dataclass
class Record:
    """How a module was adapted.

    Attributes:
        init: The initialiser.
        config: The PEFT config as plain values, after ranks were redistributed.
        asked: The PEFT config as plain values, as the user gave it.
        trainable: The user's patterns of parameters outside the adapters that train.
        scaling: Factor of the adapter's product, by layer.
        shift: First factors ``a`` (rank, in) and ``b`` (out, rank) of layers whose base was shifted, on the CPU.
        base: Fingerprint of the untouched weight, by layer.
        trained: Names of parameters that train or have trained, as the outermost module has them.
        rest: Fingerprints of parameters beside ``base``, by the names that the untouched outermost module has.
        flags: Which parameters of the untouched module trained, by name; not in checkpoints.
    """

    init: str
    config: dict[str, Any]
    asked: dict[str, Any]
    trainable: list[str]
    scaling: dict[str, float] = field(default_factory=dict)
    shift: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    rest: dict[str, str] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)

    def to_checkpoint(self, path: str, save: str) -> dict[str, Any]:
        """Return what a checkpoint holds: strings, numbers, lists, dicts and tensors."""
        return {
            "format": FORMAT,
            "model": path,
            "init": self.init,
            "config": self.config,
            "asked": self.asked,
            "trainable": list(self.trainable),
            "scaling": dict(self.scaling),
            "shift": self.shift,
            "base": dict(self.base),
            "rest": {},
            "save": save,
            "trained": list(self.trained),
        }

    @classmethod
    def from_checkpoint(cls, owner: str, stored: Mapping[str, Any]) -> "Record":
        """Read it again.

        Raises:
            ValueError: If it was written in another format.
        """
        if stored.get("format") != FORMAT:
            raise ValueError(
                f"{owner}: the checkpoint has adapters in format {stored.get('format')!r}, and this version reads "
                f"format {FORMAT}. Load it with the version of lightning-stable that wrote it."
            )
        names = ("init", "config", "asked", "trainable", "scaling", "shift", "base", "trained")
        # Checkpoints of before have no fingerprints of the rest.
        return cls(**{name: stored[name] for name in names}, rest=stored.get("rest", {}))


def keep(model: nn.Module, record: Record) -> None:
    """Leave a record on the adapted module."""
    vars(model)[_ATTRIBUTE] = record


def forget(model: nn.Module) -> None:
    """Take the record off."""
    vars(model).pop(_ATTRIBUTE, None)


def find_record(module: nn.Module) -> tuple[str, nn.Module, Record] | None:
    """Return the path of the adapted module within ``module``, itself and its record; ``None`` if there is none."""
    for path, part in module.named_modules():
        record = vars(part).get(_ATTRIBUTE)
        if isinstance(record, Record):
            return path, part, record
    return None


@torch.no_grad()
def fingerprint(weight: Tensor) -> str:
    """Return a short text that tells a weight from any other: dtype, shape, some of its bits, the sum of all bits.

    It depends on the values alone, not on the device, and takes one pass over them. What is quantized or otherwise no
    plain tensor is told by its class, dtype and shape.
    """
    shape = "x".join(map(str, weight.shape))
    dtype = str(weight.dtype).removeprefix("torch.")
    values = weight.detach()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size())
    if type(values) is not Tensor or not values.is_floating_point() or integers is None or values.numel() == 0:
        return f"{dtype}|{shape}|{type(weight).__name__}"
    bits = values.contiguous().view(integers).flatten()
    sample = bits[:: -(-len(bits) // _SAMPLE)].cpu()
    digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:32]
    # Eight bytes at a time where they divide, which is many times as fast as to widen each number.
    whole = bits.numel() * bits.element_size() % 8 == 0
    total = bits.view(torch.int64).sum() if whole else bits.sum(dtype=torch.int64)
    return f"{dtype}|{shape}|{digest}|{int(total)}"


def dtype_of(mark: str) -> torch.dtype | None:
    """Return the floating-point dtype of the weight that a fingerprint is of, ``None`` if there is none."""
    found = getattr(torch, mark.partition("|")[0], None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None
