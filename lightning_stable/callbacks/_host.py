"""Small pieces of glue to the host: a callback's place among the others, and what it cannot work with."""

import inspect
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "gradient_scaler",
    "refuse_company",
    "refuse_iterator",
    "refuse_manual",
    "refuse_optimizer",
    "refuse_sharded",
    "refuse_unusual_gradient",
    "run_first",
    "run_last",
]


def run_first(trainer: Trainer, callback: Callback) -> None:
    """Let ``callback`` run before the others, so that they see its result at each hook.

    The list is replaced, not changed: the host is iterating over the old one when ``setup`` calls this.
    """
    host = cast(Any, trainer)
    host.callbacks = [callback, *(other for other in host.callbacks if other is not callback)]


def run_last(trainer: Trainer, callback: Callback) -> None:
    """Let ``callback`` run after the others, so that what it saves holds their state of this step."""
    host = cast(Any, trainer)
    host.callbacks = [*(other for other in host.callbacks if other is not callback), callback]


def refuse_company(trainer: Trainer, callback: Callback, others: tuple[type[Callback], ...], why: str) -> None:
    """Raise ``ValueError`` if another callback of one of the classes ``others`` is in the Trainer."""
    for other in cast(Any, trainer).callbacks:
        if other is not callback and isinstance(other, others):
            raise ValueError(
                f"{type(callback).__name__} and {type(other).__name__} are both among the Trainer's callbacks: {why}. "
                "Keep one of them."
            )


def refuse_sharded(trainer: Trainer, callback: Callback, why: str) -> None:
    """Raise ``ValueError`` if the weights are sharded over processes."""
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
            f"{type(callback).__name__} does not work with {type(trainer.strategy).__name__}: {why}. Use a strategy "
            "that keeps whole weights, such as 'ddp' or a single device."
        )


def refuse_manual(pl_module: LightningModule, callback: Callback, why: str) -> None:
    """Raise ``ValueError`` if the module steps its optimizers itself."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"{type(callback).__name__} does not work with manual optimisation, which {type(pl_module).__name__} asks "
            f"for (automatic_optimization=False): {why}. Return the loss from training_step, with one optimizer."
        )


def refuse_iterator(pl_module: LightningModule, callback: Callback) -> None:
    """Raise ``ValueError`` if the module's training step takes an iterator, which gives each batch once."""
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            f"{type(callback).__name__} runs batches a second time, and {type(pl_module).__name__}.training_step takes "
            "dataloader_iter, which gives each once. Let it take batch and batch_idx."
        )


def refuse_optimizer(trainer: Trainer, callback: Callback, kind: type[Optimizer], why: str) -> None:
    """Raise ``ValueError`` if one of the optimizers is of this kind."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, kind):
            raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
                f"{type(callback).__name__} does not work with {type(optimizer).__name__}: {why}. Use an optimizer "
                "that takes one gradient a step, such as SGD or AdamW."
            )


def refuse_unusual_gradient(callback: Callback, name: str, gradient: Tensor) -> None:
    """Raise ``ValueError`` if a gradient is sparse or complex."""
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{type(callback).__name__} does not work with sparse gradients, and that of {name!r} is one. Build the "
            "embedding with sparse=False."
        )
    if gradient.is_complex():
        raise ValueError(
            f"{type(callback).__name__} does not work with complex gradients, and that of {name!r} is one. Keep the "
            "parameter as two real ones, as torch.view_as_real gives them."
        )


def gradient_scaler(trainer: Trainer) -> Any:
    """Return the gradient scaler of a run in half precision, ``None`` in every other run."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
