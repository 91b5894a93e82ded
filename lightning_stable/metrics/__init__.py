"""Metrics, each importable from here without loading the rooms of the other plugins."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stable.metrics.continual import (
        AverageAccuracy,
        BackwardTransfer,
        ContinualMetrics,
        Forgetting,
        ForwardTransfer,
        GapDepth,
        GapRecovered,
        GapRecovery,
        LearningCurveArea,
        MinAccuracy,
        WindowedForgetting,
        WindowedPlasticity,
        WorstCaseAccuracy,
    )

__all__ = [
    "AverageAccuracy",
    "BackwardTransfer",
    "ContinualMetrics",
    "Forgetting",
    "ForwardTransfer",
    "GapDepth",
    "GapRecovered",
    "GapRecovery",
    "LearningCurveArea",
    "MinAccuracy",
    "WindowedForgetting",
    "WindowedPlasticity",
    "WorstCaseAccuracy",
]


def __getattr__(name: str) -> Any:
    """Import a metric on first use (PEP 562)."""
    if name in __all__:
        from lightning_stable.metrics import continual

        return getattr(continual, name)
    raise AttributeError(f"module 'lightning_stable.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    return sorted({*globals(), *__all__})
