"""Lightning callbacks, each importable from here without loading the others."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_stable.callbacks.balanced_ema import BalancedEMA
    from lightning_stable.callbacks.ema import EMA
    from lightning_stable.callbacks.ewc import EWC
    from lightning_stable.callbacks.l2_anchor import L2Anchor
    from lightning_stable.callbacks.lae import LAE
    from lightning_stable.callbacks.logit_sharpness import LogitSharpness
    from lightning_stable.callbacks.lwf import LwF
    from lightning_stable.callbacks.mesa import MESA
    from lightning_stable.callbacks.numerics_monitor import NumericsMonitor
    from lightning_stable.callbacks.orthograd import OrthoGrad
    from lightning_stable.callbacks.precision_fallback import PrecisionFallback
    from lightning_stable.callbacks.refresh_learning import RefreshLearning
    from lightning_stable.callbacks.replay import Replay
    from lightning_stable.callbacks.saf import SAF
    from lightning_stable.callbacks.sam import SAM
    from lightning_stable.callbacks.softmax_collapse import SoftmaxCollapseMonitor
    from lightning_stable.callbacks.spike_guard import SpikeGuard
    from lightning_stable.callbacks.stability_gap import StabilityGap
    from lightning_stable.callbacks.stability_report import StabilityReport
    from lightning_stable.callbacks.stable_spam import StableSPAM
    from lightning_stable.callbacks.wsd import WarmupStableDecay

__all__ = [
    "EMA",
    "EWC",
    "LAE",
    "MESA",
    "SAF",
    "SAM",
    "BalancedEMA",
    "L2Anchor",
    "LogitSharpness",
    "LwF",
    "NumericsMonitor",
    "OrthoGrad",
    "PrecisionFallback",
    "RefreshLearning",
    "Replay",
    "SoftmaxCollapseMonitor",
    "SpikeGuard",
    "StabilityGap",
    "StabilityReport",
    "StableSPAM",
    "WarmupStableDecay",
]


def __getattr__(name: str) -> Any:
    """Import a callback on first use (PEP 562)."""
    from lightning_stable.registry import METHODS, load_class

    for method in METHODS:
        if method.kind == "callback" and method.class_name == name:
            return load_class(method)
    raise AttributeError(f"module 'lightning_stable.callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that completion finds them."""
    return sorted({*globals(), *__all__})
