"""What the processes of the tests of 1-bit Adam run where the freeze is at a share of the run."""

import torch
from oracles.one_bit_adam_twin import Settings
from strategies.one_bit_jobs import Ask, Batches, ManualNet, TwinNet, fit

from lightning_stable.strategies import OneBitAdamStrategy


def share_of_two_optimizers(share: float, max_steps: int) -> list[bool]:
    """Train with two optimizers that step at every batch, and tell when both were frozen."""
    frozen = Ask(lambda strategy, _: strategy.frozen)
    strategy = OneBitAdamStrategy(freeze_step=share)
    module = ManualNet(Settings(), every=1)
    fit(module, strategy, Batches(max_steps, torch.float32), max_steps=max_steps, callbacks=[frozen])
    return frozen.answers


def share_of_the_run(share: float, steps: int) -> list[bool]:
    """Train with the freeze at a share of the run, and tell when it was frozen."""
    frozen = Ask(lambda strategy, _: strategy.frozen)
    fit(
        TwinNet(Settings()),
        OneBitAdamStrategy(freeze_step=share),
        Batches(steps, torch.float32),
        max_epochs=1,
        callbacks=[frozen],
    )
    return frozen.answers
