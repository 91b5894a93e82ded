"""A callback's state where workers train apart: with a strategy whose workers' weights differ between exchanges.

When such a strategy brings its workers together, for a checkpoint or at the end of a fit, every process has to go on
from what the checkpoint holds, which is the state of process 0: otherwise a resumed run would go another way. Neither
side imports the other. A callback says by three attributes what becomes of its state, and one without any of them has
the same state in every process anyway:

- ``worker_tensors()`` returns floating-point tensors of which the strategy puts the mean over workers in the place of
  each worker's, in place. Such is an average of the weights, since the mean of the workers' averages is the average of
  their mean weights. In a validation, which sees the mean weights, the mean takes their place for that long.
- ``takes_state_of_rank_zero = True``: after that the other processes load the ``state_dict`` of process 0. Their
  ``load_state_dict`` is called in the middle of a fit then, and has to act at once.
- ``holds_live_weights``: whether the module runs with other weights at the moment, so that there is nothing to bring
  together; the strategy raises then.

Tensors that an exchange over all processes has made, such as the Fisher information, and samples that all processes
keep alike, need nothing.
"""

from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

__all__ = ["freezes_variance", "mean_over_processes", "shows_own_gradients", "trains_apart"]


def trains_apart(trainer: Trainer) -> bool:
    """Tell whether the strategy lets several workers make steps of their own between two exchanges."""
    return trainer.world_size > 1 and getattr(trainer.strategy, "local_steps", None) is not None


def shows_own_gradients(trainer: Trainer) -> bool:
    """Tell whether callbacks may see gradients that are not the mean over processes.

    So they do where workers train apart, and where a strategy exchanges what the optimizer has made of the gradients.
    """
    return trains_apart(trainer) or freezes_variance(trainer)


def freezes_variance(trainer: Trainer) -> bool:
    """Tell whether the strategy stops learning the optimizer's variance, and exchanges momenta from there on."""
    return trainer.world_size > 1 and getattr(trainer.strategy, "freeze_step", None) is not None


def mean_over_processes(trainer: Trainer, tensors: list[Tensor]) -> list[Tensor]:
    """Return the mean of each tensor over processes, with one exchange; all of them have to call this.

    Sparse and complex tensors are returned as they are.
    """
    if trainer.world_size == 1 or any(tensor.layout != torch.strided or tensor.is_complex() for tensor in tensors):
        return tensors
    if not tensors:
        return []
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = torch.cat([tensor.to(wide).flatten() for tensor in tensors])
    mean = cast(Tensor, trainer.strategy.reduce(flat, reduce_op="mean"))
    parts = torch.split(mean, [tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
