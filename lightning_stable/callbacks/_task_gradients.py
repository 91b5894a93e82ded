"""How large the gradients are that pull a module to its present task, and back to the earlier ones."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_stable._glue.quiet import loss_of, run_training_step
from lightning_stable.callbacks._task_evaluation import TaskEvaluation

__all__ = ["gradient_parts"]


def gradient_parts(
    evaluation: TaskEvaluation, trainer: Trainer, pl_module: LightningModule, present: int, earlier: Sequence[int]
) -> Tensor:
    """Return the norms of the plasticity and the stability part of the gradient, and their cosine.

    The plasticity part is the gradient of the mean loss over the samples of the present task, the stability part that
    over those of the earlier ones. The loss is that of the module's own training step, in evaluation mode.

    Args:
        evaluation: The samples.
        trainer: A Trainer in a fit.
        pl_module: Its module.
        present: The present task.
        earlier: The tasks before it; without any, there is no stability part.

    Returns:
        Of shape (3,), on the module's device; not a number where there is no stability part.

    Raises:
        ValueError: If no parameter trains.
    """
    plasticity = _gradient(evaluation, trainer, pl_module, [present])
    norm = torch.stack(torch._foreach_norm(plasticity)).norm()
    if not earlier:
        return torch.stack([norm, torch.full_like(norm, torch.nan), torch.full_like(norm, torch.nan)])
    stability = _gradient(evaluation, trainer, pl_module, earlier)
    other = torch.stack(torch._foreach_norm(stability)).norm()
    product = torch.stack([part.sum() for part in torch._foreach_mul(plasticity, stability)]).sum()
    return torch.stack([norm, other, product / (norm * other)])


def _gradient(
    evaluation: TaskEvaluation, trainer: Trainer, pl_module: LightningModule, tasks: Sequence[int]
) -> list[Tensor]:
    """Return the gradient of the mean loss over the samples of tasks, of each parameter that trains.

    Gradients of batches are added up, so that no more than one batch's graph is alive.
    """
    parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(
            f"StabilityGap(gradients=True): no parameter of {type(pl_module).__name__} trains, so there is no gradient."
        )
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]

    def add(batch: Any, share: float) -> None:
        loss = loss_of(run_training_step(pl_module, batch))
        if loss is None or not loss.requires_grad:
            return
        # Not backward(): that would add to the gradients of training and start the reduction over processes.
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        known = [(part, gradient) for part, gradient in zip(sums, found, strict=True) if gradient is not None]
        torch._foreach_add_([part for part, _ in known], [gradient.float() for _, gradient in known], alpha=share)

    evaluation.accumulate(trainer, pl_module, tasks, add)
    if trainer.world_size > 1:
        strategy: Any = trainer.strategy
        sums = [strategy.reduce(part, reduce_op="sum") for part in sums]
    return sums
