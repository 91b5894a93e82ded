"""The stability toolkit for PyTorch Lightning.

Callbacks, strategies, precision plugins and PEFT initialisers that attach to any ``LightningModule``. Every class of
:data:`lightning_stable.registry.METHODS` is importable from here; nothing heavy is imported until it is asked for.
"""

from __future__ import annotations

# typing.TYPE_CHECKING without importing typing, which would be most of the time this import takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a method's class on first use (PEP 562)."""
    from lightning_stable.registry import METHODS, load_class

    for method in METHODS:
        if method.class_name == name:
            return load_class(method)
    raise AttributeError(f"module 'lightning_stable' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    from lightning_stable.registry import METHODS

    return sorted([*globals(), *(method.class_name for method in METHODS)])
