"""What precision plugins ask of the host: its own plugins for what they leave as it is, and how far training is."""

from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_stable.functional._horizon import steps_of_each

__all__ = [
    "COMPUTE",
    "host_precision",
    "optimizer_steps",
    "refuse_sharded",
    "share_of_training",
    "total_steps",
    "trainer_of",
]

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


def refuse_sharded(owner: str, trainer: Trainer) -> None:
    """Raise ``ValueError`` if the strategy needs a precision of its own, or shards the weights."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
            f"{owner} does not work with {type(trainer.strategy).__name__}, under which a layer holds a part of its "
            "weight. Use a single device or strategy='ddp'."
        )


def optimizer_steps(trainer: Trainer) -> int:
    """Return how many steps each optimizer has made in a fit."""
    # The host adds up the steps of all optimizers.
    return trainer.global_step // max(1, len(trainer.optimizers))


def total_steps(trainer: Trainer) -> float | None:
    """Return how many steps each optimizer makes in a fit, ``None`` where its end is not known."""
    optimizers = max(1, len(trainer.optimizers))
    return steps_of_each(trainer.estimated_stepping_batches, trainer.max_steps, optimizers)


def share_of_training(trainer: Trainer) -> float | None:
    """Return which share of a fit is done, ``None`` where its end is not known."""
    total = total_steps(trainer)
    return None if total is None else min(1.0, trainer.global_step / max(1, len(trainer.optimizers)) / total)
