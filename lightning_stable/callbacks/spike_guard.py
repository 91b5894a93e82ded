r"""Guard against spikes of the gradient norm and the loss: skip or clip such updates, and rewind if they go on.

Use it in long or expensive runs, where one bad batch can undo days. It needs some updates to learn what is usual, and
does not repair a learning rate that is too large: then it acts all the time, which its counts show. Cost: one pass over
the gradients and one number read from the device for each optimizer step, which is inherent in deciding on it (the
host waits for the backward pass); with ``rewind_after`` one copy of weights and optimizer state.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import SpikeGuard
    >>> trainer = Trainer(callbacks=[SpikeGuard()], logger=False, enable_checkpointing=False)
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._gradients import GradientTransform, OptimizerStep
from lightning_stable.callbacks._host import gradient_scaler
from lightning_stable.callbacks._snapshot import restore_snapshot, take_snapshot
from lightning_stable.callbacks._worker_state import shows_own_gradients
from lightning_stable.functional._settings import check_choice, check_count, check_positive
from lightning_stable.functional._vectors import global_norm
from lightning_stable.functional.spike_guard import (
    SpikeBandState,
    init_spike_band,
    reject_spike,
    running_median,
    spike_limit,
    update_spike_band,
)

__all__ = ["SpikeGuard"]

_COUNTS = ("skipped", "clipped", "rewinds")


@dataclass
class _Guard:
    """What is known of one optimizer's updates; the counts are of updates.

    Attributes:
        bands: What is usual, of the signals ``"norm"`` and ``"loss"``.
        skipped: Not made, those of rewinds included.
        clipped: Made smaller.
        rewinds: Times that the weights went back.
        in_row: Spikes since the last accepted update or rewind.
        since_snapshot: Accepted since the snapshot was taken.
        not_finite: In a row that were not finite.
        since_rewind: Accepted since the last rewind, or the start.
        vain: Rewinds in a row without an accepted update in between.
        snapshot: What a rewind goes back to.
    """

    bands: dict[str, SpikeBandState]
    skipped: int = 0
    clipped: int = 0
    rewinds: int = 0
    in_row: int = 0
    since_snapshot: int = 0
    not_finite: int = 0
    since_rewind: int = 1
    vain: int = 0
    snapshot: dict[str, dict[str, Any]] | None = None


class _Measured(NamedTuple):
    """A signal of one update, and the largest value of it that is no spike."""

    value: float
    limit: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value)

    @property
    def spiked(self) -> bool:
        return not (self.is_finite and self.value <= self.limit)

    def noted(self, band: SpikeBandState, used: bool) -> SpikeBandState:
        """Return the band after this value, of an update that was used, reduced to the limit, or left out."""
        if not self.is_finite:
            return band
        if self.spiked:
            return reject_spike(band, self.value, self.limit if used else None)
        return update_spike_band(band, self.value) if used else band


class SpikeGuard(GradientTransform):
    r"""Skip or clip updates whose gradient norm or loss is far above what was usual.

    An update is a spike if the norm over all gradients of its optimizer, or the loss, is above the median of the last
    ``window`` accepted values by more than ``threshold`` robust standard deviations (equations:
    :mod:`lightning_stable.functional.spike_guard`), or is not finite. Judging the norm by its own history follows
    ZClip (arXiv 2504.02507), going back and leaving batches out PaLM's training (arXiv 2204.02311, section 5.1); the
    median band, and acting on the loss, are ours. The norm is that of the gradient an optimizer step starts from:
    accumulated, unscaled, synchronised, not yet clipped, and before other callbacks of this library change it. The
    loss is the sum over the backward passes since the last update, averaged over processes.

    ``action="skip"`` leaves the gradients out, so that the optimizer changes neither weights nor moments; learning
    rate schedules and step counts go on. ``action="clip"`` scales the gradient down to the limit, and where the loss
    spiked to the median norm at most; what is not finite is skipped. Skipped values never enter the band, clipped ones
    enter as the limit. A new level is no spike: once more than half of the last ``window`` finite values were above
    the limit, the band is taken from all of them. What a forward pass did to buffers, such as BatchNorm's statistics,
    stays when its update is skipped.

    With ``rewind_after=k``, ``k`` spikes in a row bring back weights, the optimizer's state of each of them and the
    module's buffers from the last snapshot, which is taken at the start of a fit and then every
    ``snapshot_every_n_steps`` accepted updates; the update is skipped. Learning rates, schedules, averages of weights
    and the data do not go back, so the batches of the spike are left out. Snapshots are part of checkpoints.

    Under half precision with a gradient scaler, gradients that are not finite are left to the scaler and not counted.
    Processes decide alike, unless the strategy shows each process its own gradients, as those with local steps do: then
    the norm, and what is done about it, is the process's own. Logs the counts ``spike_guard/skipped``,
    ``spike_guard/clipped``, ``spike_guard/rewinds``, the norm as ``spike_guard/norm`` and, once there is one, its limit
    as ``spike_guard/limit``, each optimizer under its own name if there are several.

    Args:
        action: ``"skip"`` or ``"clip"``.
        watch: ``"norm"``, ``"loss"`` or ``"both"``. A gradient that is not finite is skipped with each.
        threshold: Robust standard deviations above the median that are no spike yet.
        window: Accepted values that tell what is usual.
        warmup_steps: Accepted updates before anything finite is judged, at most ``window``.
        rewind_after: Spikes in a row that lead back to the snapshot; ``None`` for never.
        snapshot_every_n_steps: Accepted updates from one snapshot to the next.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy, LBFGS, or
            ``rewind_after`` with several optimizers or a strategy that shows processes their own gradients; in training
            for sparse gradients.
    """

    # For callbacks that would stop at such an update otherwise.
    skips_non_finite_updates = True
    # Where each process sees its own gradients, it judges them by its own band until the next checkpoint.
    takes_state_of_rank_zero = True

    def __init__(
        self,
        action: str = "skip",
        watch: str = "both",
        threshold: float = 6.0,
        window: int = 128,
        warmup_steps: int = 32,
        rewind_after: int | None = None,
        snapshot_every_n_steps: int = 50,
    ) -> None:
        super().__init__()
        check_choice("action", action, ("skip", "clip"))
        check_choice("watch", watch, ("both", "norm", "loss"))
        check_positive("threshold", threshold, "counted in robust standard deviations. 6 is usual")
        check_count("window", window, 2, "accepted updates")
        check_count("warmup_steps", warmup_steps, 2, "accepted updates")
        if warmup_steps > window:
            raise ValueError(
                f"warmup_steps={warmup_steps} is above window={window}, so nothing would ever be judged. Set it lower."
            )
        if rewind_after is not None:
            check_count("rewind_after", rewind_after, 1, "spikes in a row")
        check_count("snapshot_every_n_steps", snapshot_every_n_steps, 1, "accepted updates")
        self.action = action
        self.watch = watch
        self.threshold = threshold
        self.window = window
        self.warmup_steps = warmup_steps
        self.rewind_after = rewind_after
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self._guards: dict[str, _Guard] = {}
        self._loss: Tensor | None = None

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for guard in self._guards.values():
                guard.snapshot = None  # this fit begins from weights of its own
            # Normalised gradients show no spikes, and statistics should not be made of what is skipped.
            host = cast(Any, trainer)
            others = [callback for callback in host.callbacks if callback is not self]
            places = [place for place, other in enumerate(others) if isinstance(other, GradientTransform)]
            place = min([host.callbacks.index(self), *places])
            host.callbacks = [*others[:place], self, *others[place:]]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.rewind_after is not None and len(trainer.optimizers) > 1:
            raise ValueError(
                f"SpikeGuard(rewind_after={self.rewind_after}) does not work with {len(trainer.optimizers)} "
                "optimizers: the others would have gone on from what one goes back to. Set rewind_after=None."
            )
        if self.rewind_after is not None and shows_own_gradients(trainer):
            raise ValueError(
                f"SpikeGuard(rewind_after={self.rewind_after}) does not work with {type(trainer.strategy).__name__}: "
                "each process sees its own gradients there, and one that went back alone would part from the others. "
                "Set rewind_after=None: each process then skips or clips its own spikes."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            self._loss = None  # what an epoch that was cut within an update has left

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.watch != "norm":
            value = loss.detach().float().mean()
            self._loss = value if self._loss is None else self._loss + value

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": {key: _as_dict(guard) for key, guard in self._guards.items()}}

    # ------------------------------------------------------------------ for users

    @override
    def reset(self) -> None:
        self._guards = {}

    # ------------------------------------------------------------------ helpers

    @override
    def _take_over(self, state: dict[str, Any]) -> None:
        for key, saved in state["optimizers"].items():
            bands = {name: SpikeBandState(**band) for name, band in saved["bands"].items()}
            held = len(bands["norm"].values)
            if held != self.window:
                raise ValueError(
                    f"The checkpoint's SpikeGuard has window={held}, and this one window={self.window}. Resume with "
                    f"window={held}."
                )
            self._guards[key] = _Guard(**{**saved, "bands": bands})

    @override
    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._loss = None
        for place, optimizer in enumerate(trainer.optimizers):
            key = str(place)
            guard = self._guard(key)
            if self.rewind_after is not None and guard.snapshot is None:
                parameters = self._named_parameters(pl_module, optimizer, key)
                guard.snapshot = take_snapshot(pl_module, optimizer, parameters)

    @override
    def _finish(self, trainer: Trainer) -> None:
        self._loss = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        totals = {name: sum(getattr(guard, name) for guard in self._guards.values()) for name in _COUNTS}
        if any(totals.values()):
            told = ", ".join(f"{count} {name}" for name, count in totals.items())
            rank_zero_info(f"SpikeGuard: {told}, in {trainer.global_step} optimizer steps.")

    @override
    def _transform(self, step: OptimizerStep) -> None:
        guard = self._guard(step.key)
        signals = self._measure(step, guard)
        norm = signals["norm"]
        if not norm.is_finite and gradient_scaler(step.trainer) is not None:
            return  # the scaler sees it, too, skips the update and lowers its factor
        if any(signal.spiked for signal in signals.values()):
            self._refuse(step, guard, signals)
        else:
            self._accept(step, guard, signals)
        logged = {name: float(getattr(guard, name)) for name in _COUNTS}
        for name, value in {**logged, "norm": norm.value, "limit": norm.limit}.items():
            if name != "limit" or math.isfinite(value):
                step.module.log(step.name(f"spike_guard/{name}"), value)

    def _guard(self, key: str) -> _Guard:
        """Return what is known of an optimizer's updates."""
        if key not in self._guards:
            self._guards[key] = _Guard({name: init_spike_band(self.window) for name in ("norm", "loss")})
        return self._guards[key]

    def _measure(self, step: OptimizerStep, guard: _Guard) -> dict[str, _Measured]:
        """Return the gradient norm, which has no limit if it is not watched, and the loss if that is."""
        read, loss, self._loss = [global_norm(step.gradients)], self._loss, None
        if loss is not None:
            if step.trainer.world_size > 1 and not shows_own_gradients(step.trainer):
                loss = cast(Tensor, step.trainer.strategy.reduce(loss, reduce_op="mean"))
            read.append(loss.to(read[0]))
        values = dict(zip(("norm", "loss"), torch.stack(read).tolist(), strict=False))  # the host waits here
        scaler = gradient_scaler(step.trainer)
        if scaler is not None and loss is not None:
            values["loss"] /= scaler.get_scale()
        limits = {name: spike_limit(guard.bands[name], self.threshold, self.warmup_steps) for name in values}
        if self.watch == "loss":
            limits["norm"] = math.inf
        return {name: _Measured(value, limits[name]) for name, value in values.items()}

    def _accept(self, step: OptimizerStep, guard: _Guard, signals: dict[str, _Measured]) -> None:
        """Let an update through, and learn from it."""
        _note(guard, signals, used=True)
        guard.in_row = guard.not_finite = 0
        guard.since_snapshot += 1
        guard.since_rewind += 1
        if self.rewind_after is not None and guard.since_snapshot >= self.snapshot_every_n_steps:
            guard.snapshot = take_snapshot(step.module, step.optimizer, self._all_parameters(step))
            guard.since_snapshot = 0

    def _refuse(self, step: OptimizerStep, guard: _Guard, signals: dict[str, _Measured]) -> None:
        """Clip or skip an update, or go back."""
        guard.in_row += 1
        finite = all(signal.is_finite for signal in signals.values())
        self._count_not_finite(guard, finite)
        rewind = self.rewind_after is not None and guard.in_row >= self.rewind_after
        norm = signals["norm"]
        target = min(norm.value, norm.limit)
        if "loss" in signals and signals["loss"].spiked:
            target = min(target, running_median(guard.bands["norm"]))
        clip = self.action == "clip" and finite and not rewind
        _note(guard, signals, used=clip)
        if clip:
            torch._foreach_mul_(step.gradients, target / norm.value if target < norm.value else 1.0)
            guard.clipped += 1
            return
        for parameter in step.parameters.values():
            parameter.grad = None  # which every optimizer takes for no update: no momentum, no decay
        guard.skipped += 1
        if guard.skipped == 1:
            rank_zero_info(
                f"SpikeGuard: skipped the update at optimizer step {step.trainer.global_step} (gradient norm "
                f"{norm.value:.3g}, limit {norm.limit:.3g}), the first one. Counts are logged as spike_guard/skipped."
            )
        if rewind and guard.snapshot is not None:
            restore_snapshot(guard.snapshot, step.module, step.optimizer, self._all_parameters(step))
            guard.rewinds += 1
            guard.vain = 0 if guard.since_rewind else guard.vain + 1
            self._tell_of_rewind(guard, step.trainer.global_step)
            guard.in_row = guard.since_snapshot = guard.since_rewind = 0

    def _tell_of_rewind(self, guard: _Guard, step: int) -> None:
        """Say where the weights are, and once if going back does not help."""
        if guard.vain == 0:
            rank_zero_info(
                f"SpikeGuard: {guard.in_row} spikes in a row at optimizer step {step}; weights and optimizer state are "
                f"back where they were {guard.since_snapshot} accepted updates ago."
            )
        elif guard.vain == 1:
            rank_zero_warn(
                f"SpikeGuard went back at optimizer step {step} again without an accepted update in between: what "
                "spikes is not in the weights. Look for the cause in the data, the learning rate or the precision. "
                "Further such rewinds are counted and not told."
            )

    def _count_not_finite(self, guard: _Guard, finite: bool) -> None:
        """Say once that a run makes no update any more: there is no band that such values could come into."""
        guard.not_finite = 0 if finite else guard.not_finite + 1
        if guard.not_finite == self.window:
            rank_zero_warn(
                f"SpikeGuard skipped {self.window} updates in a row, since their gradient or loss was not finite. The "
                "model does not train any more. Look for the cause in the data, the weights or the precision."
            )

    def _all_parameters(self, step: OptimizerStep) -> dict[str, Tensor]:
        """Return the optimizer's parameters by name, those without a gradient too."""
        return self._named_parameters(step.module, step.optimizer, step.key)


def _note(guard: _Guard, signals: dict[str, _Measured], used: bool) -> None:
    """Take the signals of an update that was used, reduced to the limit where it spiked, or of one left out."""
    guard.bands |= {name: signal.noted(guard.bands[name], used) for name, signal in signals.items()}


def _as_dict(guard: _Guard) -> dict[str, Any]:
    """Return what is known of an optimizer's updates as a dictionary that loads safely."""
    return {**vars(guard), "bands": {name: band._asdict() for name, band in guard.bands.items()}}
