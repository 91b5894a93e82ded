"""What every callback that changes gradients shares: when it acts, on which parameters, and whose state it keeps."""

import weakref
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_stable.callbacks._host import gradient_scaler, refuse_optimizer, refuse_sharded, refuse_unusual_gradient

__all__ = ["GradientTransform", "OptimizerStep"]


class OptimizerStep(NamedTuple):
    """One optimizer step that is about to be taken.

    Attributes:
        trainer: The Trainer.
        module: Its module.
        optimizer: The optimizer.
        key: Its place among the Trainer's optimizers, as a string.
        parameters: Those of its parameters that have a gradient, by their name in the module.
    """

    trainer: Trainer
    module: LightningModule
    optimizer: Optimizer
    key: str
    parameters: dict[str, Tensor]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients, in the order of ``parameters``."""
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def name(self, name: str) -> str:
        """Return the name of a value that is logged; where there are several optimizers, it ends in which one."""
        return f"{name}/{self.key}" if len(self.trainer.optimizers) > 1 else name


class GradientTransform(Callback, ABC):
    """Change the gradients of each optimizer step: accumulated, unscaled, synchronised, and not yet clipped.

    A subclass says how (:meth:`_transform`), and forgets what it knows in :meth:`reset`. What it knows goes on over
    several fits of the same module and starts anew with another module. Several optimizers, which the host has under
    manual optimisation, are treated one by one.
    """

    def __init__(self) -> None:
        self._module: weakref.ref[LightningModule] | None = None
        self._names: dict[int, str] = {}
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _transform(self, step: OptimizerStep) -> None:
        """Change the gradients of one step, in place; called only if there are some."""

    def reset(self) -> None:
        """Forget what was learnt from gradients: the next fit starts anew."""

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for a fit, after the optimizers have their state of a checkpoint."""

    def _finish(self, trainer: Trainer) -> None:
        """Leave the Trainer as it was, at the end of a fit or after a failure; may be called again."""

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(trainer, self, "its gradients are sharded over processes")
        if self._module is None or self._module() is not pl_module:
            self.reset()
            self._module = weakref.ref(pl_module)
        self._restored, self._names = None, {}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.reset()  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._names:
            # In the middle of training: a strategy lets every process go on from the state of one.
            self._take_over(state_dict)
        else:
            self._restored = state_dict

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_optimizer(trainer, self, LBFGS, "it calls the closure several times a step")
        for optimizer in trainer.optimizers:
            if gradient_scaler(trainer) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise ValueError(
                    f"{type(self).__name__} does not work with a {type(optimizer).__name__} that unscales gradients "
                    "itself: they would still be scaled here. Build the optimizer with fused=False, or train with "
                    "precision='bf16-mixed'."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        if self._restored is not None:
            self._take_over(self._restored)
            self._restored = None
        self._begin(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        key = str(next(place for place, other in enumerate(trainer.optimizers) if other is optimizer))
        named = self._named_parameters(pl_module, optimizer, key)
        parameters = {name: parameter for name, parameter in named.items() if parameter.grad is not None}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                refuse_unusual_gradient(self, name, parameter.grad)
        if parameters:
            self._transform(OptimizerStep(trainer, pl_module, optimizer, key, parameters))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer)
        self._names = {}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._names = {}

    # ------------------------------------------------------------------ helpers

    def _named_parameters(self, pl_module: LightningModule, optimizer: Optimizer, key: str) -> dict[str, Tensor]:
        """Return all parameters of an optimizer by name; those that are not the module's, by their place."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(id(parameter) not in self._names for parameter in parameters):
            # Added since the fit began, or not the module's.
            self._names |= {id(parameter): name for name, parameter in pl_module.named_parameters()}
        return {
            self._names.get(id(parameter), f"optimizer {key} parameter {place}"): parameter
            for place, parameter in enumerate(parameters)
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None, "_names": {}}
