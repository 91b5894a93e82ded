"""The diagonal of the empirical Fisher information, from the module's own training step.

Where the loss of a sample is its negative log-likelihood, the mean over samples of the squared gradient is the diagonal
of the empirical Fisher information: how fast the likelihood of the data changes with each weight.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_stable._glue.batches import eval_mode
from lightning_stable._glue.progress import progress
from lightning_stable._glue.quiet import QuietPass, loss_of, run_training_step

__all__ = ["fisher_diagonal"]


def fisher_diagonal(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: Iterable[Any],
    names: Sequence[str],
    *,
    weighted: bool = False,
    quiet: QuietPass,
) -> dict[str, Tensor]:
    """Return the mean over samples of the squared gradient of each sample's loss.

    The module's own ``training_step`` runs in evaluation mode, under the run's precision, recurrent parts without their
    dropout, since they go backward in training mode alone on some devices; it logs nothing, counts no
    metric, and leaves buffers, random numbers and gradients as they were. Gradients are taken apart from those of
    training, so that nothing of them reaches ``.grad`` or the hooks of DDP. All processes have to call this; the mean
    is over the samples of all of them, and equal on all.

    Args:
        trainer: A Trainer in a fit.
        pl_module: Its module, under automatic optimisation.
        batches: Batches of one sample each, on the module's device.
        names: Names of parameters of the module; those that are frozen or not used get 0.
        weighted: Multiply each squared gradient by ``exp(-loss)``, the likelihood of the sample's target.
        quiet: The caller's quiet pass.

    Returns:
        By name, in float32 or wider, on each parameter's device; 0 where there is no sample.
    """
    live = dict(pl_module.named_parameters())
    sums = {name: torch.zeros_like(live[name], dtype=_wide(live[name])) for name in names}
    trained = [name for name in names if live[name].requires_grad]
    parameters = [live[name] for name in trained]
    count = 0
    with torch.enable_grad(), quiet(pl_module), eval_mode(pl_module), _recurrent_parts(pl_module):
        for batch in progress(trainer, batches, "Fisher information of the task"):
            count += 1
            with trainer.precision_plugin.train_step_context():
                loss = loss_of(run_training_step(pl_module, batch))
            if loss is None or not loss.requires_grad or not parameters:
                continue  # a skipped sample, which says nothing of any weight
            # Not backward(): that would add to the gradients of training and start the reduction over processes.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            likelihood = (-loss.detach().to(_wide(loss))).exp() if weighted else None
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    square = gradient.detach().to(sums[name].dtype).square()
                    sums[name] += square if likelihood is None else square * likelihood.to(square)
    total = trainer.strategy.reduce(torch.tensor(float(count), device=pl_module.device), reduce_op="sum")
    return {name: trainer.strategy.reduce(value, reduce_op="sum") / total.clamp(min=1) for name, value in sums.items()}


@contextmanager
def _recurrent_parts(module: nn.Module) -> Iterator[None]:
    """Let the recurrent parts of a module in evaluation mode go backward.

    cuDNN refuses that outside training mode, in which they are the same but for their dropout.
    """
    parts = [(part, part.training, part.dropout) for part in module.modules() if isinstance(part, nn.RNNBase)]
    try:
        for part, _, _ in parts:
            part.training, part.dropout = True, 0.0
        yield
    finally:
        for part, training, dropout in parts:
            part.training, part.dropout = training, dropout


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the precision that squares of this tensor's entries are added up in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
