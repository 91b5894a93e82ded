"""What the tests of EMA share: the twin over a recorded history, and the loss of given weights."""

import pytest
import torch
from oracles.averaging_twin import ema
from torch import Tensor, nn

from lightning_stable.testing.harness import Net, Stream


def validation() -> Stream:
    return Stream(2, seed=5)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def flat(weights: dict[str, Tensor]) -> list[list[float]]:
    return [value.double().flatten().tolist() for value in weights.values()]


def assert_average(found: dict[str, Tensor], history: list[dict[str, Tensor]], decay: float) -> None:
    for value, twin in zip(found.values(), ema([flat(weights) for weights in history], decay), strict=True):
        assert value.double().flatten().tolist() == pytest.approx(twin, rel=1e-4, abs=1e-6)


def loss_of(weights: dict[str, Tensor], buffers: nn.Module) -> float:
    """Validation loss of given parameters with the buffers of another module."""
    module = Net()
    module.load_state_dict({**buffers.state_dict(), **weights})
    module.eval()
    with torch.no_grad():
        return float(sum(module.loss(validation().batch(index)) for index in range(2)) / 2)
