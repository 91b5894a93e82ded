"""What StabilityReport says of a run besides its steps: versions, hardware, the module, and what others offer."""

import platform
from importlib import metadata
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.nn.parameter import UninitializedParameter

import lightning_stable
from lightning_stable._report.weights import may_average
from lightning_stable.callbacks._averaging import AveragedWeights
from lightning_stable.callbacks.precision_fallback import PrecisionFallback

__all__ = ["environment_of", "events_of", "model_of", "strategy_of", "validated_weights_of"]

_OF_STRATEGY = ("local_steps", "delayed", "variant", "workers", "comm_dtype", "warmup_steps")


def environment_of(trainer: Trainer) -> dict[str, Any]:
    """Return versions and hardware of a run."""
    device = cast(Any, trainer).strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "lightning_stable": lightning_stable.__version__,
        "lightning": metadata.version("lightning"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": f"{device.type} ({name})",
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "accumulated_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": _plain(trainer.gradient_clip_val),
    }


def model_of(pl_module: LightningModule) -> dict[str, Any]:
    """Return the module's class, its parameters and, of adapters as PEFT builds them, the ranks."""
    parameters = [each for each in pl_module.parameters() if not isinstance(each, UninitializedParameter)]
    found: dict[str, Any] = {
        "class": type(pl_module).__name__,
        "parameters": sum(each.numel() for each in parameters),
        "trained": sum(each.numel() for each in parameters if each.requires_grad),
    }
    ranks = {
        name: max(ranks.values())
        for name, part in pl_module.named_modules()
        if hasattr(part, "base_layer") and isinstance(ranks := getattr(part, "r", None), dict) and ranks
    }
    if ranks and all(isinstance(rank, int) for rank in ranks.values()):
        found["adapter_ranks"] = ranks
    return found


def validated_weights_of(trainer: Trainer) -> str:
    """Return whether validations are of the ``"live"`` weights or their ``"average"``; empty if it is not certain."""
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, AveragedWeights):
            return "live" if callback.validate_with == "live" else "average"
        if isinstance(callback, WeightAveraging):
            return "average"
    return "" if any(may_average(type(callback).__name__) for callback in cast(Any, trainer).callbacks) else "live"


def strategy_of(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a strategy with local steps; nothing of another one."""
    strategy = trainer.strategy
    if getattr(strategy, "local_steps", None) is None:
        return {}
    settings = {name: _plain(getattr(strategy, name)) for name in _OF_STRATEGY if hasattr(strategy, name)}
    return {"name": type(strategy).__name__, **settings}


def _plain(value: Any) -> Any:
    """Return what a file can hold: a strategy of one's own may keep a dtype or more."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def events_of(trainer: Trainer) -> list[dict[str, Any]]:
    """Return what other callbacks say has happened: the step, and what."""
    return [
        {"step": event["step"], "what": f"PrecisionFallback: {event['precision']} precision ({event['reason']})"}
        for callback in cast(Any, trainer).callbacks
        if isinstance(callback, PrecisionFallback)
        for event in callback.events
    ]
