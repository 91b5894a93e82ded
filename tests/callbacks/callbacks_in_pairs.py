"""Jobs for two processes: callbacks beside strategies whose workers train apart."""

from typing import Any

import pytest
from contract.broken import row
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_stable.callbacks import EMA, SAM, BalancedEMA, LwF, SpikeGuard, StableSPAM
from lightning_stable.strategies import LocalSGDStrategy, OneBitAdamStrategy
from lightning_stable.testing.harness import Net, fit
from lightning_stable.testing.modules import trained_by
from lightning_stable.testing.workers import of_all_ranks, of_rank_zero

# Further settings under contract beside a strategy with local steps.
ROWS = {
    "looksam": row(SAM, make=lambda: SAM(rho=0.3, variant="looksam", interval=3)),
    "ema of buffers": row(EMA, make=lambda: EMA(decay=0.8, buffers="average", dtype="float64", start_step=2)),
}

# In the middle of a round.
TEACHER_STEPS = 5


class _NotesModel(Callback):
    """Notes the parameters and the buffers with which the first task ends."""

    def __init__(self) -> None:
        self.model: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == TEACHER_STEPS:
            self.model = {name: value.clone() for name, value in pl_module.state_dict().items()}


def teach() -> dict[str, Any]:
    """Train two tasks on two workers, and return what teaches the second."""
    lwf, notes = LwF(task_steps=[TEACHER_STEPS]), _NotesModel()
    fit([LocalSGDStrategy(local_steps=3), lwf, notes], module=Net(), max_steps=TEACHER_STEPS + 1)
    models = of_all_ranks(notes.model)
    floating = [name for name, value in models[0].items() if value.is_floating_point()]
    teacher = lwf.state_dict()["teacher"]
    return {
        "teacher": {name: teacher[name] for name in floating},
        "teacher of rank 0": {name: of_rank_zero(teacher[name]) for name in floating},
        "mean": {name: (models[0][name] + models[1][name]) / 2 for name in floating},
        "apart": max(float((models[0][name] - models[1][name]).abs().max()) for name in floating),
    }


def rewind() -> str:
    """Return what is said to a guard that would let one worker go back."""
    with pytest.raises(ValueError, match="rewind_after") as caught:
        fit([LocalSGDStrategy(local_steps=3), SpikeGuard(rewind_after=2)], max_steps=2)
    return str(caught.value)


def average() -> str:
    """Return what is said to an average whose coefficients would differ."""
    with trained_by("adam"), pytest.raises(ValueError, match="own gradients") as caught:
        fit([OneBitAdamStrategy(freeze_step=4), BalancedEMA()], max_steps=2)
    return str(caught.value)


def reset() -> str:
    """Return what is said to a callback that would forget a frozen variance."""
    with trained_by("adam"), pytest.raises(ValueError, match="reset_every_n_steps") as caught:
        fit([OneBitAdamStrategy(freeze_step=4), StableSPAM()], max_steps=2)
    return str(caught.value)
