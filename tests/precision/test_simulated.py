"""The simulated precision in a Trainer: what it converts and when, the first batch, and its settings."""

import copy
import math

import pytest
import torch
from contract.harness import QUIET, DictNet, ManualNet, Net, SaveAt, Stream, assert_same, differences, fit
from contract.workers import Pair
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_stable.functional import _simulated_layers
from lightning_stable.functional.quantize import search_exponent_bias
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision import _first_batch, simulated
from lightning_stable.precision.simulated import SimulatedPrecision

INT8 = {"weights": "int8", "activations": "int8", "gradients": "int8", "scaling": "row", "exclude": ()}
RANDOM = {**INT8, "weights": "int4", "rounding": "stochastic"}


@pytest.fixture
def told(monkeypatch):
    """What is said on the console."""
    lines = []
    for module in (simulated, _first_batch):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines


def kinds(module):
    return [type(part).__name__ for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


class Watched(Net):
    """Notes the kinds of its layers in each step."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.noted = {}

    def training_step(self, batch, batch_idx):
        self.noted["train"] = kinds(self)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.noted["validate"] = kinds(self)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.noted["test"] = kinds(self)
        super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.noted["predict"] = kinds(self)
        return self(batch[0])


# ----------------------------------------------------------------------------- converting and back


def test_layers_are_converted_while_a_trainer_runs_and_not_afterwards():
    module, stream = Watched(), Stream(2, seed=5)
    keys = list(module.state_dict())
    trainer = Trainer(**QUIET, plugins=[SimulatedPrecision(**INT8)], max_steps=3)
    trainer.fit(module, Stream(), stream)
    trainer.validate(module, stream, verbose=False)
    trainer.test(module, stream, verbose=False)
    trainer.predict(module, DataLoader(stream.dataset, batch_size=8))
    assert module.noted == dict.fromkeys(("train", "validate", "test", "predict"), ["QuantizedLinear"] * 2)
    assert kinds(module) == ["Linear"] * 2
    assert list(module.state_dict()) == keys
    assert not quantized_layers(module)
    assert not [each for each in trainer.callbacks if isinstance(each, _first_batch.FirstBatch)]


def test_heads_and_norms_are_left_out_unless_asked_for():
    module = Watched()
    fit([SimulatedPrecision()], module=module, max_steps=1)
    assert module.noted["train"] == ["QuantizedLinear", "Linear"]


def test_an_excluded_layer_multiplies_exactly():
    class Keeps(Net):
        def training_step(self, batch, batch_idx):
            hidden = self.body(batch[0])
            self.exact = torch.equal(self.head(hidden), nn.functional.linear(hidden, self.head.weight, self.head.bias))
            return super().training_step(batch, batch_idx)

    for exclude, exact in ((("head",), True), ((), False)):
        module = Keeps()
        fit([SimulatedPrecision(**{**INT8, "exclude": exclude})], module=module, max_steps=1)
        assert module.exact is exact


def test_layers_built_in_configure_model_are_converted():
    class Late(Watched):
        def configure_model(self):
            if isinstance(self.body, nn.Sequential) and len(self.body) == 4:
                self.body.append(nn.Linear(8, 8))

    module = Late()
    fit([SimulatedPrecision(**INT8)], module=module, max_steps=2)
    assert module.noted["train"] == ["QuantizedLinear"] * 3


def test_its_checkpoint_is_that_of_the_plain_module(tmp_path):
    path = str(tmp_path / "saved.ckpt")
    run = fit([SimulatedPrecision(**INT8), SaveAt(3, path)], max_steps=3)
    saved = torch.load(path, weights_only=True)
    assert_same(saved["state_dict"], run.module.state_dict(), "saved weights")
    assert "SimulatedPrecision" not in saved
    fit([], ckpt_path=path, max_steps=5)


def test_tied_weights_stay_tied():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 3, bias=False)
            self.other.weight = self.head.weight

        def forward(self, x):
            return super().forward(x) + self.other(self.body(x)).mean(1, keepdim=True)

    module = Tied()
    before = module.head.weight.detach().clone()
    fit([SimulatedPrecision(**{**INT8, "exclude": ("head",)})], module=module, max_steps=3)
    assert module.other.weight is module.head.weight
    assert not module.head.weight.equal(before)


@pytest.mark.parametrize("where", ["train", "validate"])
def test_nothing_is_left_after_a_failure(where):
    module = DictNet()
    module.fail_at = (where, 0)
    trainer = Trainer(**QUIET, plugins=[SimulatedPrecision(**INT8)], max_steps=4, val_check_interval=1)
    if where == "validate":
        module.fail_at = (where, 1)
    with pytest.raises(RuntimeError, match="deliberate failure"):
        trainer.fit(module, Stream(), Stream(2, seed=5))
    assert kinds(module) == ["Linear"] * 2
    assert "log" not in vars(module)
    assert not [each for each in trainer.callbacks if isinstance(each, _first_batch.FirstBatch)]


def test_a_copy_that_a_callback_keeps_can_be_evaluated():
    class Copies(Net):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 2:
                self.__dict__["kept"] = copy.deepcopy(self.body)

    module = Copies()
    fit([SimulatedPrecision(**RANDOM)], module=module, max_steps=4)
    assert type(module.kept[0]).__name__ == "QuantizedLinear"
    assert module.kept(torch.ones(4, 6)).isfinite().all()
    assert kinds(module) == ["Linear"] * 2


# Of torch's own compiler, on every autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_a_compiled_body_trains_alike():
    class Compiled(Net):
        def __init__(self):
            super().__init__(norm=False)
            self.fast = torch.compile(self.body, backend="eager")

        def forward(self, x):
            return self.head(self.fast(x)).sum(1, keepdim=True)

        def state_dict(self, *args, **kwargs):
            return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "fast" not in name}

    class Plain(Net):
        def forward(self, x):
            return self.head(self.body(x)).sum(1, keepdim=True)

    found = fit([SimulatedPrecision(**INT8)], module=Compiled(), max_steps=3)
    expected = fit([SimulatedPrecision(**INT8)], module=Plain(norm=False), max_steps=3)
    assert_same(found.module.state_dict(), expected.module.state_dict(), "the compiled body", 1e-6)


def test_a_transformer_is_quantized_in_validation_too():
    class Encoder(Net):
        def __init__(self):
            super().__init__()
            self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

        def forward(self, x):
            return super().forward(self.block(x[:, None])[:, 0])

    class Notes(Encoder):
        def validation_step(self, batch, batch_idx):
            quantized = self(batch[0])
            for state in quantized_layers(self).values():
                state.enabled = "block" not in state.name
            self.changed = not torch.equal(self(batch[0]), quantized)
            for state in quantized_layers(self).values():
                state.enabled = True

    module, before = Notes(), torch.backends.mha.get_fastpath_enabled()
    fit([SimulatedPrecision(**INT8)], module=module, validation=Stream(1), max_steps=2, val_check_interval=1)
    assert module.changed
    assert before
    assert torch.backends.mha.get_fastpath_enabled()


# ----------------------------------------------------------------------------- the first batch


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
        plugin = SimulatedPrecision(**RANDOM, check_gradients=check)
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


# ----------------------------------------------------------------------------- stochastic rounding


def test_a_run_with_stochastic_rounding_resumes_bit_by_bit(tmp_path):
    path = str(tmp_path / "saved.ckpt")

    def run(*others, **settings):
        plugins = [SimulatedPrecision(**RANDOM), *others]
        return fit(plugins, validation=Stream(2, seed=5), val_check_interval=2, max_steps=9, **settings)

    whole = run(SaveAt(4, path))
    assert torch.load(path, weights_only=True)["SimulatedPrecision"] == {"batches": 4}
    resumed = run(ckpt_path=path)
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run")
    assert len(resumed.logged) >= 7
    assert resumed.logged == whole.logged[-len(resumed.logged) :]
    other = fit([SimulatedPrecision(**RANDOM, seed=1)], max_steps=9)
    assert differences(other.module.state_dict(), whole.module.state_dict())


def test_ranks_draw_apart_and_end_alike_and_resume(workers: Pair, tmp_path):
    first, second = workers.run("precision.simulated_runs:random_rounding_job", folder=str(tmp_path))
    assert not torch.equal(first["outputs"], second["outputs"])
    for rank in (first, second):
        assert torch.equal(rank["outputs"], rank["resumed"])


# ----------------------------------------------------------------------------- settings


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
        ({"estimator": "ste"}, "estimator='ste'"),
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


def test_exponent_biases_are_searched_once_and_kept(tmp_path):
    class Notes(Net):
        def __init__(self):
            super().__init__()
            self.inputs = []
            self.body[0].register_forward_pre_hook(lambda layer, x: self.inputs.append(x[0].clone()))

        def training_step(self, batch, batch_idx):
            state = quantized_layers(self)["body.0"]
            self.used = [*getattr(self, "used", []), (state.weights.exponent_bias, state.activations.exponent_bias)]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.validated = quantized_layers(self)["body.0"].weights.exponent_bias

    def plugin():
        settings = {"weights": "e2m1", "activations": "e2m1", "gradients": None, "scaling": "none", "exclude": ()}
        return SimulatedPrecision(**settings, search_bias=True, check_gradients=False)

    path, module, stream = str(tmp_path / "saved.ckpt"), Notes(), Stream(2, seed=5)
    weight = module.body[0].weight.detach().clone()
    own = plugin()
    whole = fit([own, SaveAt(2, path)], module=module, max_steps=4)
    expected = (search_exponent_bias(weight, "e2m1"), search_exponent_bias(module.inputs[0], "e2m1"))
    assert module.used[1:] == [expected] * 4
    assert module.used[0] == (None, None)  # the search itself, of exact products
    Trainer(**QUIET, plugins=[own]).validate(module, stream, verbose=False)
    assert module.validated == expected[0]
    fresh = Notes()
    resumed = fit([plugin()], module=fresh, ckpt_path=path, max_steps=4)
    assert fresh.used == [expected] * 2
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run")
    fit([own], module=(third := Notes()), max_steps=1)
    assert third.used == [(None, None), expected]
    with pytest.raises(ValueError, match=r"search_bias of SimulatedPrecision needs a pass of its own.*ManualNet"):
        fit([plugin()], module=ManualNet(), max_steps=1)


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
