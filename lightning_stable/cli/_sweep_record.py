"""The callback in each run of a sweep: it writes down how the run went, and ends one that is lost or left alone."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._evaluate import evaluate_validation
from lightning_stable.cli._sweep_grid import write_json
from lightning_stable.cli._sweep_pool import PARENT_VARIABLE

__all__ = ["SweepRecord"]

# A run whose loss was not a number for so many steps in a row does not come back; it is looked at as often.
_LOST_AFTER = 20


class SweepRecord(Callback):
    """Record the first training loss and a logged value: the lowest, and the one at the end of training.

    Where the last validation was not after the last step, one more runs at the end. A run ends early once its training
    loss was not finite for 20 steps in a row, and when the process that started it is gone.

    Args:
        path: The JSON file, written at the end of the fit.
        metric: The logged value, lower is better.

    Raises:
        ValueError: At the end of the fit, if nothing of that name was logged.
    """

    def __init__(self, path: str, metric: str = "val_loss") -> None:
        self.path = path
        self.metric = metric
        self._initial: Tensor | None = None
        self._streak: Tensor | None = None
        self._values: list[tuple[int, float]] = []
        self._batches = 0
        self._lost = False
        self._parent = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parent = int(os.environ.get(PARENT_VARIABLE, "0"))
        # Not in the further processes of a run, whose parent is the first one.
        self._parent = parent if parent == os.getppid() else 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._parent and os.getppid() != self._parent:
            raise RuntimeError("The sweep that started this run is gone.")
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        loss = loss.detach().float().mean() * trainer.accumulate_grad_batches  # the host has divided it
        if self._initial is None:
            self._initial = loss
            self._streak = torch.zeros_like(loss)
        self._streak = torch.where(loss.isfinite(), 0.0, cast(Tensor, self._streak) + 1)
        self._batches += 1
        if self._batches % _LOST_AFTER == 0:
            lost = bool(self._streak >= _LOST_AFTER)
            self._lost = trainer.strategy.reduce_boolean_decision(lost, all=False) if trainer.world_size > 1 else lost
            trainer.should_stop = trainer.should_stop or self._lost

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.metric)
        if value is not None and not trainer.sanity_checking:
            self._values.append((trainer.global_step, float(value)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._lost and (not self._values or self._values[-1][0] < trainer.global_step):
            value = self._last_value(trainer, pl_module)
            if value is not None:
                self._values.append((trainer.global_step, value))
        if not self._values and not self._lost:
            raise ValueError(
                f"The sweep found no {self.metric!r} among what this run logs: "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}. Name one of these by --metric."
            )
        if trainer.is_global_zero:
            write_json(Path(self.path), self._record(trainer))

    def _last_value(self, trainer: Trainer, pl_module: LightningModule) -> float | None:
        """Return the value now: of a validation, or of training where no validation has it."""
        if trainer.enable_validation and trainer.val_dataloaders is not None:
            logged = evaluate_validation(trainer, pl_module).get(self.metric)
            if logged is not None:
                value = logged.value
                if trainer.world_size > 1:
                    value = cast(Tensor, trainer.strategy.reduce(value, reduce_op="mean"))
                return float(value)
        found = trainer.callback_metrics.get(self.metric)
        return None if found is None else float(found)

    def _record(self, trainer: Trainer) -> dict[str, Any]:
        """Return what is written; what is not a finite number is ``None``."""
        values = [value for _, value in self._values if math.isfinite(value)]
        final = math.nan if self._lost or not self._values else self._values[-1][1]
        return {
            "metric": self.metric,
            "steps": trainer.global_step,
            "initial": _finite(math.nan if self._initial is None else float(self._initial)),
            "best": min(values, default=None),
            "final": _finite(final),
            "curve": [[step, _finite(value)] for step, value in self._values],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
