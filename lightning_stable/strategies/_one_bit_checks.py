"""What 1-bit Adam cannot work with, told before training begins."""

from collections.abc import Sequence

import torch
from lightning.pytorch.plugins import Precision
from torch.optim import Adam, AdamW, Optimizer

from lightning_stable.functional._settings import check_count

__all__ = ["check_adam", "check_freeze_step", "check_precision"]

_REFUSED_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable")
_DTYPES = {torch.float32, torch.float64, torch.bfloat16}


def check_freeze_step(freeze_step: int | float) -> None:
    """Raise ``ValueError`` unless it is a number of steps from 1 on, or a share between 0 and 1."""
    if not isinstance(freeze_step, float):
        check_count("freeze_step", freeze_step, 1, "optimizer steps")
    elif not 0 < freeze_step < 1:
        raise ValueError(
            f"freeze_step={freeze_step!r} is not a share of the run between 0 and 1. Give such a share, or a whole "
            "number of optimizer steps from 1 on."
        )


def check_precision(owner: str, precision: Precision) -> None:
    """Raise ``ValueError`` for fp16, with a loss scaler or without."""
    if getattr(precision, "scaler", None) is not None or str(precision.precision).startswith("16"):
        raise ValueError(
            f"{owner} does not work with precision={precision.precision!r}: an overflow in one process would skip a "
            "step there alone. Choose 'bf16-mixed' or '32-true'."
        )


def check_adam(owner: str, optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` unless all optimizers are Adam or AdamW, with options and parameters that are known."""
    if not optimizers:
        raise ValueError(f"{owner} drives Adam, and configure_optimizers returned no optimizer.")
    for optimizer in optimizers:
        problem = _problem(optimizer)
        if problem:
            raise ValueError(f"{owner} {problem}")


def _problem(optimizer: Optimizer) -> str | None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, (Adam, AdamW)):
        return (
            f"drives torch.optim.Adam or AdamW, and configure_optimizers returned {kind}. Return one of them, or take "
            "strategy='compressed_ddp', which works with every optimizer."
        )
    flags = [flag for flag in _REFUSED_FLAGS if any(group.get(flag) for group in optimizer.param_groups)]
    if flags:
        return f"does not know {', '.join(flags)} of {kind}: leave it out."
    wrong = {parameter.dtype for group in optimizer.param_groups for parameter in group["params"]} - _DTYPES
    if wrong:
        names = ", ".join(sorted(map(str, wrong)))
        return f"does not work with parameters of {names}. Use float32, bfloat16 or float64."
    return None
