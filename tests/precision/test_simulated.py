"""The simulated precision in a Trainer: what it converts and when, and stochastic rounding over a run."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from precision.simulated_runs import INT8, STOCHASTIC, Watched, kinds
from torch import nn
from torch.utils.data import DataLoader

from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision import _first_batch
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import QUIET, DictNet, Net, SaveAt, Stream, assert_same, differences, fit
from lightning_stable.testing.workers import Pair


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
    fit([SimulatedPrecision(**STOCHASTIC)], module=module, max_steps=4)
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


# ----------------------------------------------------------------------------- stochastic rounding


def test_a_run_with_stochastic_rounding_resumes_bit_by_bit(tmp_path):
    path = str(tmp_path / "saved.ckpt")

    def run(*others, **settings):
        plugins = [SimulatedPrecision(**STOCHASTIC), *others]
        return fit(plugins, validation=Stream(2, seed=5), val_check_interval=2, max_steps=9, **settings)

    whole = run(SaveAt(4, path))
    assert torch.load(path, weights_only=True)["SimulatedPrecision"] == {"batches": 4}
    resumed = run(ckpt_path=path)
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run")
    assert len(resumed.logged) >= 7
    assert resumed.logged == whole.logged[-len(resumed.logged) :]
    other = fit([SimulatedPrecision(**STOCHASTIC, seed=1)], max_steps=9)
    assert differences(other.module.state_dict(), whole.module.state_dict())


def test_ranks_draw_apart_and_end_alike_and_resume(workers: Pair, tmp_path):
    first, second = workers.run("precision.simulated_runs:random_rounding_job", folder=str(tmp_path))
    assert not torch.equal(first["outputs"], second["outputs"])
    for rank in (first, second):
        assert torch.equal(rank["outputs"], rank["resumed"])
