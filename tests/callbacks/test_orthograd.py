"""OrthoGrad against pytorch-optimizer's wrapper, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from gradients import NetWith, Watches, weights
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_stable.callbacks.orthograd import OrthoGrad
from lightning_stable.testing.harness import QUIET, Net, Stream, TwoOptimizerNet, assert_same, fit

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: Adam(parameters, lr=0.01),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def peer(make: Callable[[Any], Optimizer], steps: int) -> dict[str, Tensor]:
    """Train the same net in a plain loop with the peer's wrapper around the optimizer."""
    module, stream = Net(norm=False), Stream()
    module.train()
    optimizer = pytorch_optimizer.OrthoGrad(make(module.parameters()))
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(stream.batch(step % 6)[0]), stream.batch(step % 6)[1]).backward()
        optimizer.step()
    return weights(module)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_peers_for_twenty_steps(name: str) -> None:
    module = NetWith(OPTIMIZERS[name], norm=False)
    fit([OrthoGrad()], module=module, max_steps=20, limit_val_batches=0)
    assert_same(weights(module), peer(OPTIMIZERS[name], 20), "ours against pytorch-optimizer's", tolerance=1e-6)
    plain = fit([], module=NetWith(OPTIMIZERS[name], norm=False), max_steps=20, limit_val_batches=0)
    assert not torch.allclose(plain.module.head.weight, module.head.weight, atol=1e-3)


def test_gradients_keep_their_norm_and_lose_the_weights_direction() -> None:
    before, after = Watches(), Watches()
    run = fit([before, OrthoGrad(), after], max_steps=6, limit_val_batches=0)
    for step, raw, turned in zip(run.steps, before.seen, after.seen, strict=True):
        for name, gradient in turned.items():
            assert float(gradient.norm()) == pytest.approx(float(raw[name].norm()), rel=1e-5)
            cosine = nn.functional.cosine_similarity(gradient.flatten(), step.before[name].flatten(), dim=0)
            assert abs(float(cosine)) < 1e-4


def test_clipping_acts_on_what_it_leaves() -> None:
    raw, clipped = Watches(), {}

    class Looks(Net):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            clipped[len(raw.seen)] = torch.stack([p.grad.norm() for p in self.parameters()]).norm()

    fit([OrthoGrad(), raw], module=Looks(), max_steps=4, limit_val_batches=0, gradient_clip_val=0.01)
    assert [float(norm) for norm in clipped.values()] == pytest.approx([0.01] * 4, rel=1e-3)


def test_a_tensor_of_one_entry_does_not_move_and_zero_weights_do() -> None:
    class Scaled(NetWith):
        def __init__(self) -> None:
            super().__init__(OPTIMIZERS["sgd"])
            self.scale = nn.Parameter(torch.tensor(0.3))
            self.start = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x) + self.start.sum()

    module = Scaled()
    fit([OrthoGrad()], module=module, max_steps=5, limit_val_batches=0)
    assert float(module.scale.detach()) == pytest.approx(0.3, abs=1e-7)
    assert bool((module.start != 0).all())


def test_each_optimizer_has_its_own_parameters_changed() -> None:
    before, after = Watches(), Watches()
    fit([before, OrthoGrad(), after], module=TwoOptimizerNet(), max_steps=4, limit_val_batches=0)
    for call, own in enumerate(("body", "head", "body", "head")):
        for name in ("body.0.weight", "body.1.weight", "head.weight", "head.bias"):
            same = torch.equal(after.seen[call][name], before.seen[call][name])
            assert same is not name.startswith(own), (call, name)


def test_half_precision_weights() -> None:
    before, after = Watches(), Watches()
    fit([before, OrthoGrad(), after], max_steps=3, limit_val_batches=0, precision="bf16-true")
    for raw, turned in zip(before.seen, after.seen, strict=True):
        for name, gradient in turned.items():
            assert gradient.dtype == torch.bfloat16
            assert float(gradient.float().norm()) == pytest.approx(float(raw[name].float().norm()), rel=1e-2)


# ------------------------------------------------------------------ what every gradient transform refuses


def test_a_sharded_strategy_is_refused() -> None:
    trainer = Trainer(**QUIET)
    trainer._accelerator_connector = copy.copy(trainer._accelerator_connector)
    trainer._accelerator_connector.strategy = object.__new__(FSDPStrategy)
    with pytest.raises(ValueError, match=r"OrthoGrad does not work with FSDPStrategy: its gradients are sharded"):
        OrthoGrad().setup(trainer, Net(), "fit")


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="OrthoGrad does not work with LBFGS: it calls the closure several times"):
        fit([OrthoGrad()], module=NetWith(torch.optim.LBFGS), max_steps=1)


class Embeds(NetWith):
    def __init__(self) -> None:
        super().__init__(lambda parameters: SGD(parameters, lr=0.1))
        self.table = nn.Embedding(4, 1, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table(torch.arange(len(x)) % 4)


class Turns(NetWith):
    def __init__(self) -> None:
        super().__init__(lambda parameters: SGD(parameters, lr=0.1))
        self.turn = nn.Parameter(torch.ones(1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.turn.real


@pytest.mark.parametrize(("make", "kind", "cure"), [(Embeds, "sparse", "sparse=False"), (Turns, "complex", "two real")])
def test_unusual_gradients_are_refused_by_name(make: Any, kind: str, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"OrthoGrad does not work with {kind} gradients, and that of '\w+") as caught:
        fit([OrthoGrad()], module=make(), max_steps=1, limit_val_batches=0)
    assert cure in str(caught.value)


def test_an_optimizer_that_unscales_itself_is_refused() -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = NetWith(lambda parameters: AdamW(parameters, fused=True))
    with pytest.raises(ValueError, match=r"OrthoGrad does not work with a AdamW that unscales.*fused=False"):
        fit([OrthoGrad(), precision], module=module, max_steps=1)
