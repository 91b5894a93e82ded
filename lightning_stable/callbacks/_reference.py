"""Run a module's methods with other values for its weights, beside the live ones and without a copy."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["call_with_weights"]

_Result = TypeVar("_Result")


def call_with_weights(
    pl_module: LightningModule, weights: Mapping[str, Tensor], step: Callable[[], _Result]
) -> _Result:
    """Call ``step`` while the module's parameters and buffers of these names have these values.

    The live tensors are neither copied nor written: torch puts others in their places for the length of the call.
    Weights that are tied to one of these go with it.

    Args:
        pl_module: Whose methods ``step`` calls.
        weights: Values by name, on the module's device.
        step: What to run.

    Returns:
        What ``step`` returned.
    """
    named = {f"module.{name}": value for name, value in weights.items()}
    return cast(_Result, torch.func.functional_call(_Called(pl_module, step), named, ()))


class _Called(nn.Module):
    """Runs a function of a module as this one's ``forward``."""

    def __init__(self, module: nn.Module, step: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.step = step

    @override
    def forward(self) -> Any:
        return self.step()
