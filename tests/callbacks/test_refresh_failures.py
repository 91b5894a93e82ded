"""RefreshLearning beside steps that fail, or that are not taken: what was unlearned for them is put back."""

import copy
from typing import Any

import pytest
import torch
from gradients import Watches, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_stable.callbacks.refresh_learning import RefreshLearning
from lightning_stable.callbacks.sam import SAM
from lightning_stable.callbacks.spike_guard import SpikeGuard
from lightning_stable.testing.harness import Net, assert_same, fit


def strong(**settings: Any) -> RefreshLearning:
    return RefreshLearning(**{"strength": 0.02, "noise": 0.1, "seed": 3, **settings})


class LooksOn(Callback):
    """Sees the weights at the start of each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(weights(pl_module))


class SkipsOne(Net):
    """Skips the training of one batch, in one of the ways that the host has."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.how == "epoch" and batch_idx == 2 else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.how == "loss" and batch_idx == 2:
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("how", ["epoch", "loss"])
def test_what_is_not_trained_on_is_not_unlearned(how: str) -> None:
    looks = LooksOn()
    fit([strong(), looks], module=SkipsOne(how), max_epochs=2, limit_train_batches=4)
    assert_same(looks.seen[3], looks.seen[2], "weights after a skipped batch")


def test_a_batch_that_fails_is_not_unlearned() -> None:
    """After a failure the weights are those of the last step, and what is saved goes on from before the batch."""

    class Fails(Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Any]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.states.append(copy.deepcopy(refresh.state_dict()))

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("deliberate")

    refresh, module, fails = strong(), Net(), Fails()
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([refresh, fails], module=module, max_steps=9)
    assert_same(weights(module), module.steps[-1].weights, "weights after the failure against the last step's")
    assert_same(refresh.state_dict(), fails.states[-1], "state after the failure against that before the batch")


FAILURES = ["on_before_zero_grad", "on_train_batch_end", "module on_train_batch_end", "optimizer_step"]


class FailsAfterItsStep(Net):
    """Fails in the batch of step 7, once its update is made."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.fail("optimizer_step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.fail("module on_train_batch_end")

    def fail(self, where: str) -> None:
        if where == self.where and len(self.steps) == 8:
            raise RuntimeError("deliberate")


class FailsToo(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.fail("on_train_batch_end")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if len(pl_module.steps) == 8:
            pl_module.fail("on_before_zero_grad")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", FAILURES)
def test_an_update_that_was_made_stays_whatever_fails_after_it(where: str, first: bool) -> None:
    module, refresh = FailsAfterItsStep(where), strong()
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([FailsToo(), refresh] if first else [refresh, FailsToo()], module=module, max_steps=20)
    assert len(module.steps) == 8
    assert_same(weights(module), module.steps[-1].weights, "weights after the failure against the last step's")


def explodes(step: int) -> Watches:
    """Makes the gradients of one step a spike."""
    return Watches(lambda number, gradient: gradient.mul_(1e6) if number == step else None)


def test_an_update_that_is_skipped_is_not_unlearned() -> None:
    """A GradientTransform took the gradients away, so that the optimizer made no update."""
    refresh, looks = strong(), LooksOn()
    guard = SpikeGuard(watch="norm", warmup_steps=4, window=8)
    run = fit([refresh, explodes(12), guard, looks], max_steps=16)
    assert guard.state_dict()["optimizers"]["0"]["skipped"] == 1
    assert_same(looks.seen[13], looks.seen[12], "weights after the skipped update against those before its batch")
    assert_same(weights(run.module), run.steps[-1].weights, "weights")
    with pytest.raises(AssertionError):
        assert_same(looks.seen[14], looks.seen[13], "weights after the next update")


def test_beside_sam_weights_stay_unlearned_for_a_skipped_update() -> None:
    """SAM has written to them, so nobody can tell that they are still what unlearning made of them."""
    refresh, looks = strong(), LooksOn()
    guard = SpikeGuard(watch="norm", warmup_steps=4, window=8)
    run = fit([refresh, SAM(rho=0.01), explodes(12), guard, looks], max_steps=13)
    assert guard.state_dict()["optimizers"]["0"]["skipped"] == 1
    gaps = [(weights(run.module)[n] - value).norm() / value.norm() for n, value in looks.seen[12].items()]
    assert 0 < max(gaps) < 0.2


def test_a_rewind_of_the_weights_is_not_undone() -> None:
    """Weights go back to the snapshot, not to where they were before the batch."""
    refresh, looks = strong(), LooksOn()
    guard = SpikeGuard(watch="norm", warmup_steps=4, window=8, rewind_after=1, snapshot_every_n_steps=100)
    fit([refresh, explodes(12), guard, looks], max_steps=16)
    assert guard.state_dict()["optimizers"]["0"]["rewinds"] == 1
    assert_same(looks.seen[13], looks.seen[0], "weights after a rewind against those that the fit began with")


def test_an_update_that_a_gradient_scaler_skips_is_not_unlearned() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    looks = LooksOn()
    run = fit([strong(), looks, MixedPrecision("16-mixed", "cpu", scaler)], max_steps=40)
    skipped = 40 - len(run.steps)
    assert 0 < skipped < 40
    same = [
        all(torch.equal(old[name], new[name]) for name in old)
        for old, new in zip(looks.seen, looks.seen[1:], strict=False)
    ]
    assert sum(same) == skipped
