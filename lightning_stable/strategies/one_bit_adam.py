r"""1-bit Adam: for slow links, the module's own Adam with one bit an entry on the wire.

Use it to train with Adam or AdamW where the exchange of gradients takes most of the time, and every step is to stay a
common one: unlike with local steps, all processes hold the same weights after each. The first steps are plain Adam
under plain DDP, which teach it the variance. From ``freeze_step`` on the variance stays, gradients are no longer
exchanged, and signs of the momentum are, in both directions, with what they leave out made up for later. Cost: 1/32 of
DDP's traffic in float32, one copy of the weights on every process for the errors (DDP's own buffers are given back),
and a checkpoint with the errors of all of them.

Not for fp16 with a loss scaler, sharded models, or optimizers other than Adam.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import OneBitAdamStrategy
    >>> strategy = OneBitAdamStrategy(freeze_step=0.2)
    >>> trainer = Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False)
"""

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.functional._horizon import steps_of_each
from lightning_stable.strategies._agreement import take_from_rank_zero
from lightning_stable.strategies._bits import FrozenAdam, steps_made
from lightning_stable.strategies._consolidation import share_states, takes_state_of_rank_zero
from lightning_stable.strategies._ddp_settings import check_ddp_settings
from lightning_stable.strategies._host import callbacks_of
from lightning_stable.strategies._one_bit_checks import check_adam, check_freeze_step, check_precision
from lightning_stable.strategies._rank_state import gather_rank_states, own_rank_state
from lightning_stable.strategies._roll_call import RollCall, name_the_missing, open_roll_call

__all__ = ["OneBitAdamStrategy"]


class OneBitAdamStrategy(DDPStrategy):
    """Drive the module's Adam with plain DDP first and with packed signs of the momentum afterwards (arXiv 2102.02888).

    The module is not changed: it configures ``torch.optim.Adam`` or ``AdamW``, one or several, and that object's
    ``exp_avg``, ``exp_avg_sq`` and ``step`` are used in place. Every process holds the same momentum and the same
    weights after each step. Once the variance is frozen, gradients are each process' own: hooks, callbacks and clipping
    see local ones. The module is taken out of DDP then; buffers still follow rank 0's at each step unless
    ``broadcast_buffers=False``.

    Args:
        freeze_step: Optimizer steps of plain Adam before the variance is frozen; or their share of the run, a number
            between 0 and 1, of a run whose length is known. With several optimizers each has to have made so many.
        timeout: How long an exchange may take before it is an error.
        settings: What :class:`~lightning.pytorch.strategies.DDPStrategy` takes, such as ``process_group_backend``,
            ``start_method`` and the arguments of torch's DDP; not its communication hooks.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for another optimizer, options of
            Adam that it does not know, fp16, or a share of a run of unknown length; in training if parameters are
            added or set to need no gradient, or the variance is changed, after it was frozen.
    """

    def __init__(
        self,
        *,
        freeze_step: int | float = 0.2,
        timeout: timedelta | None = default_pg_timeout,
        **settings: Any,
    ) -> None:
        check_freeze_step(freeze_step)
        check_ddp_settings(type(self).__name__, settings)
        super().__init__(timeout=timeout, **settings)
        self.freeze_step = freeze_step
        self._freeze_at = 0
        self._made: dict[int, int] = {}
        self._frozen: dict[int, FrozenAdam] = {}
        self._loaded: dict[str, Any] | None = None
        self._buffers_due = False
        self._in_training = False
        self._roll_call: RollCall | None = None
        self._warmup_bytes = 0

    @property
    def frozen(self) -> bool:
        """Whether the variance is frozen, and signs are exchanged."""
        return bool(self._frozen)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process has sent in this fit for gradients and momentum: counted, not measured.

        A reduction of DDP counts as a ring, 2 (N - 1) / N of the gradient; buffers and the host's own are left out.
        """
        return self._warmup_bytes + sum(frozen.bytes_sent for frozen in self._frozen.values())

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._of_trainer().state.fn == TrainerFn.FITTING:
            self._loaded = checkpoint.get(type(self).__name__)

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        self._made, self._frozen, self._warmup_bytes, self._buffers_due = {}, {}, 0, False
        check_precision(type(self).__name__, self.precision_plugin)
        super().setup(trainer)
        check_adam(type(self).__name__, self.optimizers)
        self._roll_call = open_roll_call(self)
        if self.world_size == 1:
            rank_zero_info(f"{type(self).__name__}: there is only one process, so it adds nothing to plain Adam.")

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._in_training = True
        self._freeze_at = self._steps_to_freeze()
        self._made = {id(optimizer): steps_made(optimizer) for optimizer in self.optimizers}
        if self.world_size == 1:
            if self._loaded is not None:
                own_rank_state(self._loaded.get("ranks", []), 0, 1, f"{type(self).__name__}: plain Adam goes on")
                self._loaded = None
        elif self._loaded is None:
            self._announce()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        # Between batches: under manual optimisation the module may be inside DDP's forward at its last step.
        if self.world_size > 1 and not self._frozen and self._is_due():
            self._freeze()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._buffers_due:
            self._broadcast_buffers()
        return super().training_step(*args, **kwargs)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        # As under DDP, all validate with the buffers of rank 0.
        if self._buffers_due:
            self._broadcast_buffers()

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        if isinstance(self.model, DistributedDataParallel) and self.model.require_backward_grad_sync:
            reduced = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
            self._warmup_bytes += 2 * (self.world_size - 1) * reduced // self.world_size

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any | None = None,
        **kwargs: Any,
    ) -> Any:
        frozen = self._frozen.get(id(optimizer))
        if frozen is None:
            self._made[id(optimizer)] = self._made.get(id(optimizer), 0) + 1
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        with frozen.own_step():
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._buffers_due = self._broadcasts_buffers()
        return output

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        # All processes have to call it during a fit, as the host does. After it a launcher asks on rank 0 alone.
        if self._frozen and self._in_training and not self._of_trainer().interrupted:
            self._share_callback_states()
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._frozen and "optimizer_states" in checkpoint:
            state: dict[str, Any] = {"learned": [frozen.learned for frozen in self._frozen.values()]}
            # A rank that has failed would keep the others waiting for its part.
            if not self._of_trainer().interrupted:
                errors = [frozen.state_dict() for frozen in self._frozen.values()]
                state["ranks"] = gather_rank_states({"errors": errors})
            checkpoint[type(self).__name__] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        name_the_missing(type(self).__name__, self._roll_call, exception)

    @override
    def teardown(self) -> None:
        # Kept, for a checkpoint after the fit.
        for frozen in self._frozen.values():
            frozen.to_cpu()
        self._loaded, self._buffers_due, self._in_training, self._roll_call = None, False, False, None
        super().teardown()

    # ------------------------------------------------------------------ the freeze

    def _is_due(self) -> bool:
        if self._loaded is not None:
            return True
        if min(self._made.get(id(optimizer), 0) for optimizer in self.optimizers) < self._freeze_at:
            return False
        # A call may have been no step, without a gradient. A resumed run only sees what Adam itself has counted.
        self._made = {id(optimizer): steps_made(optimizer) for optimizer in self.optimizers}
        return min(self._made.values()) >= self._freeze_at

    def _freeze(self) -> None:
        name = type(self).__name__
        loaded, self._loaded = self._loaded, None
        learned = [None] * len(self.optimizers) if loaded is None else loaded["learned"]
        self._frozen = {
            id(optimizer): FrozenAdam(name, optimizer, steps)
            for optimizer, steps in zip(self.optimizers, learned, strict=True)
        }
        if loaded is not None:
            self._load_errors(loaded)
        # Out of DDP: gradients stay local in every kind of step, and its buffers are given back.
        self.model = self.lightning_module
        self._buffers_due = self._broadcasts_buffers()
        waiting = sum(frozen.waiting for frozen in self._frozen.values())
        if waiting:
            rank_zero_warn(
                f"{name}: {waiting} parameter(s) had no gradient while the variance was learned. They have none and "
                "stay as they are from now on. Put freeze_step behind the step at which they begin to train."
            )
        per_step = sum(frozen.bytes_per_step for frozen in self._frozen.values())
        when = "stays frozen, as it was saved" if loaded else f"is frozen after {min(self._made.values())} steps"
        rank_zero_info(f"{name}: the variance {when}. From now on each process sends {per_step / 1e6:.3g} MB a step.")

    def _load_errors(self, loaded: dict[str, Any]) -> None:
        name = type(self).__name__
        if "ranks" not in loaded:
            rank_zero_warn(
                f"{name}: the checkpoint was made while a fit broke off, without what each process had not sent yet. "
                "That begins anew."
            )
            return
        own = own_rank_state(loaded["ranks"], self.global_rank, self.world_size, name)
        if own is not None:
            for frozen, errors in zip(self._frozen.values(), own["errors"], strict=True):
                frozen.load_state_dict(errors)

    def _announce(self) -> None:
        name, total = type(self).__name__, self._steps_in_all()
        if total is not None and self._freeze_at >= total:
            rank_zero_warn(
                f"{name}: freeze_step={self.freeze_step} is {self._freeze_at} steps, and the run ends after "
                f"{total:g}: all of it is plain Adam under DDP. Give a smaller freeze_step."
            )
            return
        rank_zero_info(f"{name}: plain Adam under DDP for {self._freeze_at} steps, then signs of the momentum.")

    def _steps_to_freeze(self) -> int:
        if not isinstance(self.freeze_step, float):
            return self.freeze_step
        total = self._steps_in_all()
        if total is None:
            raise ValueError(
                f"{type(self).__name__}(freeze_step={self.freeze_step}) is a share of a run that has no end, or whose "
                "loader has no length. Set max_steps, or max_epochs where the loader has a length, or give "
                "freeze_step as a number of optimizer steps."
            )
        return max(1, math.ceil(self.freeze_step * total))

    def _steps_in_all(self) -> float | None:
        """Return how many steps each optimizer makes, ``None`` where the host does not know."""
        trainer = self._of_trainer()
        return steps_of_each(trainer.estimated_stepping_batches, trainer.max_steps, len(self.optimizers))

    # ------------------------------------------------------------------ what DDP did

    def _broadcasts_buffers(self) -> bool:
        return bool(self._ddp_kwargs.get("broadcast_buffers", True)) and any(True for _ in self._module().buffers())

    def _broadcast_buffers(self) -> None:
        """Take rank 0's buffers, once for each optimizer step, as DDP does."""
        self._buffers_due = False
        take_from_rank_zero(list(self._module().buffers()))

    def _share_callback_states(self) -> None:
        """Go on with rank 0's state of callbacks that saw local gradients: it is the one that is saved."""
        asking = [callback for callback in callbacks_of(self._of_trainer()) if takes_state_of_rank_zero(callback)]
        share_states(
            asking, lambda make: self.broadcast(make() if self.is_global_zero else None), rank=self.global_rank
        )

    def _module(self) -> LightningModule:
        return cast(LightningModule, self.lightning_module)

    def _of_trainer(self) -> Trainer:
        return self._module().trainer
