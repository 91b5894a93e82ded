"""Lightning precision plugins, each importable from here without loading the others."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stable.precision.float8 import Float8Precision
    from lightning_stable.precision.int8 import Int8Precision
    from lightning_stable.precision.simulated import SimulatedPrecision

__all__ = ["Float8Precision", "Int8Precision", "SimulatedPrecision"]


def __getattr__(name: str) -> Any:
    """Import a precision plugin on first use (PEP 562)."""
    from lightning_stable.registry import METHODS, load_class

    for method in METHODS:
        if method.kind == "precision" and method.class_name == name:
            return load_class(method)
    raise AttributeError(f"module 'lightning_stable.precision' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    return sorted({*globals(), *__all__})
