"""Adapters in a run: what they start from, what trains, and that nothing else of the run is changed by it."""

import copy
from typing import Any

import pytest
import torch
from adapter_runs import INITS, Net, Samples, adapters, fit, loader, outputs
from adapter_starts import AtStart, started
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_stable.peft import merge_adapters
from lightning_stable.peft._record import find_record
from lightning_stable.testing.harness import QUIET

SHIFTING = ("olora", "pissa", "lora_ga", "corda")


@pytest.mark.parametrize(
    ("init", "kind"),
    [*((init, "gpt2") for init in INITS), ("pissa", "llama"), ("eva", "llama"), ("default", "mlp"), ("lora_ga", "mlp")],
)
def test_the_function_is_kept_and_only_adapters_train(init: str, kind: str) -> None:
    pristine = Net(kind)
    before = copy.deepcopy(pristine.state_dict())
    _, start = started(init, kind)
    expected = outputs(pristine, kind)
    assert (start.outputs - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert start.train
    assert all(".default" in name for name in start.train)
    moved = [n for n, value in before.items() if n.endswith("weight") and n not in start.state]
    for name in moved:  # adapted layers
        base = start.state[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(base, before[name]) == (init not in SHIFTING), name
    assert moved


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "lora_ga", "eva", "svfit"])
def test_a_start_does_not_hang_on_what_the_run_drew_before(init: str) -> None:
    starts = []
    for seed in (1, 2):
        module, start = Net(), AtStart()
        fit(module, adapters(init), start, steps=1, seed=seed, data=loader(shuffle=False))
        starts.append(start.state)
    assert all(torch.equal(value, starts[1][name]) for name, value in starts[0].items())
    _, other = started(init, seed=3)
    drawn = init in ("default", "gaussian", "orthogonal")
    changed = [n for n in other.state if ".default" in n and not torch.equal(other.state[n], starts[0][n])]
    assert bool(changed) or not drawn


@pytest.mark.parametrize(("init", "workers"), [("pissa", 0), ("lora_ga", 0), ("lora_ga", 1), ("eva", 0)])
def test_training_sees_the_batches_that_it_sees_without_adapters(init: str, workers: int) -> None:
    plain, module, states = Net(), Net(), []
    settings = {"num_workers": workers, "persistent_workers": bool(workers)}
    for net, callbacks in ((plain, []), (module, [adapters(init)])):
        generator = torch.Generator().manual_seed(8)
        start = AtStart()
        fit(net, *callbacks, start, steps=6, data=loader(generator=generator, **settings))
        states.append((start.numbers, generator.get_state()))
    assert len(plain.seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, module.seen, strict=True))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])


def test_data_passes_leave_no_trace_in_buffers_logs_or_gradients() -> None:
    class Logs(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.logged = dict(trainer.callback_metrics)
            self.gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.norm = pl_module.model.norm.running_mean.clone()
            self.training = [part.training for part in pl_module.modules()]

    for init in ("lora_ga", "eva"):
        for mode in ("eval", "train"):
            logs = Logs()
            fit(Net(), adapters(init, init_mode=mode), logs, steps=1)
            assert logs.logged == {}
            assert logs.gradients == []
            assert torch.equal(logs.norm, Net().model.norm.running_mean)
            assert all(logs.training)


def test_a_head_that_trains_and_parameters_that_do_not_are_as_asked() -> None:
    _, start = started("pissa", trainable=["head.*", "model.first.bias"])
    others = [name for name in start.train if "lora_" not in name]
    assert sorted(others) == ["head.bias", "head.weight", "model.first.base_layer.bias"]


def test_modules_to_save_and_a_config_object_work() -> None:
    from peft import LoraConfig

    from lightning_stable.peft.adapters import Adapters

    config = LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])
    module = Net()
    fit(module, Adapters(config, init="pissa"), steps=2)
    assert config.init_lora_weights is True  # the user's own is as it was
    train = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert any("second.modules_to_save.default" in name for name in train)
    trained = outputs(module, "mlp")
    merge_adapters(module)
    assert isinstance(module.model.second, nn.Linear)
    assert torch.allclose(outputs(module, "mlp"), trained, atol=1e-5)


def test_dora_keeps_the_function_with_a_shifted_base() -> None:
    _, start = started("pissa", config={"use_dora": True})
    expected = outputs(Net(), "mlp")
    assert (start.outputs - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_whole_module_and_other_methods_of_peft_are_adapted() -> None:
    module = Net()
    fit(module, adapters("olora", model=None, config={"target_modules": ["model.first", "head"], "r": 1}), steps=2)
    assert hasattr(module.head, "lora_A")
    other = Net()
    fit(other, adapters("default", config={"peft_type": "LOHA"}), steps=2)
    found = find_record(other)
    assert found is not None
    assert found[2].config["peft_type"] == "LOHA"


def test_merging_at_the_end_gives_plain_layers_that_compute_the_same() -> None:
    twin, module = Net(), Net()
    fit(twin, adapters("pissa"), steps=5)
    fit(module, adapters("pissa", merge_on_end=True), steps=5)
    assert type(module.model.first) is nn.Linear
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.state_dict().keys() == Net().state_dict().keys()
    assert torch.allclose(outputs(module, "mlp"), outputs(twin, "mlp"), atol=1e-5)
    # A further fit is an ordinary one, with new adapters.
    fit(module, adapters("olora", merge_on_end=True), steps=2)
    assert type(module.model.first) is nn.Linear


def test_a_second_fit_goes_on_with_the_same_adapters() -> None:
    module, callback = Net(), adapters("lora_ga")
    trainer = fit(module, callback, steps=3)
    weight, record = module.model.first.lora_A["default"].weight, find_record(module)
    before = outputs(module, "mlp")
    trainer.validate(module, loader(shuffle=False), verbose=False)
    trainer.test(module, loader(shuffle=False), verbose=False)
    assert torch.equal(outputs(module, "mlp"), before)
    fit(module, callback, steps=3)
    fit(module, adapters("lora_ga"), steps=3)  # another object of the same settings
    assert module.model.first.lora_A["default"].weight is weight
    assert find_record(module)[2] is record[2]
    assert not torch.equal(outputs(module, "mlp"), before)


def test_without_a_fit_the_module_stays_plain() -> None:
    module = Net()
    trainer = Trainer(callbacks=[adapters("eva")], **QUIET)
    with pytest.warns(UserWarning, match="runs as the plain base"):
        trainer.validate(module, loader(shuffle=False), verbose=False)
    with pytest.warns(UserWarning, match="runs as the plain base"):
        trainer.predict(module, loader(shuffle=False))
    assert find_record(module) is None
    assert module.state_dict().keys() == Net().state_dict().keys()


def test_a_model_built_in_configure_model_is_adapted() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.made = self.model
            del self.model

        def configure_model(self) -> None:
            if not hasattr(self, "model"):
                self.model = self.made
                del self.made

    module = Late()
    trainer = fit(module, adapters("lora_ga"), steps=3)
    twin = Net()
    fit(twin, adapters("lora_ga"), steps=3)
    assert torch.equal(outputs(module, "mlp"), outputs(twin, "mlp"))
    trainer.test(module, loader(shuffle=False), verbose=False)


def test_wraps_are_gone_after_a_failure_and_the_module_trains_on() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            raise RuntimeError("stop here")

    module, callback = Net(), adapters("pissa")
    names = set(vars(module))
    with pytest.raises(RuntimeError, match="stop here"):
        fit(module, callback, Fails(), steps=5)
    assert not {"on_load_checkpoint", "on_save_checkpoint", "setup"} & (set(vars(module)) - names)
    fit(module, callback, steps=2)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions_keep_the_function_at_the_start(precision: str) -> None:
    for init in ("pissa", "lora_ga", "eva"):
        module, start = Net(), AtStart()
        with torch.no_grad():
            expected = outputs(Net(), "mlp").double()

        class Look(AtStart):
            def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                x = Samples("mlp").x[:6].to(next(pl_module.parameters()).dtype)
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    self.outputs = pl_module.eval()(x).double()
                pl_module.train()

        start = Look()
        fit(module, adapters(init), start, steps=2, precision=precision)
        error = (start.outputs - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if precision == "64-true" else 2e-2), init
        dtype = module.model.first.lora_A["default"].weight.dtype
        assert dtype == {"bf16-true": torch.bfloat16, "bf16-mixed": torch.float32}.get(precision, torch.float64)


def test_adapters_of_a_base_in_half_precision_are_float32() -> None:
    module = Net()
    module.model.first.to(torch.bfloat16)
    module.model.first.register_forward_pre_hook(lambda _layer, args: (args[0].bfloat16(),))
    module.model.first.register_forward_hook(lambda _layer, _args, output: output.float())
    fit(module, adapters("pissa", config={"target_modules": ["second"]}), steps=1)
    half = Net().bfloat16()
    fit(half, adapters("pissa"), steps=0)
    assert half.model.second.lora_A["default"].weight.dtype == torch.float32
    assert half.model.second.base_layer.weight.dtype == torch.bfloat16


def test_fast_runs_iterable_data_and_a_shorter_epoch_work() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            data, index = Samples("mlp"), 0
            while True:
                yield data[index % len(data)]
                index += 1

    fit(Net(), adapters("eva"), data=DataLoader(Endless(), batch_size=4))
    fit(Net(), adapters("eva", init_options={"rho": 1.0}, config={"r": 2}), fast_dev_run=2)
    fit(Net(), adapters("lora_ga"), overfit_batches=2, data=loader(shuffle=False))
    with pytest.warns(UserWarning, match="3 batches, fewer than init_batches=9"):
        fit(Net(), adapters("lora_ga", init_batches=9), data=loader(size=12))


def test_a_line_says_what_was_done(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    import logging

    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        started("lora_ga")
    told = " ".join(caplog.messages) + capsys.readouterr().err
    assert "2 layers have adapters of rank 4, started by 'lora_ga'" in told
    train, total = 4 * (12 + 20) + 4 * (20 + 16), 12 * 20 + 20 + 2 * 20 + 20 * 16 + 16 + 16 + 1
    assert f"{train} of {train + total} parameters train" in told
    assert "3 batches in" in told
    assert "MiB" in told


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_data_passes_show_their_progress_as_the_run_does(kind: Any, capfd: pytest.CaptureFixture[str]) -> None:
    fit(Net(), adapters("lora_ga"), kind(), steps=1, enable_progress_bar=True)
    told = capfd.readouterr()
    # What rich shows is gone when the pass is over, and without a terminal never was.
    assert kind is RichProgressBar or "Adapters: first batches" in told.out + told.err
    fit(Net(), adapters("lora_ga"), steps=1)
    told = capfd.readouterr()
    assert "first batches" not in told.out + told.err


def test_gradients_reach_layers_within_checkpointed_segments() -> None:
    module = Net("llama")
    model = module.model
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": True})
    _, start = started("lora_ga", "llama", module=module)
    _, plain = started("lora_ga", "llama")
    name = "model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert torch.allclose(start.state[name], plain.state[name], atol=1e-4)
    before = module.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.clone()
    fit(module, adapters("lora_ga", "llama"), steps=2)
    assert not torch.equal(module.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, before)


def test_a_dataset_that_draws_by_itself_goes_on_as_without_a_data_pass() -> None:
    class Draws(Samples):
        def __init__(self) -> None:
            super().__init__("mlp")
            self.generator = torch.Generator().manual_seed(4)

        def __getitem__(self, index: int) -> Any:
            return self.x[index] + torch.randn(12, generator=self.generator), self.y[index]

    plain, module = Net(), Net()
    for net, callbacks in ((plain, []), (module, [adapters("lora_ga")])):
        fit(net, *callbacks, steps=4, data=DataLoader(Draws(), batch_size=4))
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, module.seen, strict=True))
