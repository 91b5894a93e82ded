r"""Sharpness-aware minimisation, for any LightningModule under automatic optimisation.

Use it when a model fits its training data well and generalises badly: it looks for weights whose whole neighbourhood
has a low loss. Where underfitting is the problem, it costs time and buys nothing. Cost: two forward and backward passes
for each optimizer step it acts on, and a copy of the weights and of their perturbation; ``interval`` and
``variant="looksam"`` make it act on some steps only.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import SAM
    >>> trainer = Trainer(callbacks=[SAM(rho=0.05)], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.callbacks._closure import RepeatableStep
from lightning_stable.callbacks._host import (
    gradient_scaler,
    refuse_iterator,
    refuse_manual,
    refuse_optimizer,
    refuse_sharded,
    refuse_unusual_gradient,
)
from lightning_stable.functional._settings import check_choice, check_count, check_positive
from lightning_stable.functional._vectors import global_norm
from lightning_stable.functional.sam import (
    gsam_gradient,
    looksam_component,
    looksam_gradient,
    sam_perturbation,
)

__all__ = ["SAM"]

_ALPHA = {"looksam": 0.7, "gsam": 0.4}


class SAM(Callback):
    r"""Take each step with the gradient at the worst weights nearby (arXiv 2010.01412).

    .. math:: e = \rho\, g / \|g\|_2, \qquad \text{the optimizer sees } \nabla L(w + e) \text{ at } w

    with :math:`g = \nabla L(w)` the gradient of the whole accumulated batch over all tensors that the optimizer trains.
    The host's closure is wrapped, not the optimizer: scaler, clipping, schedules and any torch optimizer keep their
    meaning, and clipping acts on the gradient at :math:`w + e`. The weights are put back from an exact copy. In the
    second pass dropout repeats its masks, and batch statistics, torchmetrics and ``self.log`` are left alone; hooks of
    callbacks run in the first pass only. With accumulation the micro-batches are kept until the step, and all of them
    run again at the perturbed weights.

    Under DDP each process of ``variant="sam"`` climbs along its own unsynchronised gradient, and the gradients at the
    perturbed weights are averaged: one process with as many parts of its batch, each perturbed by itself. The other
    variants compare the two gradients and climb along the average.

    Args:
        rho: Radius :math:`\rho` of the neighbourhood, in the unit of the weights (with ``adaptive`` relative to them,
            where about ten times as much is usual).
        adaptive: Scale the neighbourhood by the size of each weight (ASAM, arXiv 2102.11600).
        interval: Act on every ``interval``-th optimizer step; the steps between are plain, or LookSAM's.
        start_step: First optimizer step it acts on.
        variant: ``"sam"``; ``"looksam"`` (arXiv 2203.02714), which adds to the gradient of the steps between the
            component that the last SAM step found; ``"gsam"`` (arXiv 2203.08065), which takes from the gradient the
            part that lowers the loss at the weights only.
        alpha: LookSAM's weight of the component (default 0.7), or GSAM's of the part taken away (default 0.4).

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, LBFGS, a
            sharded strategy or a training step that takes ``dataloader_iter``; in training for a sparse or
            complex gradient, and for a pass whose gradient is not finite, with the weights as they were.
    """

    # Where each process sees its own gradients, LookSAM's component is its own until the next checkpoint.
    takes_state_of_rank_zero = True

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        start_step: int = 0,
        variant: str = "sam",
        alpha: float | None = None,
    ) -> None:
        check_positive("rho", rho, "the radius of the neighbourhood. Usual values are 0.05, and 0.5 with adaptive=True")
        check_count("interval", interval, 1, "optimizer steps")
        check_count("start_step", start_step, 0, "optimizer steps")
        if variant == "asam":
            raise ValueError("variant='asam' is variant='sam' with adaptive=True.")
        check_choice("variant", variant, ("sam", "looksam", "gsam"))
        if variant == "looksam" and interval < 2:
            raise ValueError(
                f"variant='looksam' reuses a component in the steps between, and interval={interval} leaves none. "
                "Set interval to 2 or more, such as 5."
            )
        if variant == "sam" and alpha is not None:
            raise ValueError(f"alpha={alpha!r} has no meaning for variant='sam'. Leave it out, or choose a variant.")
        if alpha is not None:
            check_positive("alpha", alpha, "a weight. Usual values are 0.7 for 'looksam' and 0.4 for 'gsam'")
        self.rho = rho
        self.adaptive = adaptive
        self.interval = interval
        self.start_step = start_step
        self.variant = variant
        self.alpha = _ALPHA.get(variant) if alpha is None else alpha

        self._module: weakref.ref[LightningModule] | None = None
        self._step: RepeatableStep | None = None
        self._component: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] | None = None
        self._skips_non_finite = False

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_manual(pl_module, self, "its passes are the module's own")
        refuse_sharded(trainer, self, "the norm of the gradient over all processes is not computed")
        refuse_iterator(pl_module, self)
        self._restored = None
        if self._module is None or self._module() is not pl_module:
            self._component = {}
            self._module = weakref.ref(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._component = {}  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._step is not None:
            # In the middle of training: a strategy lets every process go on from the state of one.
            self._component = dict(state_dict["component"])
        else:
            self._restored = dict(state_dict["component"])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_optimizer(trainer, self, torch.optim.LBFGS, "it calls the closure several times a step")
        if self._restored is not None:
            self._component, self._restored = self._restored, None
        # The scaler skips such a step by itself, and so does a callback that says it does.
        self._skips_non_finite = gradient_scaler(trainer) is not None or any(
            getattr(other, "skips_non_finite_updates", False) for other in cast(Any, trainer).callbacks
        )
        if getattr(trainer.strategy.model, "static_graph", False):
            raise ValueError(
                "SAM does not work with DDPStrategy(static_graph=True): its two passes are two graphs. Leave it out."
            )
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            for place, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                names.setdefault(id(parameter), f"parameter {place} of the optimizer")

        def wanted() -> bool:
            # LookSAM has something to do at the steps between, too.
            return trainer.global_step >= self.start_step and (self.variant == "looksam" or self._is_due(trainer))

        def run(step: RepeatableStep, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
            if self._is_due(trainer):
                return self._sharpness_aware(trainer, step, optimizer, closure, names)
            return self._between(optimizer, closure, names)

        self._undo()
        self._step = RepeatableStep(trainer, pl_module, wanted, run)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._step is not None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._step.forget()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"component": dict(self._component)} if self._component else {}

    # ------------------------------------------------------------------ helpers

    def _is_due(self, trainer: Trainer) -> bool:
        """Tell whether the coming optimizer step has two passes, if it is not before the first one."""
        return (trainer.global_step - self.start_step) % self.interval == 0

    def _sharpness_aware(
        self,
        trainer: Trainer,
        step: RepeatableStep,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        names: dict[int, str],
    ) -> Any:
        """Leave the gradient at the perturbed weights, and return the loss at the weights."""
        if self.variant == "sam":
            with step.unsynchronised():
                loss = closure()
        else:
            loss = closure()
        weights, gradients = _trained(optimizer)
        if not weights:
            return loss
        for weight, gradient in zip(weights, gradients, strict=True):
            refuse_unusual_gradient(self, names.get(id(weight), "a parameter"), gradient)
        if not self._is_finite(trainer, loss, gradients, "first"):
            if trainer.world_size > 1:
                step.repeat()  # averaged, so that every process sees it and takes the same decision
            return loss
        perturbation = sam_perturbation(weights, gradients, self.rho, self.adaptive)
        # DDP may keep gradients in buffers that the second pass writes over.
        clean = [] if self.variant == "sam" else [gradient.detach().clone() for gradient in gradients]
        del gradients
        values = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                torch._foreach_add_(weights, perturbation)
            del perturbation
            step.repeat()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, values)
        present = [weight.grad for weight in weights if weight.grad is not None]
        if present and self._is_finite(trainer, loss, present, "second"):
            self._combine(weights, clean, names)
        return loss

    def _between(self, optimizer: Optimizer, closure: Callable[[], Any], names: dict[int, str]) -> Any:
        """Leave the gradient at the weights with LookSAM's component in it, and return the loss."""
        loss = closure()
        weights, gradients = _trained(optimizer)
        known = [
            (gradient, self._component[names[id(weight)]])
            for weight, gradient in zip(weights, gradients, strict=True)
            if names.get(id(weight)) in self._component
        ]
        if known:
            looksam_gradient([g for g, _ in known], [c.to(g) for g, c in known], self.alpha or 0.0)
        return loss

    def _combine(self, weights: list[Tensor], clean: list[Tensor], names: dict[int, str]) -> None:
        """Do what the variant does with the gradient at the perturbed weights and the one at the weights."""
        if self.variant == "sam":
            return
        both = [(w, w.grad, g) for w, g in zip(weights, clean, strict=True) if w.grad is not None]
        gradients, clean = [gradient for _, gradient, _ in both], [gradient for _, _, gradient in both]
        if self.variant == "gsam":
            gsam_gradient(gradients, clean, self.alpha or 0.0)
        else:
            component = looksam_component(gradients, clean)
            pairs = zip(both, component, strict=True)
            self._component = {names[id(w)]: part for (w, _, _), part in pairs if id(w) in names}

    def _is_finite(self, trainer: Trainer, loss: Any, gradients: list[Tensor], which: str) -> bool:
        """Tell whether a pass gave a finite gradient on every process.

        Raises:
            ValueError: If it did not, and nothing in this Trainer skips such an update.
        """
        finite = trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(global_norm(gradients))), all=True)
        if not finite and not self._skips_non_finite:
            value = float(loss) if isinstance(loss, Tensor) else loss
            raise ValueError(
                f"SAM: the gradient of the {which} pass is not finite at optimizer step {trainer.global_step} (the "
                f"loss at the weights is {value}). The weights are as they were before the step. Look for the cause in "
                "the data, the learning rate, the precision or rho; SpikeGuard skips such steps."
            )
        return finite

    def _undo(self) -> None:
        """Take the wraps off the module."""
        if self._step is not None:
            self._step.undo()
            self._step = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None, "_step": None}


def _trained(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of an optimizer that have a gradient, and those gradients."""
    weights = [w for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
    return weights, [weight.grad for weight in weights]
