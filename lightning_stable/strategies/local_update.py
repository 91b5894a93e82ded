r"""The base of the strategies whose workers make steps of their own between two exchanges of their weights.

A subclass says what step is taken with the workers' mean movement; the rest is here: rounds, warm-up, blocking and
delayed exchanges, and the moments at which all workers have to be at one place. After each round of ``local_steps``
optimizer steps the workers exchange how far they have moved from where the round began:

- a blocking exchange takes the outer step at once, and every worker goes on from its result;
- a delayed one travels during the next round. At that round's end the outer step is taken with what has arrived, and
  the worker goes on from the result (variant "paper": its own last round is overwritten, and comes back with the mean
  a round later) or from the result plus its own last round (variant "corrected", ours).

Validation inside a fit sees the mean of the workers' weights, and leaves training as it was. A checkpoint, and the end
of the fit, is the end of a round: what travels is awaited, weights, buffers and the optimizers' state are averaged, and
training goes on from exactly that, so a resumed run equals the uninterrupted one. In between nothing ties the workers
together: the host's broadcast at every batch is set aside, and SIGTERM is passed on with the exchanges.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.strategies import _consolidation
from lightning_stable.strategies._agreement import agree_on_model
from lightning_stable.strategies._batch_norm import reestimate_batch_norm
from lightning_stable.strategies._expectations import warn_of_plan
from lightning_stable.strategies._gradients import average_gradients
from lightning_stable.strategies._host import AtTrainEnd, UntiedWorkers, callbacks_of
from lightning_stable.strategies._local_update_checks import (
    check_callbacks,
    check_module,
    check_optimizers,
    check_precision,
    check_rounds,
    check_settings,
    check_unfrozen,
    trained_names,
    trained_parameters,
)
from lightning_stable.strategies._mean_weights import MeanWeights
from lightning_stable.strategies._outer_state import outer_state_dict, restore
from lightning_stable.strategies._pace import MEASURED_STEPS, Pace
from lightning_stable.strategies._progress import Progress
from lightning_stable.strategies._rank_state import on_cpu
from lightning_stable.strategies._rounds import Rounds
from lightning_stable.strategies._workers import Workers, node_size

__all__ = ["LocalUpdateStrategy"]

_CHECKPOINT = "a checkpoint"


class LocalUpdateStrategy(DDPStrategy, ABC):
    """Base of the strategies with local steps.

    Args:
        local_steps: Optimizer steps of a round; or pairs (first step, local steps), of which the last one reached when
            a round begins holds; or "auto" if delayed: 12 synchronous steps are timed, and the fewest that hide an
            exchange are taken.
        delayed: An exchange travels during the next round, instead of being waited for.
        variant: What a worker goes on from after a delayed exchange: "paper" or "corrected".
        workers: What makes steps of its own: a "process", or a "node" whose processes average gradients at each step.
        comm_dtype: Precision of what is sent: ``None`` for that of the weights (at least float32), or "bfloat16".
        warmup_steps: So many synchronous steps come first: gradients are averaged over all workers.
        final_merge: At the end BatchNorm's statistics are estimated anew, over up to 100 batches of a worker's data.
        timeout: How long an exchange may take before the ranks that are there end with an error.
        settings: ``process_group_backend``, ``start_method`` and, with workers="node", the arguments of torch's DDP.
    """

    def __init__(
        self,
        *,
        local_steps: int | list[tuple[int, int]] | Literal["auto"],
        delayed: bool,
        variant: Literal["paper", "corrected"] = "corrected",
        workers: Literal["process", "node"] = "process",
        comm_dtype: Literal["bfloat16"] | None = None,
        warmup_steps: int = 0,
        final_merge: bool = False,
        timeout: timedelta = default_pg_timeout,
        **settings: Any,
    ) -> None:
        check_settings(type(self).__name__, settings, workers)
        super().__init__(timeout=timeout, **settings)
        check_rounds(
            local_steps,
            delayed=delayed,
            variant=variant,
            workers=workers,
            warmup_steps=warmup_steps,
            comm_dtype=comm_dtype,
            timeout=timeout,
            final_merge=final_merge,
        )
        self.local_steps = local_steps
        self.delayed = delayed
        self.variant = variant
        self.workers = workers
        self.comm_dtype = comm_dtype
        self.warmup_steps = warmup_steps
        self.final_merge = final_merge
        self._groups: Workers | None = None
        self._rounds: Rounds | None = None
        self._limit = timeout
        self._message_dtype = torch.bfloat16 if comm_dtype else None
        self._untied: UntiedWorkers
        self._finisher: Callback | None = None
        self._loaded: dict[str, Any] | None = None
        self._pace: Pace | None
        self._start_anew()

    # ------------------------------------------------------------------------------------------- the outer step

    @abstractmethod
    def init_outer(self, anchor: list[Tensor]) -> Any:
        """Return the state of the outer step: a NamedTuple of tensors and of lists of tensors.

        Args:
            anchor: The weights that all workers share, one flat tensor for each precision.
        """

    @abstractmethod
    def update_outer(self, state: Any, anchor: list[Tensor], delta: list[Tensor], learning_rate: Any) -> Any:
        """Take one outer step on the anchor, in place, and return the new state.

        Args:
            state: The state of the outer step.
            anchor: The weights that all workers share.
            delta: The mean over the workers of start minus end of a round; may be overwritten.
            learning_rate: That of the first parameter group at the last local step of the round of ``delta``, as the
                optimizer keeps it.
        """

    # ------------------------------------------------------------------------------------------- the host's hooks

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._loaded = checkpoint.get(type(self).__name__, {})

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        check_optimizers(type(self).__name__, self.optimizers, timed=self.local_steps == "auto")
        if self._groups is None:
            rank_zero_info(f"{type(self).__name__}: there is only one worker, so it adds nothing to plain training.")
            return
        check_callbacks(type(self).__name__, callbacks_of(trainer))
        rank_zero_info(f"{type(self).__name__}: {self._groups.count} workers, local_steps={self.local_steps}.")
        self._untied = UntiedWorkers(trainer, self._groups, self.root_device)
        # First among the callbacks: what they do at the end of training is done to the averaged weights.
        self._finisher = AtTrainEnd(self.finish)
        callbacks_of(trainer).insert(0, self._finisher)

    @override
    def configure_ddp(self) -> None:
        name, module = type(self).__name__, self._module
        check_module(name, module, final_merge=self.final_merge)
        check_precision(name, self.precision_plugin)
        size = 1 if self.workers == "process" else node_size(name, self.world_size, self.num_nodes)
        if self.world_size == size:
            if self.world_size > 1:
                super().configure_ddp()
            return
        host = "localhost" if self.cluster_environment is None else self.cluster_environment.main_address
        self._groups = Workers(name, size, self._limit, host, self.root_device)
        agree_on_model(module, self._groups)
        if self._groups.node_group is not None:
            self._ddp_kwargs["process_group"] = self._groups.node_group
            super().configure_ddp()

    @override
    def on_train_start(self) -> None:
        self._start_anew()
        if self._groups is None:
            return
        parameters, self._trained = trained_parameters(self._module), trained_names(self._module)
        keep_own = self.variant == "corrected"
        self._rounds = Rounds(
            parameters, self, self._groups, delayed=self.delayed, keep_own=keep_own, message_dtype=self._message_dtype
        )
        loaded, self._loaded = self._loaded, None
        restore(loaded, self._progress, self._rounds, type(self).__name__)
        self._groups.finished_rounds = self._progress.finished_rounds
        if self.local_steps == "auto" and self._progress.chosen_steps == 0:
            self._progress.extend_warmup(MEASURED_STEPS)
            self._pace = Pace(parameters, self._groups, self._message_dtype)
        warn_of_plan(type(self).__name__, self.local_steps, self._progress.warmup_steps, self._trainer)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        if not self._module.automatic_optimization:
            # The module may hold graphs over the weights until its step is over.
            self._after_step()
        return output

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if self._rounds is None or self._groups is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._progress.warming_up:
            closure = partial(self._synchronously, self._groups, optimizer, closure)
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if not self._progress.moved:
            # Told at once, and not when the first checkpoint is due.
            _consolidation.optimizer_tensors(self.optimizers, type(self).__name__)
        self._progress.count(self.optimizers.index(optimizer))
        if self._module.automatic_optimization:
            self._after_step()
        return output

    @override
    def on_validation_start(self) -> None:
        if self._rounds is None or self._groups is None or not self._progress.moved:
            return
        self._groups.position = f"the mean of the weights for the validation after step {self._progress.steps}"
        kept = _consolidation.alike_tensors(self._module, callbacks_of(self._trainer), self._groups)
        self._mean_weights.put_in([*trained_parameters(self._module), *kept], self._groups)

    @override
    def on_validation_end(self) -> None:
        self._mean_weights.put_back()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._consolidate(_CHECKPOINT)
        return super().lightning_module_state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # What only holds weights is not gone on from.
        if "optimizer_states" in checkpoint and (state := self._own_state()):
            checkpoint[type(self).__name__] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self._progress.saved = filepath, self._progress.steps

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._is_alone else self._named("a reduction", super().reduce, tensor, group, reduce_op)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._is_alone else self._named("a broadcast", super().broadcast, obj, src)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_alone:
            self._named("a barrier", super().barrier, *args, **kwargs)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._mean_weights.put_back()
        if self._rounds is not None:
            self._rounds.abandon()
        if self._finisher is not None:
            self._untied.explain_the_end(exception, self._progress)
        self._release()

    @override
    def teardown(self) -> None:
        self._release()
        self._loaded = None
        super().teardown()

    # ------------------------------------------------------------------------------------------- rounds

    @property
    def finished_rounds(self) -> int:
        """How many rounds of the fit have ended with an exchange."""
        return self._progress.finished_rounds

    def finish(self) -> None:
        """Bring all workers to one place, for good: the last step has been made."""
        self._consolidate("the end of training")
        if self._rounds is not None:
            rank_zero_info(f"{type(self).__name__}: {self._progress.summary()}")
        if self.final_merge and self._groups is not None:
            reestimate_batch_norm(self._trainer, self._module, self._groups)

    def _synchronously(self, groups: Workers, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        output = closure()
        if self._pace is not None:
            self._pace.end_step()
        groups.position = f"the mean of the gradients of step {self._progress.steps + 1}"
        self._untied.pass_on(wait=False)
        average_gradients(optimizer, groups)
        if self._pace is not None:
            self._pace.begin_step()
        return output

    def _after_step(self) -> None:
        if self._rounds is None or self._groups is None:
            return
        if self._progress.warmup_is_over:
            if self._pace is not None:
                self._progress.chosen_steps = self._pace.choose(self._groups, self._trainer)
                self._pace = None
            self._progress.begin_round()
            self._rounds.restart()
        elif self._progress.round_is_over:
            self._finish_round(self._groups, self._rounds)
        if self._untied.heard:
            # All ranks are at one place, for the last time: what is saved on the way out is of them all.
            self._consolidate("the end by SIGTERM")

    def _finish_round(self, groups: Workers, rounds: Rounds) -> None:
        check_unfrozen(type(self).__name__, self._trained, self._module)
        progress = self._progress
        groups.position = f"the exchange after round {progress.finished_rounds + 1}, at step {progress.steps},"
        self._untied.pass_on(wait=not self.delayed)
        rounds.finish_round(copy.deepcopy(self.optimizers[0].param_groups[0].get("lr")))
        if not self.delayed:
            groups.mean(_consolidation.float_buffers(self._module))
        progress.begin_round()
        progress.finished_rounds += 1
        groups.finished_rounds = progress.finished_rounds

    def _consolidate(self, reason: str) -> None:
        """Bring all workers to one place, from which a resumed run goes on alike; a rank that failed stays alone."""
        progress, groups, rounds = self._progress, self._groups, self._rounds
        if rounds is None or groups is None or not progress.moved or self._trainer.interrupted:
            return
        callbacks = callbacks_of(self._trainer)
        _consolidation.refuse_foreign_weights(callbacks, type(self).__name__)
        check_unfrozen(type(self).__name__, self._trained, self._module)
        self._mean_weights.put_back()
        groups.position = f"the mean of the weights for {reason} at step {progress.steps}"
        self._untied.pass_on(wait=True)
        if progress.warming_up:
            rounds.restart()
        else:
            rounds.consolidate()
        _consolidation.bring_together(self._module, self.optimizers, self.precision_plugin, callbacks, groups)
        progress.come_together(saving=reason == _CHECKPOINT)

    # ------------------------------------------------------------------------------------------- state

    def _own_state(self) -> dict[str, Any]:
        if self._rounds is None:
            return self._kept
        return {**self._progress.state_dict(), "outer": outer_state_dict(self._rounds.state, self._rounds.lengths)}

    def _start_anew(self) -> None:
        self._progress = Progress(self.local_steps, self.warmup_steps)
        self._mean_weights = MeanWeights()
        self._pace = None
        self._kept: dict[str, Any] = {}

    def _release(self) -> None:
        """Give back what a fit held of the host and of the processes."""
        if self._rounds is not None:
            state, self._rounds = self._own_state(), None  # the buffers go before the state is copied
            self._kept = on_cpu(state)
        if self._finisher is not None:
            self._untied.restore()
            callbacks_of(self._trainer).remove(self._finisher)
            self._finisher = None
        if self._groups is not None:
            self._ddp_kwargs.pop("process_group", None)
            self._groups.close()
            self._groups = None

    # ------------------------------------------------------------------------------------------- where this runs

    @property
    def _is_alone(self) -> bool:
        """This rank has failed: it would wait for others that may never come."""
        return self._rounds is not None and bool(self._trainer.interrupted)

    def _named(self, what: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._groups is None else self._groups.guard(f"{what} of the host"):
            return collective(*args, **kwargs)

    @property
    def _module(self) -> LightningModule:
        if self.lightning_module is None:
            raise RuntimeError(f"{type(self).__name__} is not connected to a module: give it to a Trainer.")
        return self.lightning_module

    @property
    def _trainer(self) -> Trainer:
        return self._module.trainer
