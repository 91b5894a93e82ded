"""What goes along with a fit under a simulated precision, beside its layers, told of each batch and saved."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_stable.functional.quantize import reste_exponent
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision._host import share_of_training

__all__ = ["Part", "ResteSchedule"]


class Part(ABC):
    """One of the things that a simulated precision does over a fit.

    Args:
        owner: The class that is named in messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def line(self) -> str:
        """Return what the first line of a fit says of it, in sentences; nothing if there is nothing to say."""
        return ""

    def begin(self, pl_module: LightningModule) -> None:
        """Prepare a fit of a module whose layers are converted; errors should come here."""
        return

    @abstractmethod
    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due before a batch is trained on."""

    def step_context(self) -> AbstractContextManager[None]:
        """Return the context in which the host runs a training step."""
        return nullcontext()

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is due after it, before a checkpoint or a validation."""
        return

    def apply(self, module: nn.Module) -> None:
        """Give the converted layers what was found, after they are converted or it was loaded."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it from the state of all parts."""
        return

    def stop(self) -> None:
        """Undo what was done to the module, also after an exception; what was found stays."""
        return


class ResteSchedule(Part):
    """Tells the layers the exponent of ReSTE's estimator, which rises over training."""

    @override
    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = share_of_training(trainer)
        if done is None:
            raise ValueError(
                f"estimator='reste' of {self._owner} follows the share of training that is done, and its end is not "
                "known. Set max_steps, or max_epochs with a loader that has a length."
            )
        exponent = reste_exponent(done)
        for state in quantized_layers(pl_module).values():
            state.reste_exponent = exponent
