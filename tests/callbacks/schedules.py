"""What the tests of WarmupStableDecay share: the factors that a run used, and what asks for a decay."""

import types
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import timer as timer_module
from torch.utils.data import DataLoader

from lightning_stable.callbacks import WarmupStableDecay, _decay_request
from lightning_stable.functional.wsd import wsd_multiplier
from lightning_stable.testing.harness import EndlessStream, Net, Run, fit


def factors(run: Any) -> list[float]:
    """The factor on the peak at each optimizer step, after checking that both groups have it."""
    for step in run.steps:
        assert step.rates[0] / run.module.rates[0] == pytest.approx(step.rates[1] / run.module.rates[1])
    return [step.rates[0] / run.module.rates[0] for step in run.steps]


def expected(steps: int, *args: Any, **kwargs: Any) -> Any:
    return pytest.approx([wsd_multiplier(step, *args, **kwargs) for step in range(steps)], abs=1e-12)


class AskAt(Callback):
    """Asks for a decay at the end of a given optimizer step."""

    def __init__(self, schedule: WarmupStableDecay, step: int, length: int | None = None) -> None:
        self.schedule, self.step, self.length = schedule, step, length

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.schedule.decay_now(self.length)


def endless() -> DataLoader:
    return DataLoader(EndlessStream(), batch_size=None)


class Slow(Net):
    """Each training step takes a second of a clock that the tests set."""

    now = 0.0

    def training_step(self, *args: Any) -> Any:
        Slow.now += 1.0
        return super().training_step(*args)


def fit_against_the_clock(monkeypatch: pytest.MonkeyPatch, schedule: WarmupStableDecay, seconds: int) -> Run:
    """Fit on endless data with ``max_time``, on the clock of :class:`Slow`."""
    Slow.now = 0.0
    clock = types.SimpleNamespace(monotonic=lambda: Slow.now)
    monkeypatch.setattr(timer_module, "time", clock)
    monkeypatch.setattr(_decay_request, "time", clock)
    return fit(
        [schedule],
        module=Slow(),
        train=endless(),
        max_epochs=-1,
        max_time={"seconds": seconds},
        limit_val_batches=0,
    )
