"""The simulated precision on the first batch: what it says, and the comparison of gradients."""

import pytest
import torch
from precision.simulated_runs import INT8, STOCHASTIC
from torch import nn
from torchmetrics import MeanMetric

from lightning_stable.functional import _simulated_layers
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision import _first_batch, simulated
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import ManualNet, Net, Stream, assert_same, fit


@pytest.fixture
def told(monkeypatch):
    """What is said on the console."""
    lines = []
    for module in (simulated, _first_batch):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines


def test_it_says_what_is_converted_and_how_far_the_gradient_is(told):
    class Attending(Net):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            return super().forward(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])

    fit([SimulatedPrecision(**{**INT8, "weights": "e4m3", "gradients": None})], module=Attending(), max_steps=2)
    first, second = told
    assert first.startswith("SimulatedPrecision: 2 layers converted")
    for part in ("weights e4m3, a scale for each row", "gradients as they are", "32-true", "'attention' (nn.Multihead"):
        assert part in first
    assert "cosine of 0.99" in second or "cosine of 1.0" in second


def test_the_cosine_is_that_of_the_quantized_gradient_to_the_exact_one(told):
    settings = {**INT8, "weights": "int4", "activations": "int4", "gradients": "int4"}
    low, high = (fit(plugins, max_steps=1).steps[0].gradients for plugins in ([SimulatedPrecision(**settings)], []))
    names = [name for name in low if "body.0" in name or "head" in name]
    a, b = (torch.cat([each[name].flatten() for name in names]) for each in (low, high))
    expected = float(nn.functional.cosine_similarity(a, b, dim=0))
    assert 0.9 < expected < 0.9999
    assert f"cosine of {expected:.4f} " in told[1]


def test_a_low_cosine_is_warned_about():
    with pytest.warns(UserWarning, match=r"cosine of .*Below 0.9.*exclude"):
        fit([SimulatedPrecision(**{**INT8, "weights": "int2", "gradients": "e1m0"})], max_steps=1)


@pytest.mark.parametrize(
    ("settings", "advice", "other"),
    [
        ({"gradients": "e1m0"}, "keep gradients as they are", "are as they are"),
        ({"gradients": None}, "Gradients are as they are: try weights and activations apart", "gradients=None"),
        ({"gradients": None, "activations": None}, "Only one operand is quantized already", "gradients=None"),
    ],
)
def test_the_advice_is_of_what_is_not_so_already(settings, advice, other):
    with pytest.warns(UserWarning, match=advice) as caught:
        fit([SimulatedPrecision(**{**INT8, "weights": "e1m0", "weight_scaling": "tensor", **settings})], max_steps=1)
    assert not any(other in str(warning.message) for warning in caught)


def test_the_comparison_leaves_no_trace():
    class Rich(Net):
        def __init__(self):
            super().__init__(dropout=0.3)
            self.mean = MeanMetric()
            self.passes = 0

        def training_step(self, batch, batch_idx):
            self.passes += 1
            x, y = batch.pop(), batch.pop()
            self.mean(x)
            self.log("mean", self.mean)
            return super().training_step((y, x), batch_idx)

    def run(check, **settings):
        torch.manual_seed(3)
        plugin = SimulatedPrecision(**STOCHASTIC, check_gradients=check)
        done = fit([plugin], module=Rich(), validation=Stream(2, seed=5), max_steps=8, **settings)
        return done, {**done.snapshot(), "steps": [step._asdict() for step in done.steps], "random": torch.rand(3)}

    (checked, found), (plain, expected) = run(True), run(False)
    assert (checked.module.passes, plain.module.passes) == (10, 8)
    assert_same(found, expected, "with the comparison against without it")
    assert "log" not in vars(checked.module)


def test_the_comparison_runs_the_step_without_what_callbacks_see_or_add():
    seen = []

    class Observes(Net):
        def on_fit_start(self):
            state = quantized_layers(self)["head"]
            state.observers.append(lambda *args: seen.append(args[1]))
            state.enabled = False
            self.state = state

        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                self.state.enabled = True
            self.noted = (self.state.enabled, len(self.state.observers))
            return super().training_step(batch, batch_idx)

    module = Observes()
    fit([SimulatedPrecision(**INT8)], module=module, max_steps=2)
    assert module.noted == (True, 1)
    assert seen == ["activations", "weights", "gradients"]


@pytest.mark.parametrize("check", [True, False])
def test_a_layer_that_does_not_quantize_is_an_error(check, monkeypatch):
    monkeypatch.setattr(_simulated_layers, "straight_through", lambda x, *args, **kwargs: x)
    with pytest.raises(ValueError, match=r"SimulatedPrecision: layer 'body.0' was converted, but its .* int8"):
        fit([SimulatedPrecision(**INT8, check_gradients=check)], max_steps=3)


@pytest.mark.parametrize("check", [True, False])
def test_operands_that_lie_on_the_grid_already_are_none(check):
    class OnGrid(Net):
        def on_fit_start(self):
            with torch.no_grad():
                for layer in (self.body[0], self.head):
                    layer.weight.copy_(layer.weight.sign())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    settings = {**INT8, "weights": "int2", "activations": None, "gradients": None}
    fit([SimulatedPrecision(**settings, check_gradients=check)], module=OnGrid(), max_steps=1)


def test_a_layer_that_does_not_run_is_warned_about():
    class Reads(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(6, 6)

        def forward(self, x):
            return super().forward(nn.functional.linear(x, self.table.weight, self.table.bias))

    with pytest.warns(UserWarning, match="'table' did not run in the first batch"):
        fit([SimulatedPrecision(**INT8)], module=Reads(), max_steps=1)


def test_manual_optimisation_skips_the_comparison_and_still_checks_the_layers(told, monkeypatch):
    module = ManualNet()
    fit([SimulatedPrecision(**INT8)], module=module, max_steps=3)
    assert "not compared" in told[1]
    assert "ManualNet steps its optimizers itself" in told[1]
    monkeypatch.setattr(_simulated_layers, "straight_through", lambda x, *args, **kwargs: x)
    with pytest.raises(ValueError, match=r"layer 'body.0' was converted"):
        fit([SimulatedPrecision(**INT8)], module=ManualNet(), max_steps=3)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_takes_an_iterator_is_not_run_twice(told):
    class Iterates(Net):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    fit([SimulatedPrecision(**INT8)], module=Iterates(), max_steps=2)
    assert "takes dataloader_iter" in told[1]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_skips_has_nothing_to_compare(told):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.trainer.global_step == 0 and batch_idx == 0 else loss

    fit([SimulatedPrecision(**INT8)], module=Skips(), max_steps=2)
    assert "no gradient to compare" in told[1]


class Checkpointed(Net):
    """Computes its body anew in the backward pass, in torch's first way to do so."""

    def __init__(self, first):
        super().__init__(norm=False)
        self.first = first

    def forward(self, x):
        hidden = self.first(x).requires_grad_()
        hidden = torch.utils.checkpoint.checkpoint(self.body, hidden, use_reentrant=True)
        return self.head(hidden).sum(1, keepdim=True)


def test_a_gradient_that_cannot_be_taken_apart_from_training_says_what_to_do():
    with pytest.raises(ValueError, match="Set check_gradients=False"):
        fit([SimulatedPrecision(**INT8)], module=Checkpointed(nn.Linear(6, 6)), max_steps=1)
    fit([SimulatedPrecision(**INT8, check_gradients=False)], module=Checkpointed(nn.Linear(6, 6)), max_steps=1)


def test_parameters_without_a_gradient_to_compare_are_counted(told):
    fit([SimulatedPrecision(**INT8)], module=Checkpointed(nn.Identity()), max_steps=1)
    assert "2 of 4 parameters have none" in told[1]
