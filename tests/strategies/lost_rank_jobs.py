"""Fits in which something ends one process, or all of them, for ``test_lost_ranks.py``."""

import os
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_stable import strategies
from lightning_stable.testing.harness import fit
from lightning_stable.testing.modules import AdamNet


class At(Callback):
    """Does something when so many steps are made."""

    def __init__(self, step: int, action: Callable[[Trainer], None]) -> None:
        self.step = step
        self.action = action

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def train_until_one_dies(name: str, who: int, at: int) -> str:
    """Return the error of a fit in which the process of one rank ends without a word."""

    def die(trainer: Trainer) -> None:
        if trainer.global_rank == who:
            os._exit(7)

    return _error(name, At(at, die))


def train_until_all_raise(name: str, at: int) -> str:
    """Return the error of a fit in which every rank raises one of its own."""

    def fail(trainer: Trainer) -> None:
        raise RuntimeError("no link is lost here")

    return _error(name, At(at, fail))


def _error(name: str, callback: Callback) -> str:
    try:
        fit([getattr(strategies, name)(), callback], module=AdamNet(), max_steps=20, devices=2)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""
