r"""LogitSharpness: how much the loss rises in the worst place of a small box around the logits, at every validation.

Use it in training at low precision or at high rates: there the sharpness is reported to rise before a run diverges. It
changes no bit of training. Cost: a few passes over the logits of the last position of each sample, whose forward pass
the validation has made anyway.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import LogitSharpness
    >>> trainer = Trainer(callbacks=[LogitSharpness(logits="head")], logger=False, enable_checkpointing=False)
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import is_quiet
from lightning_stable.callbacks._closure import is_trained_on
from lightning_stable.callbacks._host import refuse_sharded
from lightning_stable.callbacks._output_tap import OutputTap, Targets, find_targets, same_as_inputs
from lightning_stable.callbacks._reports import report
from lightning_stable.functional._settings import check_choice, check_count, check_positive
from lightning_stable.functional.logit_sharpness import POSITIONS, choose_positions, logit_sharpness

__all__ = ["LogitSharpness"]

# Logits that are widened at a time: those of all positions of a text are too many for another copy.
_ENTRIES = 1 << 24


class LogitSharpness(Callback):
    r"""Log the sharpness of the cross-entropy on the logits, :math:`\phi`, in percent (arXiv 2405.18710).

    :math:`\phi = 100 (\max f - f) / (1 + f)`, where :math:`f` is the loss of one position and the maximum is over
    changes of each logit :math:`z_c` by at most :math:`\epsilon (|z_c| + 1)`, in closed form: see
    :mod:`lightning_stable.functional.logit_sharpness`, also for what is unverified. The mean over samples and
    processes is logged at the end of each validation as ``logit_sharpness``, where other callbacks can monitor it.

    Args:
        logits: Dotted name of the submodule whose output are the logits, of shape (samples, classes) or (samples,
            length, classes), or an object, a mapping or a tuple that holds them as ``logits`` or first. ``None``: what
            the module itself returns where its steps call it.
        targets: Where a batch has its classes: a key, a place, a dotted path of both such as ``"batch.labels"``, or a
            function of the batch. ``None``: ``labels`` of a mapping, else the second entry.
        position: ``"last"`` for the last position of each sample that has a target, ``"all"`` for each one.
        shift: Whether logits are of the target at the next position. ``None``: if the targets are the batch's own
            ``input_ids``, as transformers' causal models take them.
        epsilon: Half the width of the box for a logit of 0.
        ignore_index: Target of positions to leave out.
        limit_batches: Batches of each validation that are looked at; ``None`` for all.
        every_n_steps: Look at the training batches of every so many optimizer steps, too, and write the sharpness to
            the Trainer's loggers as ``logit_sharpness_train``; of several optimizers the steps of one count. ``None``
            for never.

    Attributes:
        latest: The sharpness of the last validation; ``None`` before the first.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit or a validation for a sharded
            strategy or an unknown submodule; in the first batch if there are no logits or no targets that fit them.
    """

    def __init__(
        self,
        logits: str | None = None,
        targets: Targets = None,
        position: str = "last",
        shift: bool | None = None,
        epsilon: float = 1e-3,
        ignore_index: int = -100,
        limit_batches: int | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        known = isinstance(targets, (str, int)) or callable(targets)
        if targets is not None and (isinstance(targets, bool) or not known):
            raise ValueError(f"targets={targets!r} is no key, place or function. Give 'labels', 1 or 'batch.labels'.")
        check_choice("position", position, POSITIONS)
        if shift not in (None, True, False):
            raise ValueError(f"shift={shift!r} is not True, False or None, which finds out.")
        check_positive("epsilon", epsilon, "half the width of the box around a logit of 0")
        if limit_batches is not None:
            check_count("limit_batches", limit_batches, 1, "batches")
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, 1, "optimizer steps")
        self.logits = logits
        self.targets = targets
        self.position = position
        self.shift = shift
        self.epsilon = epsilon
        self.ignore_index = ignore_index
        self.limit_batches = limit_batches
        self.every_n_steps = every_n_steps
        self.latest: float | None = None
        self._tap = OutputTap(type(self).__name__, logits)
        self._wraps: list[MethodWrap] = []
        self._shifted = shift
        self._validated: list[Tensor] = []
        self._trained: list[Tensor] = []
        self._open = False
        self._last_step = 0

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        refuse_sharded(trainer, self, "it was not tried with weights that are sharded over processes")

        def validates(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # Within a batch of the host's, and once: not the passes that other callbacks add.
            if not self._open or is_quiet(pl_module):
                return original(*args, **kwargs)
            return self._step(pl_module, self._validated, original, args, kwargs)

        def trains(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._due(trainer, trainer.global_step) or not is_trained_on(trainer) or is_quiet(pl_module):
                return original(*args, **kwargs)
            return self._step(pl_module, self._trained, original, args, kwargs)

        self._undo()
        # Before other callbacks wrap them, in on_fit_start: each of their passes comes through here on its own.
        self._wraps.append(MethodWrap(pl_module, "validation_step", validates))
        if stage == "fit" and self.every_n_steps is not None:
            self._wraps.append(MethodWrap(pl_module, "training_step", trains))
        if stage == "fit":
            self.latest = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tap.attach(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if not trainer.enable_validation and self.every_n_steps is None:
            rank_zero_info(
                "LogitSharpness measures in validation, and this run has none. Give validation data, or every_n_steps "
                "for the training batches."
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._tap.attached:
            self._tap.attach(pl_module)
        self._validated = []

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open = self.limit_batches is None or len(self._validated) < self.limit_batches

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._open = False

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validated, self._validated = self._validated, []
        if trainer.sanity_checking:
            return
        total, positions = self._over_processes(trainer, pl_module, validated).tolist()
        if positions == 0:
            return  # nowhere was there a target
        self.latest = total / positions
        # All processes have the mean already; the host wants to be told that it may be reduced.
        pl_module.log("logit_sharpness", self.latest, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return  # more micro-batches of this step are to come
        step, self._last_step = self._last_step, trainer.global_step
        if self.every_n_steps is None or self._done(trainer, step) == self._done(trainer, trainer.global_step):
            return  # other optimizers are to come
        trained, self._trained = self._trained, []
        if self._due(trainer, step):
            total, positions = self._over_processes(trainer, pl_module, trained)
            report(trainer, {"logit_sharpness_train": total / positions}, step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    # ------------------------------------------------------------------ helpers

    @staticmethod
    def _done(trainer: Trainer, step: int) -> int:
        """Return the steps of one optimizer that are done after so many steps of all."""
        return step // max(1, len(trainer.optimizers))

    def _due(self, trainer: Trainer, step: int) -> bool:
        """Tell whether the step of each optimizer that comes after so many of all is one to look at."""
        every = self.every_n_steps or 1
        return self._done(trainer, step) % every == every - 1

    def _step(
        self,
        pl_module: LightningModule,
        found: list[Tensor],
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stand in for a step of the module, and add what its logits give to what was found."""
        with self._tap.recording(pl_module) as outputs:
            output = original(*args, **kwargs)
        if outputs or output is not None or found is self._validated:
            batch = args[0] if args else next(iter(kwargs.values()))
            found.append(self._judge(self._tap.logits(outputs, pl_module), batch))
        return output

    @torch.no_grad()
    def _judge(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the sum of the sharpness over positions and their number, without reading them."""
        targets = find_targets(type(self).__name__, batch, self.targets)
        if self._shifted is None:
            self._shifted = logits.ndim == 3 and same_as_inputs(batch, targets, self.ignore_index)
        try:
            # Autocast would narrow what is judged.
            with torch.autocast(logits.device.type, enabled=False):
                chosen, classes, present = choose_positions(
                    logits, targets.to(logits.device), self.position, self.ignore_index, shift=self._shifted
                )
                rows = max(1, _ENTRIES // logits.shape[-1])
                parts = zip(torch.split(chosen, rows), torch.split(classes, rows), strict=True)
                sharpness = torch.cat([logit_sharpness(*part, self.epsilon) for part in parts])
        except ValueError as error:
            raise ValueError(f"LogitSharpness, with logits of {self.logits!r}: {error}") from error
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        return torch.stack([torch.where(present, sharpness, 0).sum(dtype=wide), present.sum(dtype=wide)])

    def _over_processes(self, trainer: Trainer, pl_module: LightningModule, found: list[Tensor]) -> Tensor:
        """Return sum and number over batches and processes, which all have to call this."""
        wide = torch.float32 if pl_module.device.type == "mps" else torch.float64
        total = torch.stack(found).sum(0) if found else torch.zeros(2, dtype=wide, device=pl_module.device)
        return cast(Tensor, trainer.strategy.reduce(total, reduce_op="sum")) if trainer.world_size > 1 else total

    def _undo(self) -> None:
        """Take hooks and wraps off the module."""
        self._tap.detach()
        self._validated, self._trained, self._open, self._shifted = [], [], False, self.shift
        for wrap in reversed(self._wraps):
            wrap.undo()
        self._wraps = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_wraps": [], "_tap": OutputTap(type(self).__name__, self.logits)}
