"""Callbacks of continual learning in half precision with a gradient scaler, on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import weights
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from tasks import STEPS, SWITCHES

from lightning_stable.callbacks import EWC, LAE, L2Anchor, LwF, RefreshLearning, Replay
from lightning_stable.testing.harness import Net, Run, SaveAt, assert_same, fit

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "replay": lambda: Replay(capacity=20),
    "l2_anchor": lambda: L2Anchor(lam=0.5, task_steps=SWITCHES),
    "ewc": lambda: EWC(lam=2.0, samples=20, task_steps=SWITCHES),
    "lwf": lambda: LwF(lam=4.0, logits="head", task_steps=SWITCHES),
    "refresh_learning": lambda: RefreshLearning(strength=0.02, noise=0.1, samples=20, task_steps=SWITCHES),
    "lae": lambda: LAE(parameters=["body.*"], decay=0.5, calibration_steps=2, task_steps=SWITCHES),
}

each = pytest.mark.parametrize("name", CALLBACKS)


def train(*plugins: Any, **settings: Any) -> Run:
    return fit(list(plugins), module=Net(norm=False), **{"max_steps": STEPS, **settings})


def half(init_scale: float = 2.0**10) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000))


@each
def test_a_gradient_scaler_keeps_the_meaning(name: str) -> None:
    """What float16 rounds away is far less than what the callback does."""
    run, full, plain = train(CALLBACKS[name](), half()), train(CALLBACKS[name]()), train()
    assert len(run.steps) == STEPS
    assert_same(weights(run.module), weights(full.module), "float16 with a scaler against float32", tolerance=5e-4)
    done = [(value - weights(plain.module)[n]).abs().max() for n, value in weights(full.module).items()]
    assert max(done) > 2e-2, "what the callback does hardly shows"


@each
def test_it_resumes_bit_by_bit(name: str, tmp_path: Any) -> None:
    path = str(tmp_path / "cut.ckpt")
    straight = train(CALLBACKS[name](), SaveAt(7, path), half())
    again = train(CALLBACKS[name](), SaveAt(STEPS + 1, path), half(), ckpt_path=path)
    assert_same(weights(again.module), weights(straight.module), "weights")
    assert_same(again.plugins[0].state_dict(), straight.plugins[0].state_dict(), "state")


@each
def test_a_step_that_overflows_is_left_to_the_scaler(name: str) -> None:
    precision = half(2.0**40)
    run = train(CALLBACKS[name](), precision, max_steps=40)
    assert 0 < len(run.steps) < 40
    assert precision.scaler.get_scale() < 2.0**40
    assert all(bool(value.isfinite().all()) for value in weights(run.module).values())
