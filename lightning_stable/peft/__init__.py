"""Adapters by PEFT for any LightningModule, each importable from here without loading the others."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stable.peft._load import load_adapters, load_from_checkpoint, merge_adapters
    from lightning_stable.peft.adapters import Adapters
    from lightning_stable.peft.loldu import LoLDUConfig, LoLDUModel
    from lightning_stable.peft.reorthogonalise_lora import ReorthogonaliseLoRA
    from lightning_stable.peft.svfit import SVFitConfig, SVFitModel

__all__ = [
    "Adapters",
    "LoLDUConfig",
    "LoLDUModel",
    "ReorthogonaliseLoRA",
    "SVFitConfig",
    "SVFitModel",
    "load_adapters",
    "load_from_checkpoint",
    "merge_adapters",
]

# peft imports bitsandbytes where it is there, which says on some CPUs that it misses a package: one for products that
# nothing here takes, those of its own layers in evaluation.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))

_FUNCTIONS = ("load_adapters", "load_from_checkpoint", "merge_adapters")


def __getattr__(name: str) -> Any:
    """Import a plugin or function on first use (PEP 562)."""
    from lightning_stable.registry import METHODS

    if name in _FUNCTIONS:
        return getattr(importlib.import_module("lightning_stable.peft._load"), name)
    for method in METHODS:
        if method.kind == "peft" and name in (method.class_name, *method.relatives):
            return getattr(importlib.import_module(method.class_path.rpartition(".")[0]), name)
    raise AttributeError(f"module 'lightning_stable.peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    return sorted({*globals(), *__all__})
