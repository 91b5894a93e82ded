"""Lightning strategies, each importable from here without loading the others.

Importing this package registers them by name, so that ``Trainer(strategy="co2")`` finds them.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_stable.registry import METHODS, find_method, load_class

if TYPE_CHECKING:
    from lightning_stable.strategies.co2 import CO2Strategy
    from lightning_stable.strategies.compressed_ddp import CompressedDDPStrategy
    from lightning_stable.strategies.diloco import DiLoCoStrategy
    from lightning_stable.strategies.local_sgd import LocalSGDStrategy
    from lightning_stable.strategies.one_bit_adam import OneBitAdamStrategy
    from lightning_stable.strategies.robust_ddp import RobustDDPStrategy
    from lightning_stable.strategies.slowmo import SlowMoStrategy

__all__ = [
    "CO2Strategy",
    "CompressedDDPStrategy",
    "DiLoCoStrategy",
    "LocalSGDStrategy",
    "OneBitAdamStrategy",
    "RobustDDPStrategy",
    "SlowMoStrategy",
]


def __getattr__(name: str) -> Any:
    """Import a strategy on first use (PEP 562)."""
    for method in METHODS:
        if method.kind == "strategy" and method.class_name == name:
            return load_class(method)
    raise AttributeError(f"module 'lightning_stable.strategies' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    return sorted({*globals(), *__all__})


def _build(name: str, **settings: Any) -> Any:
    return load_class(find_method(name))(**settings)


for _method in METHODS:
    if _method.kind == "strategy" and _method.name not in StrategyRegistry:
        StrategyRegistry.register(_method.name, partial(_build, _method.name), description=_method.summary)
