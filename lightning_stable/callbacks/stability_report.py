r"""StabilityReport: one page of a run, with its loss, spikes, learning rate and gradients at every optimizer step.

Use it in any run that someone will look at later: it changes no bit of training, and the page opens without a network.
``lightning-stable report`` makes the page of runs without it, too, from what their loggers wrote; the callback adds
every step in place of every fiftieth, the gradient norm, times, versions and hardware. Cost: one pass over the
gradients for each optimizer step, and every ``every_n_steps`` one transfer of two numbers a step.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import StabilityReport
    >>> trainer = Trainer(callbacks=[StabilityReport()], logger=False, enable_checkpointing=False)
"""

import math
import time
import weakref
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

import lightning_stable
from lightning_stable._glue.quiet import is_quiet
from lightning_stable._report.read_json import FORMAT
from lightning_stable._report.spikes import GAINED, SpikeRule
from lightning_stable.callbacks._host import gradient_scaler, run_first
from lightning_stable.callbacks._report_facts import (
    environment_of,
    events_of,
    model_of,
    strategy_of,
    validated_weights_of,
)
from lightning_stable.callbacks._report_files import ReportFiles
from lightning_stable.callbacks._step_record import SIGNALS, StepRecord
from lightning_stable.callbacks._worker_state import mean_over_processes, trains_apart
from lightning_stable.callbacks.wsd import WarmupStableDecay
from lightning_stable.functional._settings import check_count, check_positive
from lightning_stable.functional._vectors import global_norm

__all__ = ["StabilityReport"]

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


class StabilityReport(Callback):
    """Record each optimizer step of a fit, and write a page of it at the end.

    Recorded are the loss that is trained on (what callbacks add to it included, the mean over micro-batches and
    processes), the norm of the gradient that the step starts from (accumulated, unscaled, synchronised, not yet
    clipped, and before other callbacks of this library change it), the learning rate of each parameter group, and the
    time. They stay on the device for ``every_n_steps`` steps and are then read at once. Of several optimizers, each has
    its own.
    Beside that: what is logged by each validation, the phases of WarmupStableDecay, the switches of PrecisionFallback,
    the rounds of a strategy with local steps, versions and hardware.

    The loggers get ``stability_report/loss``, ``stability_report/gradient_norm`` and the count
    ``stability_report/spikes`` at each reading. Everything goes to ``stability_report.json`` in the run's directory
    every half a minute, at the end and after a failure, and the page to ``report.html`` at the end of the fit. A long
    record is thinned to a few thousand steps, of which the spikes stay.

    Args:
        every_n_steps: Optimizer steps from one reading to the next.
        spike_threshold: Robust standard deviations above the running median that are no spike yet.
        spike_window: Values that tell what is usual.
        directory: Where files go; ``None``: the logger's directory.
        html: Write the page.
        pictures: Write each picture of the page as a PNG, too, to ``report_pictures``.

    Raises:
        ValueError: At construction for a value out of range.
    """

    # Where workers train apart, each has seen its own losses.
    takes_state_of_rank_zero = True

    def __init__(
        self,
        every_n_steps: int = 50,
        spike_threshold: float = 6.0,
        spike_window: int = 128,
        directory: str | None = None,
        html: bool = True,
        pictures: bool = False,
    ) -> None:
        check_count("every_n_steps", every_n_steps, 1, "optimizer steps")
        check_positive("spike_threshold", spike_threshold, "counted in robust standard deviations. 6 is usual")
        check_count("spike_window", spike_window, 2, "values")
        if pictures and not html:
            raise ValueError("pictures=True of StabilityReport goes with html=True: they are those of the page.")
        self.every_n_steps = every_n_steps
        self.spike_threshold = spike_threshold
        self.spike_window = spike_window
        self.directory = directory
        self.html = html
        self.pictures = pictures
        self._rule = SpikeRule(spike_threshold, spike_window, GAINED)
        self._record = StepRecord(self._rule)
        self._module: weakref.ref[LightningModule] | None = None
        self._restored: dict[str, Any] | None = None
        self._files = ReportFiles(directory, pictures=pictures)
        self._running = self._shared = self._norms = False
        self._facts: dict[str, Any] = {}
        self._metrics: dict[str, list[tuple[int, float]]] = {}
        self._loss: Tensor | None = None
        self._batches = 0
        self._backward_counts = True
        self._begun_at = self._before = self._ended = 0.0
        self._epochs = self._last_step = self._last_done = 0
        self._rounds_seen: int | None = None

    def record(self) -> dict[str, Any]:
        """Return what the file holds so far: see the card for its fields."""
        rows, record = self._record.rows, self._record
        columns: dict[str, list[Any]] = {
            "step": [row.step for row in rows],
            "optimizer": [row.optimizer for row in rows],
            **{signal: [row.values[place] for row in rows] for place, signal in enumerate(SIGNALS)},
            # Both what is not finite and what is not known become null.
            **{f"{name}_known": [row.values[place] is not None for row in rows] for place, name in enumerate(SIGNALS)},
            "seconds": [row.seconds for row in rows],
            "lr": [list(row.rates) for row in rows],
        }
        return {
            "format": FORMAT,
            "version": lightning_stable.__version__,
            "steps": record.steps,
            "epochs": self._epochs,
            "seconds": self._elapsed(),
            "rule": self._rule._asdict(),
            "spikes": {signal: [list(spike) for spike in found] for signal, found in record.spikes.items()},
            "spike_counts": dict(record.counts),
            "not_finite": {signal: list(record.not_finite(signal)) for signal in SIGNALS},
            "unknown": dict(record.unknown),
            "phases": [list(phase) for phase in record.phases],
            "rounds": list(record.rounds),
            "finished_rounds": record.finished_rounds,
            **self._facts,
            "metrics": {name: [list(point) for point in points] for name, points in self._metrics.items()},
            "series": columns,
        }

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # Before others change the gradients.
        run_first(trainer, self)
        if self._module is None or self._module() is not pl_module:
            self._forget()
            self._module = weakref.ref(pl_module)
        self._restored = None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._forget()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._running:
            self._restored = state_dict
        elif not self._shared:
            # In the middle of training, from the state of one process. Where means are taken it is the same in all, and
            # what waits here has to stay: the others take its mean.
            self._take_over(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        if restored is not None:
            self._take_over(restored)
        elif self._record.steps_of_all > trainer.global_step:
            self._forget()  # another fit of the module, which counts its steps from 0 again
        # Of steps that were made without this callback nothing says which optimizer made them.
        self._record.begin(trainer.global_step // max(1, len(trainer.optimizers)), len(trainer.optimizers))
        self._before, self._begun_at = self._ended, time.monotonic()
        self._shared = trainer.world_size > 1 and not trains_apart(trainer)
        self._norms = not isinstance(trainer.strategy, _SHARDED)
        self._last_step, self._last_done = trainer.global_step, self._record.steps
        self._rounds_seen, self._running = None, True
        self._begin_loss()
        self._files.begin(trainer)
        environment = environment_of(trainer)
        self._facts = {"environment": environment, "model": model_of(pl_module), "strategy": strategy_of(trainer)}
        self._facts["validated_weights"] = validated_weights_of(trainer)
        if not self._norms:
            self._files.once(
                f"StabilityReport records no gradient norm with {environment['strategy']}, which shards it."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._backward_counts = True
        if pl_module.automatic_optimization and batch_idx % trainer.accumulate_grad_batches == 0:
            self._begin_loss()  # what an epoch that was cut within an update has left
        if self._rounds_seen is None:
            self._rounds_seen = getattr(trainer.strategy, "finished_rounds", 0)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Under automatic optimisation a batch has one pass that counts; others may run it again, at other weights.
        automatic = pl_module.automatic_optimization
        if is_quiet(pl_module) or (automatic and not self._backward_counts):
            return
        self._backward_counts = False
        value = loss.detach().float().mean()
        scaler = gradient_scaler(trainer)
        # The factor stays on the device: to read it, the host would wait.
        value = value if scaler is None else value / scaler.scale(torch.ones_like(value))
        self._loss = value if self._loss is None else self._loss + value
        self._batches += 1

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        place = next(place for place, other in enumerate(trainer.optimizers) if other is optimizer)
        norm = _norm(trainer, optimizer) if self._norms else None
        loss, nothing = self._loss, torch.zeros((), device=pl_module.device)
        if loss is not None and pl_module.automatic_optimization:
            # The host has divided by the number of batches that an update should have; the last one may have fewer.
            loss = loss * (trainer.accumulate_grad_batches / self._batches)
        # A batch that was skipped has no loss, nor has a backward pass that the host does not see.
        known = [value is not None for value in (loss, norm)]
        pair = [nothing if value is None else value.to(nothing) for value in (loss, norm)]
        rates = [_kept(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        self._record.note(trainer.global_step, place, torch.stack(pair), rates, self._elapsed(), known)
        if not pl_module.automatic_optimization:
            self._begin_loss()
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, WarmupStableDecay):
                self._record.note_phase(callback.phase(trainer.global_step))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # more micro-batches of this step are to come
        before, done = self._last_done, self._record.steps
        self._last_step, self._last_done = trainer.global_step, done
        self._epochs = trainer.current_epoch + 1
        rounds = getattr(trainer.strategy, "finished_rounds", 0)
        if rounds > (self._rounds_seen or 0):
            self._record.note_round()
        self._rounds_seen = rounds
        if done // self.every_n_steps > before // self.every_n_steps:
            self._flush(trainer)
            self._log(trainer, done)
            if self._files.due:
                self._write(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        held = {name: value for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        if not held:
            return
        # To the host first: not every device has double precision.
        numbers = torch.stack([value.detach().flatten()[0].cpu().double() for value in held.values()]).tolist()
        for name, number in zip(held, numbers, strict=True):
            self._metrics.setdefault(name, []).append((self._record.steps, number))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)
        self._end(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.html:
            self._files.write_page(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._running:
            self._record.flush()  # of this process alone: others may not come
            self._end(trainer)
            if self.html:
                self._files.say_how(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._shared:
            self._record.flush()
        return self._record.state_dict()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.interrupted:
            self._flush(trainer)
        states = checkpoint.get("callbacks")
        if states is not None:
            # Again, with the mean over processes, and with what is only known here: times, and what was validated.
            seconds = torch.tensor([row.seconds for row in self._record.rows], dtype=torch.float64)
            metrics = {name: [list(point) for point in points] for name, points in self._metrics.items()}
            own = {"seconds": seconds, "metrics": metrics, "epochs": self._epochs, "elapsed": self._elapsed()}
            states[self.state_key] = {**self.state_dict(), "own": own}

    # ------------------------------------------------------------------ helpers

    def _forget(self) -> None:
        self._record.forget()
        self._metrics, self._epochs, self._ended, self._shared = {}, 0, 0.0, False

    def _begin_loss(self) -> None:
        self._loss, self._batches, self._backward_counts = None, 0, True

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._begun_at if self._running else self._ended

    def _take_over(self, state: dict[str, Any]) -> None:
        own = state.get("own", {})
        self._record.load_state_dict(state, own["seconds"].tolist() if own else ())
        if own:
            self._metrics = {name: [(step, value) for step, value in points] for name, points in own["metrics"].items()}
            self._epochs, self._ended = own["epochs"], own["elapsed"]

    def _flush(self, trainer: Trainer) -> None:
        """Read what waits on the device, the mean over processes where they train together."""
        if self._record.waits:
            self._record.flush((lambda values: mean_over_processes(trainer, [values])[0]) if self._shared else None)

    def _log(self, trainer: Trainer, done: int) -> None:
        """Give the loggers the last step of each optimizer."""
        values: dict[str, float] = {}
        for place in range(len(trainer.optimizers)):
            last = self._record.latest.get(place)
            end = f"/{place}" if len(trainer.optimizers) > 1 else ""
            if last is not None:
                known = [(name, v) for name, v in zip(SIGNALS, last.values, strict=True) if v is not None]
                values |= {f"stability_report/{name}{end}": v for name, v in known}
        values["stability_report/spikes"] = float(sum(self._record.counts.values()))
        for logger in trainer.loggers:
            # The host logs what comes of a step under the number of steps before it: of the optimizer with the most.
            logger.log_metrics({name: v for name, v in values.items() if math.isfinite(v)}, step=done - 1)

    def _end(self, trainer: Trainer) -> None:
        self._ended, self._running = self._elapsed(), False
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Write the file."""
        self._facts["events"] = events_of(trainer)
        self._files.write(trainer, self.record())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None}


def _kept(rate: Any) -> Any:
    """Return a rate as it is now; one that is on the device is read later."""
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)


def _norm(trainer: Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the norm over an optimizer's gradients, without waiting for it; ``None`` if there are none."""
    found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [_plain(gradient) for gradient in found]
    if not gradients:
        return None
    norm = global_norm(gradients)
    scaler = gradient_scaler(trainer)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        norm = norm / scaler.scale(torch.ones_like(norm))  # such an optimizer unscales them itself
    return norm


def _plain(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient as real ones without holes."""
    if gradient.layout != torch.strided:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
