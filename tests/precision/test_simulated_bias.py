"""The search of exponent biases by the simulated precision, on the first batches of a fit."""

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_stable._glue.quiet import is_quiet
from lightning_stable.functional._simulated_layers import Quantized
from lightning_stable.functional.exponent_bias import add_output_errors, bias_errors, new_table
from lightning_stable.functional.quantize import Quantizer, quantize, search_exponent_bias
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision import _bias_search
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import QUIET, ManualNet, Net, SaveAt, Stream, assert_same, fit
from lightning_stable.testing.workers import Pair


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
        search = {"search_bias": True, "bias_search_batches": 1, "bias_search_metric": "tensor"}
        return SimulatedPrecision(**settings, **search, check_gradients=False)

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


class Sees(Net):
    """Notes the biases of its first layer in each step that counts, and that layer's inputs."""

    def __init__(self):
        super().__init__()
        self.used, self.inputs, self.weights = [], [], []

    def training_step(self, batch, batch_idx):
        state, layer = quantized_layers(self)["body.0"], self.body[0]
        if not is_quiet(self):
            self.used.append([state.weights.exponent_bias, state.activations.exponent_bias])
            self.inputs.append(batch[0].clone())
            self.weights.append(layer.weight.detach().clone())
        return super().training_step(batch, batch_idx)


E2M1 = {"weights": "e2m1", "activations": "e2m1", "gradients": None, "scaling": "none", "exclude": ()}


FEW = 10


@pytest.fixture
def few(monkeypatch):
    """Fewer candidates, which takes less time."""
    monkeypatch.setattr(_bias_search, "CANDIDATES", FEW)


def search(**settings):
    return SimulatedPrecision(**E2M1, search_bias=True, check_gradients=False, **settings)


def low(x, bias):
    return x if bias is None else quantize(x, Quantizer("e2m1", exponent_bias=bias))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("batches", [1, 3])
def test_the_biases_follow_the_product_over_the_first_batches(batches):
    module = Sees()
    fit([search(bias_search_batches=batches)], module=module, max_steps=5)
    tables = [new_table(operand, "e2m1", FEW) for operand in (module.weights[0], module.inputs[0])]
    for step in range(5):
        if step < batches:
            weight, x = module.weights[step], module.inputs[step]
            tables = add_output_errors(lambda w, i, x=x, weight=weight: low(x, i) @ low(weight, w).t(), *tables)
        assert module.used[step] == pytest.approx([table.best for table in tables])


def test_the_operands_own_error_adds_up_over_inputs():
    module = Sees()
    fit([search(bias_search_batches=2, bias_search_metric="tensor")], module=module, max_steps=3)
    weight, x, more = module.weights[0], *module.inputs[:2]
    table = new_table(x, "e2m1")
    both = table.plus(bias_errors(x, "e2m1", table.biases)).plus(bias_errors(more, "e2m1", table.biases))
    assert module.used[0] == [search_exponent_bias(weight, "e2m1"), search_exponent_bias(x, "e2m1")]
    assert module.used[1:] == [[module.used[0][0], both.best]] * 2


@pytest.mark.usefixtures("few")
def test_many_samples_are_searched_on_some_of_them(monkeypatch):
    seen = []

    def product(self, x, weight):
        seen.append(len(x))
        return original(self, x, weight)

    original = Quantized.product
    monkeypatch.setattr(Quantized, "product", product)
    monkeypatch.setattr(_bias_search, "ROWS", 3)
    fit([search(bias_search_batches=1)], max_steps=1)
    assert set(seen) == {3}
    assert len(seen) == 2 * (1 + 2 * 3 * FEW)  # of both layers


@pytest.mark.usefixtures("few")
def test_a_search_that_was_cut_off_goes_on_bit_by_bit(tmp_path):
    path = str(tmp_path / "saved.ckpt")
    whole = fit([search(bias_search_batches=4), SaveAt(2, path)], module=Sees(), max_steps=6)
    state = torch.load(path, weights_only=True)["SimulatedPrecision"]
    assert (state["bias_batches"], len(state["bias_tables"]["body.0"][1])) == (2, 3)
    resumed = fit([search(bias_search_batches=4)], module=Sees(), ckpt_path=path, max_steps=6)
    assert resumed.module.used == whole.module.used[2:]
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run")
    assert whole.plugins[0].state_dict()["bias_tables"] == {}


def test_ranks_have_the_biases_of_the_first(workers: Pair, tmp_path):
    first, second = workers.run("precision.simulated_runs:bias_job", folder=str(tmp_path))
    assert first["used"] == second["used"]
    for rank in (first, second):
        assert rank["resumed"] == rank["used"][2:]


def test_bfloat16_does_not_blur_what_is_searched():
    exact, mixed = Sees(), Sees()
    fit([search(bias_search_batches=1)], module=exact, max_steps=1)
    fit([search(bias_search_batches=1, compute="bf16-mixed")], module=mixed, max_steps=1)
    assert mixed.used == exact.used  # of the first layer, whose input is the same
