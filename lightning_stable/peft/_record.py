"""What is known of the adapters of a module: kept on the adapted module, and written to checkpoints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FORMAT",
    "KEY",
    "Record",
    "dtype_of",
    "find_record",
    "fingerprint",
    "forget",
    "keep",
    "tell_bits",
    "without_compile",
]

KEY = "lightning_stable_adapters"
"""Where a checkpoint has the record."""
FORMAT = 1
FORMAT_QUANTIZED = 2
"""With bases in 4 bits, which a version that knows the first format only would load as floating-point ones."""

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
        residual: The format of bases in 4 bits, ``""`` for none.
        held: What tells the codes of such a base from others, by layer.
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
    residual: str = ""
    held: dict[str, str] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)

    def to_checkpoint(self, path: str, save: str) -> dict[str, Any]:
        """Return what a checkpoint holds: strings, numbers, lists, dicts and tensors."""
        return {
            "format": FORMAT_QUANTIZED if self.residual else FORMAT,
            "model": path,
            "init": self.init,
            "config": self.config,
            "asked": self.asked,
            "trainable": list(self.trainable),
            "scaling": dict(self.scaling),
            "shift": self.shift,
            "base": dict(self.base),
            "rest": {},
            "residual": self.residual,
            "held": dict(self.held),
            "save": save,
            "trained": list(self.trained),
        }

    @classmethod
    def from_checkpoint(cls, owner: str, stored: Mapping[str, Any]) -> "Record":
        """Read it again.

        Raises:
            ValueError: If it was written in another format.
        """
        if stored.get("format") not in (FORMAT, FORMAT_QUANTIZED):
            raise ValueError(
                f"{owner}: the checkpoint has adapters in format {stored.get('format')!r}, and this version reads "
                f"formats {FORMAT} and {FORMAT_QUANTIZED}. Load it with the version of lightning-stable that wrote it."
            )
        names = ("init", "config", "asked", "trainable", "scaling", "shift", "base", "trained")
        # Checkpoints of before have no fingerprints of the rest, and no bases in 4 bits.
        later = {"rest": dict[str, str](), "residual": "", "held": dict[str, str]()}
        return cls(**{**later, **{name: stored[name] for name in (*names, *later) if name in stored or name in names}})


def without_compile(checkpoint: Mapping[str, Any], module: nn.Module | None = None) -> dict[str, Any]:
    """Return a checkpoint with names as they are without what ``torch.compile`` puts into them.

    Args:
        checkpoint: With adapters.
        module: What it is for, if that is a module: names stay where its own have such parts.
    """
    found = dict(checkpoint)
    if module is not None and any("_orig_mod" in name for name, _ in module.named_modules()):
        return found
    if any("_orig_mod." in name for name in found["state_dict"]):
        found |= {key: _without_compile(found[key]) for key in ("state_dict", KEY)}
    return found


def _without_compile(value: Any) -> Any:
    if isinstance(value, str):  # a name, or an expression that names are matched with
        return value.replace("_orig_mod.", "").replace(r"_orig_mod\.", "")
    if isinstance(value, Mapping):
        return {_without_compile(key): _without_compile(each) for key, each in value.items()}
    return [_without_compile(each) for each in value] if isinstance(value, list) else value


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
    return f"{dtype}|{shape}|{tell_bits(values.contiguous().view(integers).flatten())}"


def tell_bits(bits: Tensor) -> str:
    """Return a short text of a vector of integers: some of them, and the sum of all."""
    sample = bits[:: -(-len(bits) // _SAMPLE)].cpu()
    digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:32]
    # Eight bytes at a time where they divide, which is many times as fast as to widen each number.
    whole = bits.numel() * bits.element_size() % 8 == 0
    if whole and bits.storage_offset() * bits.element_size() % 8:  # a part of a larger tensor
        bits = bits.clone()
    total = bits.view(torch.int64).sum() if whole else bits.sum(dtype=torch.int64)
    return f"{digest}|{int(total)}"


def dtype_of(mark: str) -> torch.dtype | None:
    """Return the floating-point dtype of the weight that a fingerprint is of, ``None`` if there is none."""
    found = getattr(torch, mark.partition("|")[0], None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None
