r"""Warmup-stable-decay learning rate, for any LightningModule and any optimizer.

Use it when the length of the run is not settled, or when models for several budgets are wanted from one run. With
one fixed, known horizon a cosine schedule does about as well. Cost: a few numbers a step; no memory.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import WarmupStableDecay
    >>> schedule = WarmupStableDecay(warmup=10, decay=0.2, budgets=[100, 200, 400])
    >>> trainer = Trainer(max_steps=400, callbacks=[schedule], logger=False, enable_checkpointing=False)
"""

import math
import os
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.callbacks._decay_request import OutsideRequest
from lightning_stable.callbacks._host import run_last
from lightning_stable.functional.wsd import (
    Cycle,
    check_length,
    check_shape,
    cycle_at,
    decay_length,
    end_with_decay,
    plan_cycles,
    plan_multiplier,
    set_rate,
)

__all__ = ["WarmupStableDecay"]

_PHASES = {"warmup": 0.0, "stable": 1.0, "decay": 2.0}


class WarmupStableDecay(Callback):
    r"""Warm the learning rate up, keep it at its peak, and let it decay when the end is known (WSD, WSD-S).

    Each parameter group's peak is the rate its optimizer was made with; the rate of optimizer step :math:`s` is the
    peak times :func:`lightning_stable.functional.wsd.wsd_multiplier` at :math:`s` (MiniCPM, arXiv 2404.06395; WSD-S,
    arXiv 2410.05192). The module must configure no scheduler of its own. Logs ``wsd/phase``: 0 in the warmup, 1 in
    the stable phase, 2 in a decay.

    With ``budgets`` (WSD-S) the rate has decayed at each budget, a checkpoint ``budget-<step>.ckpt`` is saved there,
    and training goes on from the decayed weights at the peak. The end of the run is an implicit last budget.

    The end of the run is ``total_steps``, else what the Trainer says (``max_steps``, or ``max_epochs`` over a sized
    dataloader). Where neither is known, the rate stays at its peak until a decay is asked for: by :meth:`decay_now`,
    by the file ``decay_on`` appearing, or by the Trainer's ``max_time`` coming near, at the measured pace. A decay
    that was asked for ends the fit when it is over, also where an end was known.

    On resume the present settings win and the step count is kept, so the same checkpoint can be given another
    horizon, length or shape: a branch of WSD. A decay that was asked for goes on where it was, unless the schedule is
    another one now or a new decay is asked for. At the end of ``total_steps`` the fit ends.

    Args:
        warmup: Length of the warmup: optimizer steps (int), or a share of the run or first cycle (float in [0, 1)).
        decay: Length of the decay: optimizer steps (int), or a share of the run or of each cycle (float in [0, 1)).
            For a decay that was asked for, the share of all steps when it is over.
        shape: ``"linear"``, ``"cosine"``, ``"1-sqrt"``, ``"exponential"`` or ``"inverse"``.
        min_ratio: The floor of the decay, as a share of the peak.
        budgets: Increasing optimizer step counts at which a decay ends.
        total_steps: Optimizer steps of the run; ``None`` to ask the Trainer.
        save_at_budgets: Save a checkpoint at each budget, and at the end of the run if budgets are given.
        decay_on: Path of a file whose appearance asks for a decay; looked for at the start and after each optimizer
            step.

    Raises:
        ValueError: At construction for a setting out of range; at the start of a fit for one that does not fit the
            run: a warmup and decay longer than it, a budget beyond it, a scheduler of the module's own.
    """

    def __init__(
        self,
        warmup: int | float = 0.01,
        decay: int | float = 0.1,
        shape: str = "inverse",
        min_ratio: float = 0.1,
        budgets: Sequence[int] | None = None,
        total_steps: int | None = None,
        save_at_budgets: bool = True,
        decay_on: str | None = None,
    ) -> None:
        check_shape(shape, min_ratio)
        check_length("warmup", warmup)
        check_length("decay", decay)
        if decay_on is not None and not isinstance(decay_on, str):
            raise ValueError(f"decay_on={decay_on!r} is not the path of a file.")
        if budgets is not None or total_steps is not None:
            # Tells at once what does not fit; where the end of the run is not known yet, the first fit tells the rest.
            plan_cycles(total_steps, warmup if budgets or total_steps else 0, decay, budgets)
        if isinstance(warmup, float) and isinstance(decay, float) and warmup + decay > 1:
            raise ValueError(f"warmup={warmup!r} and decay={decay!r} are together more than the whole run.")
        self.warmup = warmup
        self.decay = decay
        self.shape = shape
        self.min_ratio = min_ratio
        self.budgets = None if budgets is None else list(budgets)
        self.total_steps = total_steps
        self.save_at_budgets = save_at_budgets
        self.decay_on = decay_on

        self._cycles: tuple[Cycle, ...] = ()
        self._ending: tuple[Cycle, ...] | None = None
        self._peaks: list[list[float]] = []
        self._last_step = 0
        self._user_request: list[int | None] | None = None
        self._outside = OutsideRequest(decay, decay_on)
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ for users

    def decay_now(self, steps: int | None = None) -> None:
        """Ask for a decay from the next optimizer step on, after which the fit ends.

        Called before a fit it takes effect at its first step, so that a stable-phase checkpoint gives a finished
        model. During a warmup the decay waits for its end; if a decay is under way already, the fit ends with that.
        With several processes, call it on all of them at the same step: nothing is exchanged.

        Args:
            steps: Length in optimizer steps; ``None`` for the callback's ``decay``.

        Raises:
            ValueError: If ``steps`` is not a positive number, or not given with ``decay=0``.
        """
        if steps is None and self.decay == 0:
            raise ValueError("decay_now() has no length with decay=0: give it one, as in decay_now(steps=100).")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps={steps!r} is not a positive number of optimizer steps.")
        self._user_request = [steps]

    def multiplier(self, step: int) -> float:
        """Return the factor on the peak rates at optimizer step ``step`` of the present fit."""
        return plan_multiplier(step, self._plan(), self.shape, self.min_ratio)

    def phase(self, step: int) -> str:
        """Return ``"warmup"``, ``"stable"`` or ``"decay"``: the phase of optimizer step ``step`` of the present fit."""
        cycle = cycle_at(step, self._plan())
        if step < cycle.warmup_end:
            return "warmup"
        return "stable" if cycle.decay_start is None or step < cycle.decay_start else "decay"

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # After the others: a checkpoint at a budget holds their state of that step.
        run_last(trainer, self)
        # What the user asked for before this fit stays.
        self._restored, self._cycles, self._ending = None, (), None
        self._outside.begin()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Taken over when training starts: the host loads a state for validation and testing too.
        self._restored = state_dict

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.lr_scheduler_configs:
            other = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise ValueError(
                f"WarmupStableDecay and {other} would both set the learning rate: {type(pl_module).__name__}."
                "configure_optimizers returns a scheduler. Return the optimizer only, or drop the callback."
            )
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"WarmupStableDecay does not work with {len(trainer.optimizers)} optimizers: Lightning counts their "
                "steps together. Use lightning_stable.functional.wsd.WarmupStableDecayLR for each of them."
            )
        # The host restores optimizers after this hook, so these are the configured rates, not a checkpoint's.
        self._peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self._cycles = self._fitted_plan(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if self.total_steps is not None and trainer.global_step >= self.total_steps:
            raise ValueError(
                f"The checkpoint is at optimizer step {trainer.global_step}, and total_steps={self.total_steps} is not "
                "beyond it: there is nothing left to train. Give a larger total_steps."
            )
        self._take_over()
        self._take_request(trainer)
        self._set_rates(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pl_module.log("wsd/phase", _PHASES[self.phase(trainer.global_step)])

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Again here: a group may have joined since, and under manual optimisation one batch may take several steps.
        self._set_rates(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, previous = trainer.global_step, self._last_step
        if step == previous:
            return
        self._last_step = step
        self._outside.note_step(step)
        if self.budgets and self.save_at_budgets:
            self._save_budgets(trainer, previous, step)
        self._take_request(trainer)
        end = self._plan()[-1].end
        if end is not None and step >= end and (self._ending is not None or self.total_steps is not None):
            # Where the Trainer knows the end it stops by itself.
            rank_zero_info(f"WarmupStableDecay: the schedule is over at optimizer step {step}; the fit ends.")
            trainer.should_stop = True
        # Now, for the next step: whatever logs the rate at its start sees the one that it uses.
        self._set_rates(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end = self._plan()[-1].end
        if self.decay and (end is None or trainer.global_step < end) and not _is_fast_dev_run(trainer):
            rank_zero_warn(
                f"Training ended at optimizer step {trainer.global_step} before the decay of WarmupStableDecay was "
                f"over, at {self.multiplier(trainer.global_step):.3g} of the peak rate (floor: {self.min_ratio:.3g}). "
                "To finish, resume from a checkpoint with decay_now(), or with total_steps a little beyond that step."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_fit(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end_fit(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "planned": [list(cycle) for cycle in self._cycles],
            "ending": None if self._ending is None else [list(cycle) for cycle in self._ending],
            "request": self._user_request,
        }

    # ------------------------------------------------------------------ helpers

    def _end_fit(self, trainer: Trainer) -> None:
        """Leave the optimizer with the rates it came with, for a fit that uses it again, and no request."""
        for peaks, optimizer in zip(self._peaks, trainer.optimizers, strict=False):
            for peak, group in zip(peaks, optimizer.param_groups, strict=False):
                set_rate(group, peak)
        self._peaks = []
        self._user_request = None

    def _fitted_plan(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Cycle, ...]:
        """Lay out the cycles for this Trainer."""
        if _is_fast_dev_run(trainer):
            # A smoke test of the first steps, whatever run they are the beginning of.
            return plan_cycles(None, self.warmup if isinstance(self.warmup, int) else 0, 0)
        limit = self._steps_of_run(trainer, pl_module)
        if limit is not None and self.budgets and self.budgets[-1] > limit:
            plan_cycles(limit, 0, 0, self.budgets)  # raises, also where total_steps would allow it
        total = limit if self.total_steps is None else self.total_steps
        return plan_cycles(total, self.warmup, self.decay, self.budgets)

    def _steps_of_run(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        """Return the optimizer steps the Trainer will take, ``None`` if it does not know."""
        why = None
        if not pl_module.automatic_optimization and (trainer.max_steps == -1 or trainer.max_epochs != -1):
            why = "under manual optimisation a batch may take any number of optimizer steps"
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, GradientAccumulationScheduler) and len(set(callback.scheduling.values())) > 1:
                why = "GradientAccumulationScheduler changes the number of batches to an optimizer step"
        if why is None:
            steps = trainer.estimated_stepping_batches
            return int(steps) if math.isfinite(steps) and steps > 0 else None
        if self.total_steps is None:
            raise ValueError(
                f"WarmupStableDecay does not know how many optimizer steps this run takes: {why}. Give total_steps, "
                "or, under manual optimisation, max_steps without max_epochs."
            )
        return None

    def _plan(self) -> tuple[Cycle, ...]:
        """Return the cycles, the last one ended by the decay that was asked for."""
        if not self._cycles:
            raise RuntimeError("WarmupStableDecay knows its schedule from the start of a fit on; it was asked before.")
        return self._cycles if self._ending is None else self._ending

    def _take_over(self) -> None:
        """Go on with the decay that was asked for before the checkpoint; new settings, or a new request, win."""
        state, self._restored = self._restored, None
        if state is None or self._user_request is not None:
            return
        if state["ending"] is None:
            self._user_request = state["request"]
            return
        ending = tuple(Cycle(*cycle) for cycle in state["ending"])
        if state["planned"] == [list(cycle) for cycle in self._cycles] and self._last_step < cast(int, ending[-1].end):
            self._ending = ending
        else:
            rank_zero_info(
                "WarmupStableDecay: the decay asked for before the checkpoint is over, or the settings are new."
            )

    def _take_request(self, trainer: Trainer) -> None:
        """End the plan with a decay, if one was asked for."""
        if self._ending is not None:
            return
        step = trainer.global_step
        start = max(step, cycle_at(step, self._cycles).warmup_end)
        length = self._outside.length(trainer, step, start)
        if self._user_request is not None:
            length = self._user_request[0] or decay_length(self.decay, start)
        if length is None:
            return
        self._ending = end_with_decay(self._cycles, step, length)
        rank_zero_info(
            f"WarmupStableDecay: a decay was asked for; it takes optimizer steps {self._ending[-1].decay_start} to "
            f"{self._ending[-1].end}, then the fit ends."
        )

    def _save_budgets(self, trainer: Trainer, previous: int, step: int) -> None:
        """Save a checkpoint for each budget that was reached after step ``previous``, by ``step``."""
        for cycle in self._plan():
            if cycle.end is not None and previous < cycle.end <= step and not _is_fast_dev_run(trainer):
                if cycle.end != step:
                    rank_zero_warn(
                        f"Budget {cycle.end} fell within a batch of {step - previous} optimizer steps: its checkpoint "
                        f"is of step {step}. Choose budgets that are multiples of the steps in a batch."
                    )
                name = f"budget-{cycle.end}.ckpt"
                trainer.save_checkpoint(os.path.join(_checkpoint_directory(trainer), name), weights_only=False)  # noqa: PTH118

    def _set_rates(self, trainer: Trainer) -> None:
        """Set each group's rate for the present optimizer step."""
        factor = self.multiplier(trainer.global_step)
        for peaks, optimizer in zip(self._peaks, trainer.optimizers, strict=True):
            groups = optimizer.param_groups
            # Groups that joined in training, such as unfrozen layers, come with their peak.
            peaks.extend(float(group["lr"]) for group in groups[len(peaks) :])
            for peak, group in zip(peaks, groups, strict=True):
                set_rate(group, peak * factor)


def _is_fast_dev_run(trainer: Trainer) -> bool:
    """Tell whether this is a smoke test; the host sets the flag without declaring it."""
    return bool(cast(Any, trainer).fast_dev_run)


def _checkpoint_directory(trainer: Trainer) -> str:
    """Return where the run's checkpoints go: beside ModelCheckpoint's, else in the logger's or the root directory.

    A string, since it may be the URL of a remote file system.
    """
    directory = getattr(trainer.checkpoint_callback, "dirpath", None)
    return str(directory or os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints"))  # noqa: PTH118
