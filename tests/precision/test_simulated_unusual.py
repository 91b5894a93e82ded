"""SimulatedPrecision with modules that do more than a plain step: second derivatives, decorators, recomputed layers."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_stable.functional.quantize import Quantizer, reste_exponent
from lightning_stable.functional.simulated import convert, quantized_layers
from lightning_stable.precision.simulated import SimulatedPrecision

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class TwoLayers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.exponents: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.exponents += [next(iter(quantized_layers(self).values())).reste_exponent]
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: LightningModule, precision: SimulatedPrecision, data: Any = None, **settings: Any) -> None:
    torch.manual_seed(1)
    loader = DataLoader(torch.randn(24, 8) if data is None else data, batch_size=4)
    Trainer(plugins=[precision], **{"max_epochs": 1, **settings}, **QUIET).fit(module, loader)


class GradientPenalty(TwoLayers):
    """Trains on how much its output moves with its input."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.net(batch).sum(), batch, create_graph=True)
        return gradient.square().mean()


def test_observers_let_second_derivatives_pass() -> None:
    ended = []
    for observed in (False, True):
        module = GradientPenalty()
        precision = SimulatedPrecision(check_gradients=False)

        class Watching(SimulatedPrecision):
            def convert_module(self, module: nn.Module) -> nn.Module:
                module = super().convert_module(module)
                for state in quantized_layers(module).values():
                    state.observers.append(lambda *seen: None)
                return module

        fit(module, Watching(check_gradients=False) if observed else precision)
        ended.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    start = torch.cat([parameter.flatten() for parameter in GradientPenalty().parameters()])
    assert not torch.equal(ended[0], start)
    assert torch.equal(ended[0], ended[1])


def decorated(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * step(*args, **kwargs)

    return wrapped


class Decorated(TwoLayers):
    @decorated
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


def test_a_decorated_training_step_is_compared_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Decorated(), SimulatedPrecision())
    assert "has a cosine of" in caplog.text


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(24, 8)


RESTE: dict[str, Any] = {"weights": "binary", "activations": None, "gradients": None, "estimator": "reste"}


def test_reste_needs_to_know_the_end() -> None:
    with pytest.raises(ValueError, match="SimulatedPrecision follows the share of training"):
        fit(TwoLayers(), SimulatedPrecision(**RESTE), Endless(), max_epochs=1)


class TwoOptimizers(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[number].parameters(), lr=0.01) for number in (0, 2)]


def test_reste_rises_over_the_whole_run_with_two_optimizers() -> None:
    one, two = TwoLayers(), TwoOptimizers()
    fit(one, SimulatedPrecision(**RESTE, check_gradients=False), max_epochs=2)
    fit(two, SimulatedPrecision(**RESTE, check_gradients=False), max_epochs=2)
    assert len(two.exponents) == 12
    assert two.exponents == one.exponents
    assert two.exponents[0] == 1.0
    assert two.exponents[6] == reste_exponent(0.5)


class Recomputed(TwoLayers):
    reentrant = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.clone().requires_grad_()
        loss: Tensor = checkpoint(self.net, batch, use_reentrant=self.reentrant).square().mean()
        return loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_stochastic_rounding_and_activation_checkpointing_are_an_error(reentrant: bool) -> None:
    module = Recomputed()
    module.reentrant = reentrant
    fit(module, SimulatedPrecision(check_gradients=False))
    with pytest.raises(RuntimeError, match="computed again in the backward pass"):
        fit(module, SimulatedPrecision(rounding="stochastic", check_gradients=False))


def test_an_outlier_of_one_sample_without_a_batch_is_a_column() -> None:
    torch.manual_seed(0)
    x = torch.randn(8)
    x[3] = 50
    layer = nn.Sequential(nn.Linear(8, 4))
    coarse = Quantizer("int2", scaling="row")
    convert(layer, weights=coarse, activations=coarse, outlier_threshold=6.0)
    assert torch.allclose(layer(x), layer(x[None])[0], atol=1e-6)


class ByName(TwoLayers):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net[2](input=self.net[0](input=batch).tanh()).square().mean()
        return loss


def test_biases_are_searched_for_inputs_that_are_given_by_name() -> None:
    precision = SimulatedPrecision(weights="e2m1", activations="e2m1", gradients=None, scaling="none", search_bias=True)
    fit(ByName(), precision)
    assert set(precision.state_dict()["biases"]) == {"net.0", "net.2"}
