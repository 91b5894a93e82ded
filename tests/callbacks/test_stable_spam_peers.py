"""Stable-SPAM against pytorch-optimizer's, and the faults of the released code's resets that ours does not have."""

import pytest
import pytorch_optimizer
import torch
from gradients import NetWith, Watches
from torch import Tensor
from torch.optim import Adam

from lightning_stable.callbacks.stable_spam import StableSPAM
from lightning_stable.functional.stable_spam import init_stable_spam, update_stable_spam
from lightning_stable.testing.harness import assert_same, fit

ADAM = {"lr": 0.01}


def adam_net() -> NetWith:
    return NetWith(lambda parameters: Adam(parameters, **ADAM), norm=False)


def test_it_is_pytorch_optimizers_without_resets() -> None:
    make = lambda parameters: pytorch_optimizer.StableSPAM(parameters, lr=0.01, update_proj_gap=10**6)  # noqa: E731
    peer = NetWith(make, norm=False)
    fit([], module=peer, max_steps=20, limit_val_batches=0)
    ours = adam_net()
    fit([StableSPAM()], module=ours, max_steps=20, limit_val_batches=0)
    assert_same(ours.history, peer.history, "ours against pytorch-optimizer's", tolerance=1e-5)


class Released:
    """What the released optimizer does to one tensor: Adam, clip and norm share a step count that a reset sets to 1."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.total = self.count = 0
        self.largest = 0.0
        self.mean, self.square = torch.zeros(()), torch.zeros(())

    def threshold(self, top: float, gamma3: float = 0.999) -> float:
        self.total += 1
        self.count = 1 if self.total % self.every == 0 else self.count + 1
        self.largest = gamma3 * self.largest + (1 - gamma3) * top
        return self.largest / (1 - gamma3**self.count)

    def update(self, gradient: Tensor, beta1: float = 0.9, beta2: float = 0.999) -> Tensor:
        self.total += 1
        self.count += 1
        if self.total % self.every == 0:
            # The update is made of the moments before; the new ones begin without this gradient.
            mean, square, self.count = self.mean, self.square, 1
            self.mean, self.square = torch.zeros(()), torch.zeros(())
        else:
            mean = self.mean = beta1 * self.mean + (1 - beta1) * gradient
            square = self.square = beta2 * self.square + (1 - beta2) * gradient**2
        return mean / (1 - beta1**self.count) / ((square / (1 - beta2**self.count)).sqrt() + 1e-8)


def test_released_thresholds_are_inflated_after_a_reset_and_ours_are_not() -> None:
    released, state, ratios = Released(every=380), init_stable_spam(1), []
    for _ in range(384):
        gradient = torch.ones(4)
        state, info = update_stable_spam([gradient], state)
        ratios.append(released.threshold(1.0))
        assert float(info.thresholds) == pytest.approx(1.0, rel=1e-3)
    assert ratios[378] == pytest.approx(1.0, rel=1e-6)
    assert ratios[379] > 300, "a spike of 300 times the usual size would pass"
    assert ratios[380] > 150


def test_the_released_reset_drops_a_gradient_and_ours_uses_it() -> None:
    def last_update(gradient: float) -> float:
        released = Released(every=5)
        for value in (1.0, 1.0, 1.0, 1.0):
            released.update(torch.tensor(value))
        return float(released.update(torch.tensor(gradient)))

    # Nothing of the fifth gradient is in the update that is made at it, nor in any later one.
    assert last_update(1.0) == last_update(-100.0)
    assert last_update(1.0) == pytest.approx(1.72, rel=1e-2), "old moments are corrected as if they were new"

    def ours(factor: float) -> Tensor:
        module = adam_net()
        change = Watches(lambda step, gradient: gradient.mul_(factor) if step == 4 else None)
        fit(
            [change, StableSPAM(clip=False, norm=None, reset_every_n_steps=4)],
            module=module,
            max_steps=5,
            limit_val_batches=0,
        )
        return module.history[4]["head.weight"] - module.history[3]["head.weight"]

    assert torch.allclose(ours(1.0), -ours(-100.0), rtol=1e-3)
    assert torch.allclose(ours(1.0).abs(), torch.tensor(ADAM["lr"]), rtol=1e-3), "the first step of new moments"
