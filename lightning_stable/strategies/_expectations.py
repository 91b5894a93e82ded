"""What a run's plan means for rounds of local steps, told before its first step."""

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["warn_of_checkpoints", "warn_of_plan"]


def warn_of_plan(
    owner: str, local_steps: int | Sequence[Sequence[int]] | str, warmup_steps: int, trainer: Trainer
) -> None:
    """Warn if no round can begin before the run ends, or if checkpoints come before one can end.

    Args:
        owner: Name of the strategy.
        local_steps: Optimizer steps of a round, or pairs of first step and local steps. Of "auto" nothing is known yet.
        warmup_steps: Synchronous steps before the first round.
        trainer: Knows how long the run is, and when it saves.
    """
    total = trainer.estimated_stepping_batches
    if 0 < total <= warmup_steps:
        rank_zero_warn(
            f"{owner}: all of the run's {total:g} steps are synchronous, since the warm-up has {warmup_steps}. Lower "
            "warmup_steps, or train longer."
        )
    elif not isinstance(local_steps, str):
        longest = local_steps if isinstance(local_steps, int) else max(steps for _, steps in local_steps)
        warn_of_checkpoints(owner, longest, trainer)


def warn_of_checkpoints(owner: str, local_steps: int, trainer: Trainer) -> None:
    """Warn if checkpoints come before a round of so many steps can end: outer steps are missed, nothing is hidden."""
    plans = [plan for callback in trainer.checkpoint_callbacks if (plan := _steps_between(callback, trainer))]
    between, cause = min(plans, default=(local_steps, ""))
    if between < local_steps and not getattr(trainer, "fast_dev_run", False):
        rank_zero_warn(
            f"{owner}: {cause} saves a checkpoint every {between} optimizer steps, and a round has {local_steps}. Each "
            "checkpoint ends the round before its time: all workers wait for the link, the mean of their weights is "
            "taken plainly, without the outer step and its momentum, and the optimizers' state is sent too. Save every "
            f"{local_steps} steps or more rarely, best in multiples of it, or lower local_steps."
        )


def _steps_between(callback: object, trainer: Trainer) -> tuple[int, str] | None:
    """Return how many optimizer steps lie between two checkpoints of the host's callback, and the setting behind it."""
    if not isinstance(callback, ModelCheckpoint) or (callback.save_top_k == 0 and not callback.save_last):
        return None
    if callback._every_n_train_steps > 0:
        # The host adds up the steps of all optimizers, so a round never sees more of them than this.
        return callback._every_n_train_steps, f"every_n_train_steps={callback._every_n_train_steps}"
    if callback._every_n_epochs < 1:
        return None
    batches: float = trainer.num_training_batches * callback._every_n_epochs
    cause = "ModelCheckpoint, at the end of an epoch,"
    if not callback._should_save_on_train_epoch_end(trainer):
        batches = trainer.val_check_batch or math.inf
        cause = f"val_check_interval={trainer.val_check_interval} with ModelCheckpoint"
    if not math.isfinite(batches):
        return None
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches)), cause
