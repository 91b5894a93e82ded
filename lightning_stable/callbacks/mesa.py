r"""MESA: memory-efficient sharpness-aware training, for any classifier or language model under automatic optimisation.

Use it as SAM's cheaper relative: it keeps the predictions near those of an average of the weights, which penalises
fast changes of the loss. It needs no dataset indices, so it works on streams. Cost: one forward pass more for each
batch from ``start_epoch`` on, one copy of the weights that train, and one fused pass over them for each step.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import MESA
    >>> trainer = Trainer(callbacks=[MESA(start_epoch=5)], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_stable._glue.batches import eval_mode
from lightning_stable._glue.quiet import QuietPass
from lightning_stable.callbacks._host import refuse_iterator
from lightning_stable.callbacks._loss import LossTerm
from lightning_stable.callbacks._reference import call_with_weights
from lightning_stable.functional.ema import EMAState, check_decay, init_ema, update_ema
from lightning_stable.functional.trajectory_loss import trajectory_loss

__all__ = ["MESA"]


class MESA(LossTerm):
    r"""Add the trajectory loss between an average of the weights and the weights (arXiv 2205.14083).

    .. math:: L \leftarrow L + \lambda\,\tau^2\,\mathrm{mean}_i\,
        \mathrm{KL}\bigl(\mathrm{softmax}(\bar z_i/\tau) \,\|\, \mathrm{softmax}(z_i/\tau)\bigr)

    with :math:`\bar z` the logits of the same batch at :math:`\bar\theta \leftarrow \beta\bar\theta + (1-\beta)\theta`,
    in evaluation mode, without gradient, with the live buffers (batch statistics). The average runs from the first
    step on; the term from ``start_epoch`` on. The module's own ``training_step`` makes the reference, before the live
    pass: it logs nothing, counts no metric, and leaves random numbers and buffers as they were.

    Args:
        logits: Dotted name of the submodule whose output are the logits, of shape (samples, ..., classes), or an
            object that holds them as ``.logits``. ``None``: the last ``nn.Linear`` whose output feeds the loss.
        lam: Weight :math:`\lambda` of the term; 0 switches the callback off.
        temperature: :math:`\tau`.
        start_epoch: First epoch with the term, counted from 0.
        decay: :math:`\beta`, the share of the old average that is kept at each optimizer step, in [0, 1).

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, a sharded
            strategy or an unknown submodule; in the first step if no head is found.
    """

    log_name = "mesa"

    def __init__(
        self,
        logits: str | None = None,
        lam: float = 0.8,
        temperature: float = 5.0,
        start_epoch: int = 5,
        decay: float = 0.9995,
    ) -> None:
        super().__init__(logits=logits, lam=lam, temperature=temperature, start_epoch=start_epoch)
        check_decay("decay", decay)
        self.decay = decay
        self._module: weakref.ref[LightningModule] | None = None
        self._average: dict[str, Tensor] = {}
        self._live: list[Tensor] = []
        self._restored: dict[str, Tensor] | None = None
        self._quiet = QuietPass()

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            refuse_iterator(pl_module, self)
        self._restored = None
        if stage == "fit" and (self._module is None or self._module() is not pl_module):
            self._average = {}
            self._module = weakref.ref(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._average = {}  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict["average"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is not None:
            self._average, self._restored = self._restored, None
        super().on_train_start(trainer, pl_module)
        self._track(pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._track(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._last_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not stepped or not self._average:
            return
        update_ema(EMAState(list(self._average.values()), 0), self._live, self.decay)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self._average)} if self._average else {}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._live, self._quiet = [], QuietPass()

    # ------------------------------------------------------------------ for strategies whose workers differ

    def worker_tensors(self) -> list[Tensor]:
        """Return the average, which is that of the mean weights once it is itself averaged over workers."""
        return list(self._average.values())

    # ------------------------------------------------------------------ the term

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule, step: Callable[[], Any]) -> Any:
        if trainer.current_epoch < self.start_epoch:
            return None
        # Before the live pass: the module's tensors are what the graph of that one is made of.
        with torch.no_grad(), self._quiet(pl_module), eval_mode(pl_module), self._tap.recording() as record:
            call_with_weights(pl_module, self._average, step)
        return record

    @override
    def _term(self, trainer: Trainer, pl_module: LightningModule, logits: Tensor, prepared: Any) -> Tensor | None:
        if prepared is None:
            return None
        reference = self._tap.logits(prepared)
        if reference.shape != logits.shape:
            raise ValueError(
                f"MESA: the logits of {self._tap.name!r} have the shape {tuple(logits.shape)} in training mode and "
                f"{tuple(reference.shape)} in evaluation mode, so they cannot be compared. Name another submodule with "
                "the argument logits."
            )
        return trajectory_loss(reference, logits, self.temperature).mean()

    def _track(self, pl_module: LightningModule) -> None:
        """Put each parameter that trains on this run's device, and begin an average for those that have none."""
        if self.lam == 0:
            return
        live = dict(pl_module.named_parameters())
        self._average = {name: average for name, average in self._average.items() if name in live}
        for name, parameter in live.items():
            if name in self._average and self._average[name].shape == parameter.shape:
                self._average[name] = self._average[name].to(parameter)
            elif parameter.requires_grad and parameter.is_floating_point():
                self._average[name] = init_ema([parameter]).shadow[0]
        self._live = [live[name] for name in self._average]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**super().__getstate__(), "_module": None, "_live": [], "_quiet": QuietPass()}
