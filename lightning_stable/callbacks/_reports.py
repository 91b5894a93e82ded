"""Values that are reported now and then, straight to the Trainer's loggers.

A value that the module logs at one step is written again at each later step of the epoch at which the host logs, old as
it then is, and not so after a resume. What is not logged at every step goes this way instead.
"""

import torch
from lightning.pytorch import Trainer
from torch import Tensor

__all__ = ["report"]


def report(trainer: Trainer, values: dict[str, Tensor], step: int) -> None:
    """Write values to all loggers, with one read from the device.

    Args:
        trainer: The Trainer.
        values: Scalars on one device, by name.
        step: Optimizer steps of all optimizers that came before the one that is reported on.
    """
    if not trainer.loggers:
        return
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    for logger in trainer.loggers:
        # The host counts batches for its loggers, and steps of all optimizers for itself.
        logger.log_metrics(dict(zip(values, numbers, strict=True)), step=step // max(1, len(trainer.optimizers)))
