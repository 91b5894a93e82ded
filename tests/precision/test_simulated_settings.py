"""The settings of the simulated precision: what they mean, and which are refused."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from precision.simulated_runs import INT8, kinds
from torch import nn
from torch.utils.data import DataLoader

from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import QUIET, Net, differences, fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "e9m9"}, r"SimulatedPrecision, weights: .*'e9m9'"),
        ({"activations": "int9"}, r"SimulatedPrecision, activations: .*'int9'"),
        ({"gradient_scaling": "groups"}, r"SimulatedPrecision, gradients: .*'groups'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"asymmetric_weights": True}, "asymmetric"),
        ({"weights": "mxfp8", "weight_scaling": "row"}, "brings its own scale"),
        ({"keep_outliers": -1}, "keep_outliers=-1"),
        ({"outlier_threshold": 0.0}, "outlier_threshold=0.0"),
        ({"outlier_threshold": 6.0, "activations": None}, "Give activations a format"),
        ({"search_bias": True}, "search_bias of SimulatedPrecision is for float formats with scaling='none'"),
        ({"search_bias": True, "weights": None, "activations": None}, "nothing to search"),
        ({"search_bias": True, "scaling": "none", "bias_search_batches": 0}, "bias_search_batches=0"),
        ({"search_bias": True, "scaling": "none", "bias_search_metric": "loss"}, "'loss'.*'output', 'tensor'"),
        ({"estimator": "ste"}, "estimator='ste'"),
        ({"estimator": "reste"}, "estimator='reste' of SimulatedPrecision .* neither is binary"),
        ({"estimator": "reste", "weights": "ternary", "gradients": "binary"}, "neither is binary"),
        ({"compute": "16-mixed"}, "compute='16-mixed'.*'bf16-mixed'"),
        ({"include": "layer"}, r"include='layer' is one string.*\['layer'\]"),
        ({"exclude": "head"}, r"exclude='head' is one string"),
        ({"preset": "int4"}, "preset='int4'.*'stable_spam_int4'"),
        ({"preset": "stable_spam_int4", "weights": "int8"}, "weights='int8' was given"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        SimulatedPrecision(**settings)


def test_names_that_match_nothing_and_widths_that_do_not_divide_are_refused_at_the_start():
    module = Net()
    with pytest.raises(ValueError, match=r"SimulatedPrecision: No layer of Net matches.*'body.0', 'head'"):
        fit([SimulatedPrecision(include=["decoder*"])], module=module, max_steps=1)
    with pytest.raises(ValueError, match=r"SimulatedPrecision: The weights of layer 'body.0'"):
        fit([SimulatedPrecision(**{**INT8, "scaling": "group:4", "padding": False})], module=module, max_steps=1)
    assert kinds(module) == ["Linear"] * 2


def test_operands_have_scales_and_rounding_of_their_own():
    recipe = SimulatedPrecision(
        weights="mxfp4", gradients="int8", activation_scaling="row", gradient_rounding="stochastic", keep_outliers=2
    ).recipe
    assert [each.scaling for each in recipe] == ["none", "row", "tensor"]
    assert [each.rounding for each in recipe] == ["nearest", "nearest", "stochastic"]
    assert [each.keep_outliers for each in recipe] == [0, 2, 0]


def test_the_preset_quantizes_projections_of_blocks_in_int4():
    class Block(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.q_proj, self.gate_proj, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            self.names = sorted(quantized_layers(self))
            return super().forward(self.mlp(self.gate_proj(self.q_proj(x))))

    plugin, module = SimulatedPrecision(preset="stable_spam_int4"), Block()
    weights, activations, gradients = plugin.recipe
    assert (weights.format, weights.scaling, weights.asymmetric, weights.keep_outliers) == (
        "int4",
        "group:256",
        True,
        0,
    )
    assert (activations.format, activations.scaling, activations.keep_outliers) == ("int4", "group:256", 2)
    assert not activations.asymmetric
    assert gradients is None
    fit([plugin], module=module, max_steps=1)
    assert module.names == ["gate_proj", "q_proj"]
    own = SimulatedPrecision(preset="stable_spam_int4", include=["mlp"])
    fit([own], module=module, max_steps=1)
    assert module.names == ["mlp"]


def test_the_estimator_follows_training():
    class Binary(Net):
        def training_step(self, batch, batch_idx):
            self.exponents = [*getattr(self, "exponents", []), quantized_layers(self)["body.0"].reste_exponent]
            return super().training_step(batch, batch_idx)

    settings = {"weights": "binary", "activations": None, "gradients": None, "check_gradients": False}
    module = Binary()
    fit([SimulatedPrecision(**settings, estimator="reste")], module=module, max_steps=4)
    assert module.exponents == pytest.approx([1 + 2 * (1 - math.cos(math.pi * step / 8)) for step in range(4)])
    plain = fit([SimulatedPrecision(**settings)], max_steps=4)
    assert differences(plain.module.state_dict(), module.state_dict())
    loader = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match="its end is not known"):
        fit([SimulatedPrecision(**settings, estimator="reste")], train=loader, max_epochs=-1)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4, 6), torch.ones(4, 1)


def test_the_rest_computes_in_what_was_asked_for():
    class Dtypes(Net):
        def forward(self, x):
            self.dtypes = (x.dtype, self.head.weight.dtype, super().forward(x).dtype)
            return super().forward(x)

    expected = {
        "32-true": (torch.float32, torch.float32, torch.float32),
        "bf16-mixed": (torch.float32, torch.float32, torch.bfloat16),
        "bf16-true": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    }
    for compute, dtypes in expected.items():
        module = Dtypes()
        run = fit([SimulatedPrecision(**INT8, compute=compute)], module=module, max_steps=1)
        assert module.dtypes == dtypes
        assert run.trainer.precision == compute


def test_the_host_says_what_to_do_where_it_refuses():
    plugin = SimulatedPrecision()
    with pytest.raises(ValueError, match=r"Received both `precision=bf16-mixed`.*compute='32-true'"):
        Trainer(**QUIET, plugins=[plugin], precision="bf16-mixed")
    with pytest.raises(TypeError, match="works on a single device and with strategy='ddp'"):
        FSDPStrategy().precision_plugin = plugin


@pytest.mark.parametrize("kind", [ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_weights_are_refused(kind):
    module = LightningModule()
    module.layer = nn.Linear(2, 2)
    trainer = Trainer(**QUIET)
    module.trainer = trainer
    strategy = object.__new__(kind)
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match=f"SimulatedPrecision does not work with {kind.__name__}.*strategy='ddp'"):
        SimulatedPrecision().convert_module(module)
    assert type(module.layer) is nn.Linear
