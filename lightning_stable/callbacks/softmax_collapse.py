r"""Watch for softmax collapse: samples whose loss is exactly 0 in floating point, so that they teach next to nothing.

Use it when training stalls after the training data is fitted, or before choosing
:class:`~lightning_stable.callbacks.OrthoGrad` or a
:class:`~lightning_stable.functional.stablemax.StableMaxCrossEntropyLoss`, which act against it. It changes no bit of
training. Cost: one pass over the logits of one optimizer step in ``log_every_n_steps``.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import SoftmaxCollapseMonitor
    >>> trainer = Trainer(callbacks=[SoftmaxCollapseMonitor()], logger=False, enable_checkpointing=False)
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import is_quiet, loss_of
from lightning_stable.callbacks._closure import is_trained_on
from lightning_stable.callbacks._head import HeadTap
from lightning_stable.callbacks._host import refuse_sharded
from lightning_stable.callbacks._reports import report
from lightning_stable.functional._settings import check_count, parse_floating_dtype
from lightning_stable.functional.softmax_collapse import softmax_collapse

__all__ = ["SoftmaxCollapseMonitor"]

# Logits that are widened at a time: those of a language model are too many for another copy.
_ENTRIES = 1 << 24


class SoftmaxCollapseMonitor(Callback):
    r"""Log the share of samples whose softmax has collapsed onto one class (arXiv 2501.04697).

    A sample has collapsed if :math:`\sum_c \exp(z_c - \max z)` over its logits :math:`z` is exactly 1 in ``dtype``: the
    cross-entropy of the top class and the gradient of its logit are then exactly 0. The share is over all positions of
    all samples of one optimizer step, padding included, and over processes. It goes straight to the Trainer's loggers
    as ``softmax_collapse``. Logits are read by a forward hook within ``training_step``.

    Args:
        logits: Dotted name of the submodule whose output are the logits, of shape (samples, ..., classes), or an
            object that holds them as ``.logits``. ``None``: the last ``nn.Linear`` whose output feeds the loss.
        dtype: Precision in which the softmax is judged: that of the loss, ``"float32"`` under mixed precision too.
        log_every_n_steps: Optimizer steps from one log to the next.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy or an
            unknown submodule; in the first step that is looked at if no head is found.
    """

    def __init__(self, logits: str | None = None, dtype: str = "float32", log_every_n_steps: int = 50) -> None:
        judged_in = parse_floating_dtype(dtype)
        if judged_in is None:
            raise ValueError(f"dtype={dtype!r} is no precision. Choose 'float32', 'bfloat16', 'float16' …")
        check_count("log_every_n_steps", log_every_n_steps, 1, "optimizer steps")
        self.logits = logits
        self.dtype = judged_in
        self.log_every_n_steps = log_every_n_steps
        self._tap = HeadTap(type(self).__name__, logits)
        self._wrap: MethodWrap | None = None
        self._record: list[tuple[str, Any]] | None = None
        self._collapsed: list[Tensor] = []
        self._samples = 0
        self._last_step = 0

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(trainer, self, "it was not tried with weights that are sharded over processes")

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Not the passes that other callbacks add, at weights of their own, nor validations.
            if not self._due(trainer) or not is_trained_on(trainer) or is_quiet(pl_module):
                return original(*args, **kwargs)
            return self._training_step(pl_module, original, args, kwargs)

        self._undo()
        # Before other callbacks wrap it, in on_fit_start: each of their passes comes through here on its own.
        self._wrap = MethodWrap(pl_module, "training_step", around)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tap.attach(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if not trainer.loggers:
            rank_zero_info("SoftmaxCollapseMonitor reports to the Trainer's loggers, and there are none.")

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._record:
            # Manual optimisation: the loss is known within the training step only.
            self._tap.resolve(self._record, loss, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # more micro-batches of this step are to come
        step, self._last_step = self._last_step, trainer.global_step
        if self._collapsed:
            share = torch.stack(self._collapsed).sum() / max(1, self._samples)
            if trainer.world_size > 1:
                share = cast(Tensor, trainer.strategy.reduce(share, reduce_op="mean"))
            report(trainer, {"softmax_collapse": share}, step)
        self._collapsed, self._samples = [], 0

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    # ------------------------------------------------------------------ helpers

    def _due(self, trainer: Trainer) -> bool:
        """Tell whether the coming update is one to look at, or among those that this batch brings."""
        done, coming = trainer.global_step, max(1, len(trainer.optimizers))
        return (done + coming) // self.log_every_n_steps > done // self.log_every_n_steps

    def _training_step(
        self, pl_module: LightningModule, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in for ``training_step``."""
        with self._tap.recording() as record:
            self._record = record
            try:
                output = original(*args, **kwargs)
            finally:
                self._record = None
        loss = loss_of(output)
        if loss is not None and pl_module.automatic_optimization:
            self._tap.resolve(record, loss, pl_module)
        elif not any(name == self._tap.name for name, _ in record):
            return output  # nothing was computed
        self._count(self._tap.logits(record).detach())
        return output

    def _count(self, logits: Tensor) -> None:
        """Count the samples of a batch, and those that have collapsed, without reading the number."""
        parts = torch.split(logits.flatten(0, -2), max(1, _ENTRIES // logits.shape[-1]))
        self._collapsed += [softmax_collapse(part, self.dtype).sum() for part in parts]
        self._samples += logits[..., 0].numel()

    def _undo(self) -> None:
        """Take hooks and wrap off the module."""
        self._tap.detach()
        self._record, self._collapsed, self._samples = None, [], 0
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_wrap": None, "_tap": HeadTap(type(self).__name__, self.logits)}
