"""What callbacks that add a differentiable term to the training loss share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import is_quiet, loss_of
from lightning_stable.callbacks._closure import is_trained_on, may_repeat, repeated_batch
from lightning_stable.callbacks._head import HeadTap
from lightning_stable.callbacks._host import refuse_manual, refuse_sharded
from lightning_stable.functional._settings import check_count, check_not_negative, check_positive

__all__ = ["LossTerm"]


class LossTerm(Callback, ABC):
    r"""Add ``lam`` times a term on the logits to the loss that ``training_step`` returns.

    The method is wrapped on the instance for the length of a fit. The term joins the loss, so precision, accumulation,
    clipping and DDP apply to it as to the rest. A subclass computes the term (:meth:`_term`), and may look at the
    training step before it runs (:meth:`_prepare`); its public arguments are documented there.
    """

    # What the logged value is called, with "_loss" after it.
    log_name: str

    def __init__(self, *, logits: str | None, lam: float, temperature: float, start_epoch: int) -> None:
        check_not_negative("lam", lam, "the weight of the term in the loss")
        check_positive("temperature", temperature, "what the logits are divided by")
        check_count("start_epoch", start_epoch, 0, "epochs")
        self.logits = logits
        self.lam = lam
        self.temperature = temperature
        self.start_epoch = start_epoch
        self._tap = HeadTap(type(self).__name__, logits)
        self._wrap: MethodWrap | None = None
        # What was prepared for the micro-batches of this optimizer step, for when one of them runs again.
        self._prepared: list[Any] = []
        self._last_step = 0

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _term(self, trainer: Trainer, pl_module: LightningModule, logits: Tensor, prepared: Any) -> Tensor | None:
        """Return the term without its weight, a scalar; ``None`` where there is none yet."""

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        """Do what has to come before the training step, which ``step`` runs; what is returned reaches :meth:`_term`.

        Where a step is run again, at other weights, that is what was returned the first time.
        """
        return None

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_manual(pl_module, self, "there is no returned loss to add a term to")
            refuse_sharded(trainer, self, "it was not tried with weights that are sharded over processes")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._undo()
        if self.lam == 0:
            return  # nothing to add, so nothing to compute either
        self._tap.attach(pl_module)

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._training_step(trainer, pl_module, original, args, kwargs)

        self._wrap = MethodWrap(pl_module, "training_step", around)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepared, self._last_step = [], trainer.global_step
        last = _last_epoch(trainer)
        if self.lam != 0 and last < self.start_epoch and not cast(Any, trainer).fast_dev_run:
            rank_zero_warn(
                f"{type(self).__name__} will add nothing: start_epoch={self.start_epoch}, and training ends in epoch "
                f"{last}, counted from 0. Set start_epoch lower, or train longer."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._prepared = []  # what an epoch that was cut within a step has left

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:
            self._prepared, self._last_step = [], trainer.global_step

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    # ------------------------------------------------------------------ helpers

    def _training_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stand in for ``training_step``."""
        again = repeated_batch(pl_module)
        # Neither another callback's own pass nor a validation that calls the training step has a loss to add to.
        if not is_trained_on(trainer) or (again is None and is_quiet(pl_module)):
            return original(*args, **kwargs)
        if again is None:
            prepared = self._prepare(trainer, pl_module, lambda: original(*args, **kwargs))
            if may_repeat(pl_module):
                self._prepared.append(prepared)
        else:
            prepared = self._prepared[again]
        with self._tap.recording() as record:
            output = original(*args, **kwargs)
        loss = loss_of(output)
        if loss is None:
            return output  # a skipped step, or what the host refuses
        self._tap.resolve(record, loss, pl_module)
        logits = self._tap.logits(record)
        if logits.shape[-1] < 2:
            raise ValueError(
                f"{type(self).__name__}: the logits of {self._tap.name!r} have the shape {tuple(logits.shape)}, and a "
                "distribution over one class cannot change. Name a submodule with an output for each of several "
                "classes, classes last, with the argument logits."
            )
        term = self._term(trainer, pl_module, logits, prepared)
        if term is None:
            return output
        term = self.lam * term
        pl_module.log(f"{self.log_name}_loss", term.detach(), on_step=True, on_epoch=False, sync_dist=True)
        total = loss + term
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _undo(self) -> None:
        """Take hooks and wrap off the module."""
        self._tap.detach()
        self._prepared = []
        if self._wrap is not None:
            self._wrap.undo()
            self._wrap = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_wrap": None, "_tap": HeadTap(type(self).__name__, self.logits)}


def _last_epoch(trainer: Trainer) -> float:
    """Return the epoch, counted from 0, in which training will end at the latest; infinity if that is not known."""
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    batches = float(trainer.num_training_batches)
    if trainer.max_steps >= 0 and 0 < batches < math.inf:
        epochs = min(epochs, math.ceil(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches)))
    return epochs - 1
