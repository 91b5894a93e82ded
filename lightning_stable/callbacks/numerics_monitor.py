r"""NumericsMonitor: what a number format does to each layer's weights, activations and gradients during training.

Use it in simulated low-bit training to see where it breaks: which layer's gradients underflow, whose activations
saturate, where the signal drowns in rounding. Use it in ordinary training, with ``format``, to see what a format would
do before you train in it. It changes no bit of training. Cost: a few passes over each operand, on the steps that are
watched; nothing on the others.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import NumericsMonitor
    >>> trainer = Trainer(callbacks=[NumericsMonitor(format="e4m3")], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import is_quiet
from lightning_stable.callbacks._closure import is_trained_on
from lightning_stable.callbacks._host import refuse_sharded
from lightning_stable.callbacks._numerics_log import NumericsLog, summarise
from lightning_stable.callbacks._numerics_taps import NumericsTaps
from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional.numerics_monitor import MEASURES, OPERANDS, merge_statistics
from lightning_stable.functional.quantize import Quantizer

__all__ = ["NumericsMonitor"]


class NumericsMonitor(Callback):
    r"""Report underflow, saturation, SQNR, absmax and exponents of each layer's operands, every few optimizer steps.

    Layers that SimulatedPrecision has converted show what their own quantizers do. With ``format`` every other linear
    and convolutional layer shows what that format would do to it. Where all formats of SimulatedPrecision are ``None``
    and there is no ``format``, a warning says that nothing is watched. Statistics add up on the device over the
    micro-batches of the steps that are watched. When a step is reported they are summed over processes and read: see
    :mod:`lightning_stable.functional.numerics_monitor` for what they are.

    Reports go to the Trainer's loggers as ``numerics/<operand>/<measure>_worst`` and ``_mean`` over layers, whole to
    ``numerics.jsonl`` in the run's directory, a line each, and at the end of a fit as a heat map of layers and steps to
    ``numerics.png``.

    Args:
        every_n_steps: Optimizer steps from one report to the next.
        window: How many of the optimizer steps up to a report are watched: 1 for the reported one alone.
        format: What layers that are not converted would be quantized to, such as ``"e4m3"`` or ``"int8"``; ``None``
            leaves them out.
        gradient_format: The same for their gradients; ``None``: as ``format``.
        scaling: Which entries share a scale then: ``"none"``, ``"tensor"``, ``"channel"``, ``"row"`` or
            ``"group:128"``. Block formats bring their own.
        operands: Which of ``"weights"``, ``"activations"`` and ``"gradients"`` are watched.
        include: Patterns of layers' names, as of :mod:`fnmatch`.
        exclude: Patterns of layers to leave out.
        log_layers: Log each layer, too, as ``numerics/<operand>/<measure>/<layer>``.
        directory: Where files go; ``None``: the logger's directory.
        picture: The measure that is drawn: ``"underflow"``, ``"saturation"``, ``"sqnr"`` or ``"absmax"``; ``None`` for
            no picture.

    Attributes:
        latest: What the last report gave to the loggers.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy, or if there
            is no layer to watch.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        window: int = 1,
        format: str | None = None,  # noqa: A002  what it is called everywhere
        gradient_format: str | None = None,
        scaling: str = "none",
        operands: Sequence[str] = OPERANDS,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        log_layers: bool = False,
        directory: str | None = None,
        picture: str | None = "underflow",
    ) -> None:
        check_count("every_n_steps", every_n_steps, 1, "optimizer steps")
        check_count("window", window, 1, "optimizer steps")
        if window > every_n_steps:
            raise ValueError(f"window={window} is more than every_n_steps={every_n_steps}: windows would overlap.")
        for name, values in (("operands", operands), ("include", include), ("exclude", exclude)):
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{name}={values!r} is not a list of names like {list(OPERANDS[:1])}.")
        for operand in operands:
            check_choice("operands", operand, OPERANDS)
        if picture is not None:
            check_choice("picture", picture, MEASURES)
        if format is None and (gradient_format is not None or scaling != "none"):
            raise ValueError(
                f"gradient_format={gradient_format!r} and scaling={scaling!r} of NumericsMonitor go with format, which "
                "is not given."
            )
        self.every_n_steps = every_n_steps
        self.window = window
        self.format = format
        self.gradient_format = gradient_format
        self.scaling = scaling
        self.operands = tuple(operands)
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.log_layers = log_layers
        self.directory = directory
        self.picture = picture
        self.latest: dict[str, float] = {}
        self._taps = self._make_taps()
        self._log = NumericsLog(directory, picture)
        self._wrap: MethodWrap | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._restored: dict[str, Any] | None = None
        self._last_step = 0

    def record(self) -> dict[str, Any]:
        """Return all reports: ``rows`` of layer and operand, ``steps``, and ``values`` of shape (steps, rows, 4).

        The last dimension is underflow, saturation, SQNR in decibels and absmax; not a number where nothing was seen.
        """
        return self._log.record()

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(trainer, self, "it was not tried with weights that are sharded over processes")

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Not the passes that other callbacks add, at weights of their own, nor validations.
            if not self._watched(trainer) or not is_trained_on(trainer) or is_quiet(pl_module):
                return original(*args, **kwargs)
            return self._taps.watch(original, args, kwargs)

        self._undo()
        # Before other callbacks wrap it, in on_fit_start: each of their passes comes through here on its own.
        self._wrap = MethodWrap(pl_module, "training_step", around)
        if self._module is None or self._module() is not pl_module:
            self._log.forget()
            self._module = weakref.ref(pl_module)
        self._restored = None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._log.forget()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The precision plugin has converted its layers by now.
        self._taps.attach(pl_module)
        if not self._taps.rows:
            rank_zero_warn(
                "NumericsMonitor watches nothing in this run: layers are converted, and all their formats are None. "
                "Give SimulatedPrecision a format, or NumericsMonitor one to try, as in format='e4m3'."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        if restored is not None:
            self._log.load_state_dict(restored["log"])
        elif self._log.steps and self._log.steps[-1] > self._done(trainer):
            self._log.forget()  # another fit of the module, which counts its steps from 0 again
        if self._taps.rows:
            self._log.begin(trainer, self._taps.rows)
        else:
            self._log.forget()
        window = None if restored is None else restored.get("window")
        # The statistics of other processes are not in a checkpoint, and those of process 0 count once.
        if window is not None and trainer.global_rank == 0 and len(window) == len(self._taps.rows):
            self._taps.statistics.copy_(window)
            self._taps.seen = True
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # more micro-batches of this step are to come
        before, self._last_step = self._last_step // max(1, len(trainer.optimizers)), trainer.global_step
        self._taps.close()
        done = self._done(trainer)
        if self._taps.rows and done // self.every_n_steps > before // self.every_n_steps:
            self._report(trainer, pl_module, done)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.draw(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"log": self._log.state_dict()} if self._log.rows else {}
        if state and self._taps.seen:
            state["window"] = self._taps.statistics.clone()
        return state

    # ------------------------------------------------------------------ helpers

    def _make_taps(self) -> NumericsTaps:
        """Return the taps, which check format and scaling."""
        quantizers: dict[str, Quantizer] = {}
        try:
            if self.format is not None:
                of_gradients = self.gradient_format or self.format
                formats = {"weights": self.format, "activations": self.format, "gradients": of_gradients}
                quantizers = {operand: Quantizer(formats[operand], scaling=self.scaling) for operand in self.operands}
        except ValueError as error:
            raise ValueError(f"NumericsMonitor: {error}") from error
        return NumericsTaps(self.operands, self.include, self.exclude, quantizers)

    @staticmethod
    def _done(trainer: Trainer) -> int:
        """Return the optimizer steps done, of one optimizer."""
        return trainer.global_step // max(1, len(trainer.optimizers))

    def _watched(self, trainer: Trainer) -> bool:
        """Tell whether the coming optimizer step is among the last of those up to a report."""
        return self._done(trainer) % self.every_n_steps >= self.every_n_steps - self.window

    def _report(self, trainer: Trainer, pl_module: LightningModule, done: int) -> None:
        """Sum up over processes, read the statistics, and tell of them."""
        statistics = self._taps.statistics
        if trainer.world_size > 1:
            # Sums and a maximum by one exchange; all processes have the same from here on.
            statistics = merge_statistics(trainer.strategy.all_gather(statistics))
        statistics = statistics.cpu()
        self._taps.empty(pl_module.device)
        if not bool(statistics.any()):
            return  # steps of which none was watched, or without a forward pass
        found = self._log.add(trainer, done, statistics, self._taps.formats)
        self.latest = summarise(self._taps.rows, found, layers=self.log_layers)
        for logger in trainer.loggers:
            # The host logs what comes of a step under the number of steps before it, of one optimizer.
            logger.log_metrics(self.latest, step=done - 1)

    def _undo(self) -> None:
        """Take hooks, observers and wrap off the module."""
        self._taps.forget()
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_wrap": None, "_module": None, "_taps": self._make_taps()}
