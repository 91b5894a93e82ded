"""QPiSSA: bases in 4 bits under adapters that start from what four bits keep worst, trained, saved and taken out."""

import copy
import logging
import re
import sys
from typing import Any

import pytest
import torch
from adapter_runs import Net, adapters, fit, loader, outputs
from oracles import four_bit_twin as twin
from qpissa_runs import NF4, trained
from test_adapters_checkpoint import Rest, without_dropout
from torch import nn

from lightning_stable.callbacks.ema import EMA
from lightning_stable.functional._factors import shift
from lightning_stable.functional.pissa import pissa_pair
from lightning_stable.peft import load_adapters
from lightning_stable.peft._initialise import factors_of
from lightning_stable.peft._quantized import QuantizedLinear, quantized_bases, rounded
from lightning_stable.peft._record import KEY, find_record, fingerprint
from lightning_stable.peft._targets import tuner_layers
from lightning_stable.peft.reorthogonalise_lora import ReorthogonaliseLoRA
from lightning_stable.precision.int8 import Int8Precision
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import SaveAt

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def linear(*shape: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Linear(shape[1], shape[0], bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 64), (20, 12), (7, 5), (3, 130), (24, 16), (10, 96), (1, 2)])
def test_values_are_the_nearest_of_sixteen(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    plain = linear(*shape, dtype=dtype)
    layer = QuantizedLinear(plain, form)
    assert layer.matrix().dtype == dtype
    # Of two values that are equally near either may be taken.
    ours, nearest = (
        (found - plain.weight.detach()).abs() for found in (layer.matrix(), twin.rounded(plain.weight, form))
    )
    assert torch.allclose(ours, nearest, atol=1e-6 if dtype == torch.float32 else 2e-3)
    assert torch.equal(layer.matrix(), rounded(plain.weight, form))
    # Held once more it is the same, so that a base that is written in floating point can be held again.
    assert torch.equal(QuantizedLinear(layer.plain(), form).matrix(), layer.matrix())
    size = plain.weight.numel()
    assert (layer.weight.nbytes, layer.scales.nbytes) == ((size + 1) // 2, 4 * -(-size // 64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_and_differentiates_as_a_linear_layer(training: bool, bias: bool) -> None:
    plain = linear(20, 48, bias=bias)
    layer = QuantizedLinear(plain, "nf4").train(training)
    plain.weight.data = twin.rounded(plain.weight)
    results = []
    for each in (layer, plain):
        x = torch.linspace(-1, 1, 2 * 5 * 48).view(2, 5, 48).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            half = each(x.detach())
        with torch.no_grad():
            one = each(x[0, :1])
        results.append([found.detach() for found in (y, x.grad, half, one, *((each.bias.grad,) if bias else ()))])
        each.zero_grad()
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"] * bias


def test_a_cast_and_a_copy_leave_the_codes() -> None:
    layer = QuantizedLinear(linear(20, 12), "nf4")
    mark, matrix = layer.mark(), layer.matrix()
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).bfloat16(), copy.deepcopy(layer).half().float()):
        assert other.mark() == mark
    half = copy.deepcopy(layer).bfloat16()
    assert torch.equal(half.matrix(), matrix.bfloat16())
    assert half.plain().weight.dtype == half.bias.dtype == half(torch.ones(1, 12).bfloat16()).dtype == torch.bfloat16
    other = linear(20, 12)
    other.weight.data[3, 5] = 9.0
    assert QuantizedLinear(other, "nf4").mark() != mark
    state = layer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "weight": torch.uint8,
        "scales": torch.int32,
        "bias": torch.float32,
    }
    fresh = QuantizedLinear(other, "nf4")
    fresh.load_state_dict(state)
    assert fresh.mark() == mark


@pytest.mark.parametrize(("kind", "form"), [("llama", "nf4"), ("mlp", "fp4")])
def test_the_start_is_nearer_to_the_weight_than_four_bits_of_it(kind: str, form: str) -> None:
    errors: dict[int, float] = {}
    for rounds in (1, 5):
        module, pristine = Net(kind, lr=0.0), Net(kind)
        options = {"quantize_residual": form, "rounds": rounds, "iterations": None}
        fit(module, adapters("pissa", kind, init_options=options), steps=1)
        assert sum(isinstance(part, nn.Linear) for part in pristine.modules()) > len(quantized_bases(module)) > 1
        squares = []
        for name, layer in tuner_layers(module.model):
            weight = pristine.model.get_submodule(name).weight.detach()
            a, b = (factor.detach() for factor in factors_of(layer) or ())
            scaling, base = layer.scaling["default"], layer.base_layer.matrix()
            assert torch.allclose(base, twin.rounded(shift(weight, a, b, scaling), form), rtol=1e-6, atol=1e-7)
            if rounds == 1:
                expected = pissa_pair(weight, len(a), scaling, iterations=None)
                assert torch.allclose(b @ a, expected[1] @ expected[0], atol=1e-6)
            off = torch.linalg.vector_norm(weight - base - scaling * b @ a)
            assert off < torch.linalg.vector_norm(weight - twin.rounded(weight, form))
            squares.append(float(off) ** 2)
        errors[rounds] = sum(squares) ** 0.5
        beside = {n: p for n, p in module.named_parameters() if "lora_" not in n and "base_layer" not in n}
        assert all(torch.equal(p, pristine.get_parameter(n)) for n, p in beside.items())
    assert errors[5] < errors[1]


def test_it_says_what_four_bits_took(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lightning_stable.peft._adapt.rank_zero_info", told.append)
    module, pristine = Net(lr=0.0), Net().model
    fit(module, adapters("pissa", init_options=NF4), steps=1)
    whole = off = 0.0
    for name, layer in tuner_layers(module.model):
        weight = pristine.get_submodule(name).weight.detach()
        a, b = factors_of(layer) or ()
        whole += float(weight.square().sum())
        off += float((weight - layer.base_layer.matrix() - 2 * (b @ a).detach()).square().sum())
    assert (
        f"held in nf4 now, 4.5 bits a weight: at the start the adapted weights are off by {(off / whole) ** 0.5:.2%}"
        in (told[0])
    )
    assert "272 of 925 parameters train" in told[0]


def test_training_is_that_of_adapters_on_the_base_in_floating_point() -> None:
    module = without_dropout()
    data = loader(shuffle=False)
    callback = adapters("pissa", init_options=NF4, trainable=["head.*"], config={"bias": "lora_only"})
    trainer = fit(module, callback, SaveAt(0, "start.ckpt"), steps=8, data=data)
    other = without_dropout()
    fit(other, adapters("pissa", init_options=NF4, trainable=["head.*"], config={"bias": "lora_only"}), steps=0)
    start = [base.mark() for base in quantized_bases(other)]
    assert [base.mark() for base in quantized_bases(module)] == start
    for _, layer in tuner_layers(other.model):
        layer.base_layer = layer.base_layer.plain()
        layer.base_layer.bias.requires_grad_()
    assert not quantized_bases(other)
    fit(other, steps=8, data=data)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, other.state_dict()[name], atol=1e-5), name
    assert not torch.equal(module.model.first.base_layer.bias, Net().model.first.bias)
    trainer.save_checkpoint("bias.ckpt")
    loaded = load_adapters(without_dropout(), "bias.ckpt")
    assert torch.equal(outputs(loaded, "mlp"), outputs(module, "mlp"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_trains_and_reloads_in_half_precision(precision: str) -> None:
    module = Net("llama")
    trainer = fit(module, adapters("pissa", "llama", init_options=NF4), steps=4, precision=precision)
    trainer.save_checkpoint("half.ckpt")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {base.dtype for base in quantized_bases(module)} == {dtype}
    assert {base.scales.dtype for base in quantized_bases(module)} == {torch.int32}
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    loaded = load_adapters(Net("llama").to(dtype), "half.ckpt")
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))
    # Half precision widened again: the codes are those of the rounded residual.
    wide = load_adapters(Net("llama"), "half.ckpt")
    assert [base.mark() for base in quantized_bases(wide)] == [base.mark() for base in quantized_bases(module)]


@pytest.mark.parametrize("beside", ["simulated", "int8", "reorthogonalise"])
def test_it_goes_with_plugins_that_change_products_or_adapters(beside: str) -> None:
    callbacks: list[Any] = [ReorthogonaliseLoRA(every_n_steps=2)] if beside == "reorthogonalise" else []
    plugins = {"simulated": [SimulatedPrecision()], "int8": [Int8Precision()]}.get(beside, [])
    module = Net("llama")
    callback = adapters("pissa", "llama", init_options=NF4)
    trainer = fit(module, callback, *callbacks, steps=4, plugins=plugins)
    trainer.save_checkpoint("beside.ckpt")
    loaded = load_adapters(Net("llama"), "beside.ckpt")
    assert [base.mark() for base in quantized_bases(loaded)] == [base.mark() for base in quantized_bases(module)]
    assert len(quantized_bases(module)) == 6
    assert torch.equal(outputs(loaded, "llama"), outputs(module, "llama"))


@pytest.mark.parametrize("save", ["adapter", "full"])
def test_a_run_resumes_bit_by_bit(save: str) -> None:
    settings = {"trainable": ["head.*"], "save": save, "init_options": NF4}
    whole, resumed = without_dropout(), without_dropout()
    data = loader(shuffle=False)
    fit(whole, adapters("pissa", **settings), EMA(decay=0.8), SaveAt(5, "five.ckpt"), steps=10, data=data)
    names = set(torch.load("five.ckpt", weights_only=True)["state_dict"])
    assert ("model.first.base_layer.weight" in names) == ("model.first.base_layer.scales" in names) == (save == "full")
    fit(resumed, adapters("pissa", **settings), EMA(decay=0.8), steps=10, data=Rest(5), seed=9, ckpt_path="five.ckpt")
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_what_a_checkpoint_says_of_it() -> None:
    class All(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)

    module = All()
    fit(module, adapters("pissa", init_options=NF4), steps=2).save_checkpoint("all.ckpt")
    trained()
    small, record = (torch.load("last.ckpt", weights_only=True)[key] for key in ("state_dict", KEY))
    assert (record["format"], record["residual"], list(record["held"])) == (2, "nf4", ["first", "second"])
    assert record["base"]["first"] == fingerprint(Net().model.first.weight)
    assert sum(value.numel() for value in small.values()) == 4 * (12 + 20 + 20 + 16) + 41
    # An optimizer that was given all parameters does not make the codes some that train.
    everything = torch.load("all.ckpt", weights_only=True)
    assert not {n for n in everything["state_dict"] if n.endswith((".scales", "base_layer.weight"))}
    fit(Net(), adapters("pissa"), steps=1).save_checkpoint("plain.ckpt")
    plain = torch.load("plain.ckpt", weights_only=True)[KEY]
    assert (plain["format"], plain["residual"], plain["held"]) == (1, "", {})
    # As a version wrote it that knew nothing of it.
    old = torch.load("plain.ckpt", weights_only=True)
    del old[KEY]["residual"], old[KEY]["held"]
    assert not quantized_bases(load_adapters(Net(), old))


def test_a_full_checkpoint_goes_on_any_base_and_says_nothing_of_its_codes() -> None:
    module, other = trained(save="full"), Net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    loaded = load_adapters(other, "last.ckpt")
    assert torch.equal(outputs(loaded, "mlp"), outputs(module, "mlp"))
    assert [base.mark() for base in quantized_bases(loaded)] == [base.mark() for base in quantized_bases(module)]


def test_codes_that_come_out_otherwise_are_told() -> None:
    trained()
    checkpoint = torch.load("last.ckpt", weights_only=True)
    checkpoint[KEY]["held"]["second"] += "0"
    with pytest.warns(UserWarning, match=r"1 of 2 bases have other codes in nf4 .* such as that of 'second'"):
        loaded = load_adapters(Net(), checkpoint)
    # From now on these are the codes that it trains on.
    now = find_record(loaded)[2].held
    assert now == {name: layer.base_layer.mark() for name, layer in tuner_layers(loaded.model)}


def refused(words: str, module: Net, config: dict[str, Any], **settings: Any) -> None:
    """Fit, expect an error that has these words, and that the module is as it was."""
    before = copy.deepcopy(module.state_dict())
    callback = adapters("pissa", config=config, **{"init_options": NF4, **settings})
    with pytest.raises(ValueError, match=re.escape(words)):
        fit(module, callback, steps=1, precision=settings.get("precision", "32-true"))
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_layers_that_cannot_be_held_are_refused() -> None:
    refused(
        "layer 'transformer.h.0.attn.c_attn' is a Conv1D: only torch.nn.Linear",
        Net("gpt2"),
        {"target_modules": ["c_attn"]},
    )
    refused("and config has use_dora", Net(), {"use_dora": True})
    refused("'first' has a weight that trainable names", Net(), {}, trainable=["model.first.weight"])
    refused("layer 'first' is in float64", Net().double(), {})

    class Own(nn.Linear):
        pass

    mine = Net()
    mine.model.first = Own(12, 20)
    refused("layer 'first' is a Own", mine, {})


def test_another_format_on_a_resume_is_refused() -> None:
    trained(steps=2)
    for options, here in (({}, "None"), ({"quantize_residual": "fp4"}, "'fp4'")):
        with pytest.raises(ValueError, match=f"quantize_residual is {here} here and 'nf4' in the checkpoint"):
            fit(Net(), adapters("pissa", init_options=options), ckpt_path="last.ckpt")
    # How the factors were found is over then.
    fit(Net(), adapters("pissa", init_options={**NF4, "rounds": 4}), steps=3, ckpt_path="last.ckpt")


def test_without_bitsandbytes_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trained(steps=1)
    callback, module = adapters("pissa", init_options=NF4), Net()
    before = outputs(module, "mlp")
    with monkeypatch.context() as patch:
        patch.setattr("bitsandbytes.__version__", "0.46.1")
        with pytest.raises(ValueError, match=r"bitsandbytes 0\.50\.0 or later, and this is 0\.46\.1"):
            adapters("pissa", init_options=NF4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = r"needs bitsandbytes, .* pip install 'lightning-stable\[bitsandbytes\]'"
    with pytest.raises(ValueError, match=f"Adapters: .*{words}"):
        adapters("pissa", init_options=NF4)
    with pytest.raises(ValueError, match=f"Adapters: .*{words}"):
        fit(module, callback)
    with pytest.raises(ValueError, match=f"load_adapters: .*{words}"):
        load_adapters(module, "last.ckpt")
    assert torch.equal(outputs(module, "mlp"), before)
    adapters("pissa")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize_residual": "nf5"}, "quantize_residual='nf5' is unknown. Choose one of 'nf4', 'fp4'"),
        ({"quantize_residual": True}, "quantize_residual=True is unknown"),
        ({**NF4, "rounds": 0}, "rounds=0"),
        ({**NF4, "rounds": 1.5}, "rounds=1.5"),
        ({"rounds": 2}, "rounds=2 is of quantize_residual"),
    ],
)
def test_settings_are_refused_at_construction(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        adapters("pissa", init_options=options)
    adapters("pissa", init_options={"quantize_residual": None, "rounds": 1})


def test_the_message_about_a_package_that_is_not_needed_is_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
    log.warning("Something else.")
    assert [record.message for record in caplog.records] == ["Something else."]
