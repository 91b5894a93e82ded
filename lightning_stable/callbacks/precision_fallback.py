r"""Leave low precision for a while when training shows signs of trouble, and go back when they are over.

Use it with :class:`~lightning_stable.precision.SimulatedPrecision`, where a format trains well most of the time and
breaks now and then, or early on (``first_steps_high_precision``). It does not repair a learning rate that is too large
in any precision: training then stays in high precision, which ``precision_fallback/high`` shows. Cost: a few scalar
operations for each optimizer step and one small exchange between processes; what a step measured is read a step later,
so that the host does not wait for the device. With ``monitor="saturation"`` one more pass over each quantized operand,
several for block formats.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import PrecisionFallback
    >>> fallback = PrecisionFallback(steps=200, first_steps_high_precision=100)
    >>> trainer = Trainer(callbacks=[fallback], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._fallback_signals import LOSS, SATURATION, Signals
from lightning_stable.functional._settings import check_count, check_positive
from lightning_stable.functional.precision_fallback import (
    FallbackRule,
    FallbackState,
    init_fallback,
    signal_limits,
    update_fallback,
)
from lightning_stable.functional.simulated import LayerQuantization, matches, quantized_layers
from lightning_stable.functional.spike_guard import SpikeBandState

__all__ = ["PrecisionFallback"]

_SATURATION_LIMIT = 0.01


class PrecisionFallback(Callback):
    r"""Switch quantized layers back to high precision on a spike or a rise, for some steps, with hysteresis.

    A signal above its upper limit begins it: by default the loss, above the median of its last ``window`` values by
    more than ``threshold`` robust standard deviations, or not finite (equations and sources:
    :mod:`lightning_stable.functional.precision_fallback`). It lasts ``steps`` optimizer steps, and on until the latest
    value of every signal is below its lower limit; then ``cooldown`` steps pass before another one. What a step
    measured is judged at the end of the step after it, what a validation measured at its end.

    Signals: ``"loss"`` is the sum over the backward passes since the last update, averaged over processes.
    ``"saturation"`` is the largest share of saturated entries of any operand of a watched layer in the step, as
    NumericsMonitor counts them; none saturates where a scale is fitted to the largest entry. Any other name is that of
    a value that the module or a callback logs with ``self.log``, such as ``"logit_sharpness"``, taken when it changes;
    callbacks that log at the end of a batch go before this one. Processes decide alike by means over processes; under
    strategies whose workers make steps of their own, each by its own values until the next checkpoint.

    In high precision the layers compute as if they had not been converted, in validations too. Steps of all optimizers
    count, in manual optimisation as well. Logs ``precision_fallback/high`` (0 or 1) and ``precision_fallback/count``,
    the fallbacks so far, and tells each switch. The state is in checkpoints and goes on over several fits of one
    module.

    Args:
        monitor: A signal or several; an empty list for ``first_steps_high_precision`` alone.
        threshold: Robust standard deviations above the median at which a fallback begins.
        lower_threshold: Those below which every signal has to be for the way back, at most ``threshold``.
        limits: Upper limits of signals, by name, in place of the learnt ones; above 0. The lower one is as much smaller
            as ``lower_threshold`` is than ``threshold``. That of ``"saturation"`` is 0.01 unless it is given, which is
            for formats without scales: block formats, ``binary`` and ``ternary`` need a higher one.
        window: Values that tell what is usual.
        warmup_steps: Values before a finite one is judged by them, at most ``window``.
        steps: Optimizer steps that a fallback lasts at least.
        cooldown: Optimizer steps of low precision before the next one.
        first_steps_high_precision: Optimizer steps of high precision at the start of the run.
        include: Patterns of the names of layers that are switched; ``saturation`` is theirs, too.
        exclude: Patterns of names of layers that stay in low precision.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit if no layer is quantized, none is
            included, or ``"saturation"`` is watched and nothing can saturate.
    """

    # Workers that train apart switch on their own until the next checkpoint.
    takes_state_of_rank_zero = True

    def __init__(
        self,
        monitor: str | Sequence[str] = LOSS,
        threshold: float = 6.0,
        lower_threshold: float = 3.0,
        limits: Mapping[str, float] | None = None,
        window: int = 128,
        warmup_steps: int = 32,
        steps: int = 100,
        cooldown: int = 100,
        first_steps_high_precision: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        check_positive("threshold", threshold, "counted in robust standard deviations. 6 is usual")
        check_positive("lower_threshold", lower_threshold, "counted in robust standard deviations. 3 is usual")
        if lower_threshold > threshold:
            raise ValueError(
                f"lower_threshold={lower_threshold} is above threshold={threshold}: the way back would be at a higher "
                "value than the way there. Set it lower."
            )
        check_count("window", window, 2, "values")
        check_count("warmup_steps", warmup_steps, 2, "values")
        if warmup_steps > window:
            raise ValueError(
                f"warmup_steps={warmup_steps} is above window={window}, so nothing would ever be judged. Set it lower."
            )
        check_count("steps", steps, 1, "optimizer steps")
        check_count("cooldown", cooldown, 0, "optimizer steps")
        check_count("first_steps_high_precision", first_steps_high_precision, 0, "optimizer steps")
        self.monitor = _names(monitor)
        self.limits = _checked_limits(self.monitor, limits or {})
        self.threshold = threshold
        self.lower_threshold = lower_threshold
        self.window = window
        self.warmup_steps = warmup_steps
        self.steps = steps
        self.cooldown = cooldown
        self.first_steps_high_precision = first_steps_high_precision
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self._rule = FallbackRule(threshold, lower_threshold, steps, cooldown, window, warmup_steps, self.limits)
        self._module: weakref.ref[LightningModule] | None = None
        self._layers: dict[str, LayerQuantization] = {}
        self._restored: dict[str, Any] | None = None
        self._last_step = 0
        self.reset()

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        plugin = trainer.precision_plugin
        if hasattr(plugin, "first_steps_high_precision"):
            raise ValueError(
                f"PrecisionFallback switches layers that SimulatedPrecision converts, and {type(plugin).__name__} "
                "converts those of this module. Leave one of the two out; for a start in high precision the plugin has "
                "first_steps_high_precision."
            )
        if self._module is None or self._module() is not pl_module:
            self.reset()
            self._module = weakref.ref(pl_module)
        self._restored = None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.reset()  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._layers:
            # In the middle of training: a strategy lets every process go on from the state of one.
            self._take_over(state_dict)
            self._apply()
        else:
            self._restored = state_dict

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._undo()
        layers = self._chosen_layers(pl_module)
        self._signals.watch(pl_module, layers)
        self._layers = layers
        if self._restored is not None:
            self._take_over(self._restored)
            self._restored = None
        self._apply()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if self._state.is_high:
            rank_zero_info(
                f"PrecisionFallback: {len(self._layers)} layers are in high precision for at least "
                f"{self._state.remaining} steps from here ({self._state.reason})."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            self._signals.forget()  # what an epoch that was cut within an update has left
        self._signals.begin_batch()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._signals.add_loss(trainer, loss)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._signals.end_batch()
        passed = trainer.global_step - self._last_step
        if passed == 0:
            return  # more micro-batches of this step are to come
        self._last_step = trainer.global_step
        self._decide(trainer, self._signals.end_step(trainer, pl_module), passed)
        pl_module.log("precision_fallback/high", float(self._state.is_high))
        pl_module.log("precision_fallback/count", float(self._count))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._decide(trainer, self._signals.read_logged(trainer, pl_module), 0)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decide(trainer, self._signals.read_logged(trainer, pl_module), 0)
        self._tell_of_missing()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_of_missing()
        if self._count:
            rank_zero_info(f"PrecisionFallback: {self._count} fallbacks in {trainer.global_step} optimizer steps.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    @override
    def state_dict(self) -> dict[str, Any]:
        bands = {name: band._asdict() for name, band in self._state.bands.items()}
        decision = {**self._state._asdict(), "bands": bands, "raised": dict(self._state.raised)}
        return {"decision": decision, "signals": self._signals.state_dict(), "events": self.events}

    # ------------------------------------------------------------------ for users

    @property
    def events(self) -> list[dict[str, Any]]:
        """The switches so far: after which optimizer ``step``, to which ``precision``, and the signal (``reason``)."""
        return [dict(event) for event in self._events]

    def reset(self) -> None:
        """Forget what was measured and begin anew."""
        self._state: FallbackState = init_fallback(self.first_steps_high_precision)
        self._signals = Signals(self.monitor)
        self._events: list[dict[str, Any]] = []
        self._told = False

    # ------------------------------------------------------------------ helpers

    @property
    def _count(self) -> int:
        """Fallbacks so far."""
        return sum(event["precision"] == "high" for event in self._events)

    def _chosen_layers(self, pl_module: LightningModule) -> dict[str, LayerQuantization]:
        """Return the layers to switch."""
        found = quantized_layers(pl_module)
        if not found:
            raise ValueError(
                f"PrecisionFallback found no quantized layer in {type(pl_module).__name__}, so it has nothing to "
                "switch. Train with plugins=[SimulatedPrecision(...)], or leave PrecisionFallback out."
            )
        if not any(layer.quantizes for layer in found.values()):
            raise ValueError(
                f"PrecisionFallback has nothing to switch in {type(pl_module).__name__}: its {len(found)} converted "
                "layers have no format. Give SimulatedPrecision a format, or leave PrecisionFallback out."
            )
        chosen = {
            name: layer
            for name, layer in found.items()
            if matches(name, self.include) and not matches(name, self.exclude)
        }
        if not chosen:
            raise ValueError(
                f"PrecisionFallback(include={self.include}, exclude={self.exclude}) leaves none of the quantized "
                f"layers: {', '.join(found)}. Give patterns of their names."
            )
        return chosen

    def _decide(self, trainer: Trainer, values: dict[str, float], passed: int) -> None:
        """Judge new values, and switch if that is due."""
        if not values and not passed:
            return
        before, self._state = self._state, update_fallback(self._state, values, self._rule, passed)
        if self._state.is_high == before.is_high:
            return
        self._apply()
        step, reason = trainer.global_step, self._state.reason or before.reason
        precision = "high" if self._state.is_high else "low"
        self._events.append({"step": step, "precision": precision, "reason": reason})
        if self._state.is_high:
            limit = signal_limits(before, reason, self._rule)[0]
            why = f"{reason} was {values[reason]:.4g}, its limit {limit:.4g}"
            rank_zero_info(
                f"PrecisionFallback: from step {step} on {len(self._layers)} layers are in high precision, for at "
                f"least {self.steps} steps: {why}."
            )
        else:
            rank_zero_info(f"PrecisionFallback: from step {step} on all layers are in low precision again ({reason}).")

    def _tell_of_missing(self) -> None:
        """Warn once of signals that nobody logs."""
        missing = self._signals.missing()
        if missing and not self._told:
            self._told = True
            rank_zero_warn(
                f"PrecisionFallback(monitor={self.monitor}): {', '.join(missing)} was not logged so far, so it can "
                "switch nothing. Name a value that self.log is given, in the module or in a callback before this one."
            )

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        self._signals.load_state_dict(state["signals"])
        saved = state["decision"]
        bands = {name: SpikeBandState(**band) for name, band in saved["bands"].items() if name not in self.limits}
        for band in bands.values():
            if len(band.values) != self.window:
                raise ValueError(
                    f"The checkpoint's PrecisionFallback has window={len(band.values)}, and this one "
                    f"window={self.window}. Resume with window={len(band.values)}."
                )
        self._state = FallbackState(**{**saved, "bands": bands, "raised": dict(saved["raised"])})
        self._events = [dict(event) for event in state["events"]]

    def _apply(self) -> None:
        """Let the layers compute as was decided."""
        for layer in self._layers.values():
            layer.enabled = not self._state.is_high

    def _undo(self) -> None:
        """Leave the layers as they were."""
        self._signals.unwatch()
        for layer in self._layers.values():
            layer.enabled = True
        self._layers = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        signals = Signals(self.monitor)
        signals.load_state_dict(self._signals.state_dict())
        return {**vars(self), "_module": None, "_layers": {}, "_signals": signals}


def _names(monitor: str | Sequence[str]) -> list[str]:
    """Return the signals as a list."""
    names = [monitor] if isinstance(monitor, str) else list(monitor)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"monitor={names!r} is not a list of names, such as ['loss', 'logit_sharpness'].")
    if len(set(names)) < len(names):
        raise ValueError(f"monitor={names!r} has a name twice. Leave one out.")
    return names


def _checked_limits(monitor: list[str], limits: Mapping[str, float]) -> dict[str, float]:
    """Return the limits that are given and that of saturation, if it is watched."""
    for name, limit in limits.items():
        if name not in monitor:
            raise ValueError(f"limits has {name!r}, which is no signal of monitor={monitor}. Add it there.")
        check_positive(f"limits[{name!r}]", limit, "the value of that signal above which a fallback begins")
    own = {SATURATION: _SATURATION_LIMIT} if SATURATION in monitor else {}
    return {**own, **limits}


def _patterns(name: str, given: Sequence[str]) -> list[str]:
    """Return patterns of names as a list."""
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise ValueError(f"{name}={given!r} is not a list of patterns, such as ['*attention*'].")
    return list(given)
