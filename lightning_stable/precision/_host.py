"""What precision plugins ask of the host: its own plugins for what they leave as it is, and how far training is."""

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from torch import nn

from lightning_stable.functional._horizon import steps_of_each

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
    optimizers = max(1, len(trainer.optimizers))
    total = steps_of_each(trainer.estimated_stepping_batches, trainer.max_steps, optimizers)
    # The host adds up the steps of all optimizers.
    return None if total is None else min(1.0, trainer.global_step / optimizers / total)
