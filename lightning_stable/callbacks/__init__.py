"""Lightning callbacks, each importable from here without loading the others."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stable.callbacks.balanced_ema import BalancedEMA
    from lightning_stable.callbacks.ema import EMA
    from lightning_stable.callbacks.wsd import WarmupStableDecay

__all__ = ["EMA", "BalancedEMA", "WarmupStableDecay"]


def __getattr__(name: str) -> Any:
    """Import a callback on first use (PEP 562)."""
    from lightning_stable.registry import METHODS, load_class

    for method in METHODS:
        if method.kind == "callback" and method.class_name == name:
            return load_class(method)
    raise AttributeError(f"module 'lightning_stable.callbacks' has no attribute {name!r}")
