"""What precision plugins ask of the host: its own plugins for what they leave as it is, and how far training is."""

import math
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import nn

__all__ = ["COMPUTE", "host_precision", "share_of_training", "trainer_of"]

COMPUTE = ("32-true", "bf16-mixed", "bf16-true")


def host_precision(compute: str, device: str = "cpu") -> Precision:
    """Return the host's plugin for one of :data:`COMPUTE`.

    Args:
        compute: What to compute in.
        device: Type of the device, for autocast.
    """
    if compute == "bf16-mixed":
        return MixedPrecision("bf16-mixed", device)
    return HalfPrecision(cast(Any, compute)) if compute == "bf16-true" else Precision()


def trainer_of(module: nn.Module) -> Trainer | None:
    """Return the Trainer that a module is attached to, ``None`` outside of a run."""
    if not isinstance(module, LightningModule):
        return None
    try:
        return module.trainer
    except RuntimeError:  # the host's way to say that there is none
        return None


def share_of_training(trainer: Trainer) -> float | None:
    """Return which share of a fit is done, ``None`` where its end is not known."""
    total = trainer.estimated_stepping_batches
    # Of a loader without a length the host knows max_steps, which is -1 where there is none.
    if not (math.isfinite(total) and total >= 1):
        return None
    # The host adds up the steps of all optimizers, in max_steps too.
    optimizers = max(1, len(trainer.optimizers))
    if trainer.max_steps >= 1:
        total = min(total, trainer.max_steps / optimizers)
    return min(1.0, trainer.global_step / optimizers / total)
