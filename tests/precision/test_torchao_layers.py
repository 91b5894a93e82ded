"""What the precision plugins on torchao share: layers chosen, switched in place, checked, and given back."""

import copy
import importlib.metadata
import logging
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from precision.torchao_runs import LOW, PLUGINS, STEPS, Mlp, batches, train, trainer_of
from precision.torchao_samples import each, needs_torchao
from torch import nn

from lightning_stable.precision import _torchao
from lightning_stable.precision._torchao_layers import LayerSwitch, Sample, choose_layers, probe
from lightning_stable.testing.harness import assert_same

pytestmark = needs_torchao
CPU = torch.device("cpu")


def sample_of(plugin: Any) -> Sample:
    return plugin._convert_sample(nn.Sequential(nn.Linear(16, 16)), CPU)


def linears(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def test_torchao_is_imported_late_and_quietly() -> None:
    code = (
        "import sys, torch; from torch import nn\n"
        "torch.cuda.is_available = lambda: False\n"
        "from lightning_stable.precision.float8 import Float8Precision\n"
        "from lightning_stable.precision.int8 import Int8Precision\n"
        "from lightning_stable.precision._torchao import _quietly\n"
        "plugins = Float8Precision(), Int8Precision()\n"
        "assert 'torchao' not in sys.modules\n"
        "with _quietly():\n"
        "    for plugin in plugins:\n"
        "        plugin._convert_sample(nn.Sequential(nn.Linear(16, 16)), torch.device('cpu'))\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@each
def test_a_missing_or_old_torchao_is_told_with_the_cure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cure = r'needs torchao 0\.18\.0 or newer.*pip install "lightning-stable\[torchao\]"'

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(_torchao, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=f"{PLUGINS[name].__name__} {cure}"):
        PLUGINS[name]()
    monkeypatch.setattr(_torchao, "version", lambda package: "0.9.0")
    with pytest.raises(ImportError, match=r"0\.9\.0 is installed"):
        PLUGINS[name]()


@each
@pytest.mark.parametrize(
    ("found", "allowed"),
    [("2.6.0", False), ("2.10.2+cu128", False), ("2.11.0", True), ("2.11.0a0+nv26.3", True), ("2.13.0+cpu", True)],
)
def test_a_torch_that_is_too_old_for_torchao_is_told_with_the_cure(
    name: str, found: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_torchao, "version", {"torchao": "0.18.0", "torch": found}.__getitem__)
    if allowed:
        PLUGINS[name]()
        return
    told = f"{PLUGINS[name].__name__} needs torch 2.11 or newer, for torchao 0.18.0, and {found} is installed"
    with pytest.raises(ImportError, match=re.escape(told)) as caught:
        PLUGINS[name]()
    assert 'pip install "torch>=2.11"' in str(caught.value)
    assert "SimulatedPrecision" in str(caught.value)


@each
def test_layers_are_switched_in_place_and_given_back(name: str) -> None:
    module = Mlp()
    seen = []
    module.net[0].register_forward_hook(lambda *_: seen.append(1))
    before = [(id(layer), id(layer.weight), type(layer), set(vars(layer))) for layer in linears(module)]
    keys, parameters = list(module.state_dict()), [id(parameter) for parameter in module.parameters()]
    train(PLUGINS[name](), module)
    assert module.kinds == [LOW[name]] * STEPS
    assert len(seen) == STEPS
    assert before == [(id(layer), id(layer.weight), type(layer), set(vars(layer))) for layer in linears(module)]
    assert keys == list(module.state_dict())
    assert parameters == [id(parameter) for parameter in module.parameters()]


@each
def test_layers_are_given_back_after_an_exception(name: str) -> None:
    class Failing(Mlp):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("deliberate")

    module = Failing()
    with pytest.raises(RuntimeError, match="deliberate"):
        train(PLUGINS[name](), module)
    assert module.kinds == [LOW[name]]
    assert [type(layer) for layer in linears(module)] == [nn.Linear] * 3


@each
def test_it_converts_for_each_stage_and_says_so_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    module, plugin = Mlp(), PLUGINS[name]()
    trainer = trainer_of(plugin, max_steps=2, val_check_interval=2)
    trainer.fit(module, batches(), batches())
    weights = copy.deepcopy(module.state_dict())
    trainer.validate(module, batches())
    trainer_of(plugin).test(module, batches())
    validated = f"validated {LOW[name]}"
    assert module.kinds == [LOW[name]] * 2 + [validated] * 3 * STEPS
    assert_same(dict(module.state_dict()), dict(weights), "weights after validation and test")
    (line,) = [text for text in caplog.messages if text.startswith(type(plugin).__name__)]
    assert "2 of 3 linear layers compute in" in line
    assert "Left out: head (excluded by '*head*')." in line


@each
def test_converting_twice_is_converting_once(name: str) -> None:
    module, plugin = Mlp(), PLUGINS[name]()
    trainer = trainer_of(plugin)
    trainer.strategy.connect(module)
    module.trainer = trainer
    for _ in range(2):
        assert plugin.convert_module(module) is module
        plugin.connect(module, [], [])
        assert [type(layer).__name__ for layer in linears(module.net)] == [LOW[name]] * 2
    plugin.teardown()
    plugin.teardown()
    assert [type(layer) for layer in linears(module)] == [nn.Linear] * 3


@each
def test_a_switched_layer_can_be_copied(name: str) -> None:
    layer, x = nn.Linear(16, 32), torch.randn(4, 16)
    switch = LayerSwitch(layer, sample_of(PLUGINS[name]()))
    exact = layer(x)
    switch.turn(True)
    switch.turn(True)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not torch.equal(layer(x), exact)
    switch.turn(False)
    assert torch.equal(layer(x), exact)


@each
def test_what_a_layer_has_under_a_name_of_torchao_comes_back(name: str) -> None:
    layer = nn.Linear(16, 16)
    layer.config = "mine"
    switch = LayerSwitch(layer, sample_of(PLUGINS[name]()))
    switch.turn(True)
    assert layer.config != "mine"
    switch.turn(False)
    assert layer.config == "mine"


@each
@pytest.mark.parametrize("settings", [{}, {"recipe": "rowwise"}, {"recipe": "rowwise_with_gw_hp"}], ids=str)
def test_inputs_of_any_shape_give_what_their_rows_give(name: str, settings: dict[str, str]) -> None:
    if settings and name != "float8":
        return
    torch.manual_seed(0)
    layer, rows = nn.Linear(16, 32), torch.randn(12, 16)
    exact = layer(rows)
    LayerSwitch(layer, sample_of(PLUGINS[name](**settings))).turn(True)
    expected = layer(rows)
    assert expected.shape == exact.shape
    assert torch.equal(layer(rows.reshape(3, 4, 16)).reshape(12, 32), expected)
    # Of shape (4, 3, 16), and not contiguous.
    turned = rows.reshape(4, 3, 16).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer(turned).reshape(12, 32), expected)
    with torch.inference_mode():
        assert torch.equal(layer(rows), expected)
        assert torch.equal(layer(torch.randn(2, 5, 16)).isfinite(), torch.ones(2, 5, 32, dtype=torch.bool))
    assert layer(rows[0]).shape == (32,)
    assert layer(rows[:0]).shape == (0, 32)
    layer(rows[:0]).sum().backward()
    layer(turned).sum().backward()


@each
def test_rows_that_kernels_want_besides_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    layer, x, gradient = nn.Linear(16, 32), torch.randn(3, 7, 16), torch.randn(3, 7, 32)
    sample = sample_of(PLUGINS[name]())
    found = []
    for multiple in (1, 16):
        switch = LayerSwitch(layer, sample._replace(attributes={**sample.attributes, "row_multiple": multiple}))
        switch.turn(True)
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        found.append((output, *torch.autograd.grad(output, (leaf, layer.weight, layer.bias), gradient)))
        switch.turn(False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.narrow = nn.Linear(16, 10)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.again = self.blocks[0]
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})(16, 16)
        self.lm_head = nn.Linear(16, 32)


def test_what_cannot_be_converted_is_left_out_with_its_reason() -> None:
    layers, left_out = choose_layers("Mine", Odd(), ["*"], ["*head*"], 16)
    assert list(layers) == ["blocks.0", "blocks.1"]
    assert left_out == {
        "attention.out_proj": "nn.MultiheadAttention multiplies with its weight itself",
        "narrow": "16 to 10 are no multiples of 16",
        "own": "a Own with a forward pass of its own",
        "lm_head": "excluded by '*head*'",
    }
    assert list(choose_layers("Mine", Odd(), ["blocks.*", "narrow"], ["*.0"], 2).layers) == ["narrow", "blocks.1"]


def test_a_compiled_part_has_the_names_of_the_part() -> None:
    module = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(16, 16)), backend="eager"))
    assert list(choose_layers("Mine", module, ["0.0"], [], 16).layers) == ["0.0"]


def test_filters_that_match_nothing_are_told_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"Mine: include='mlp.\*' matches no linear layer. .*blocks.0 \(16 to 16\)"):
        choose_layers("Mine", Odd(), ["blocks.*", "mlp.*"], [], 16)
    with pytest.raises(ValueError, match=r"Mine: include=\['narrow'\] and exclude=\[\] leave no linear layer"):
        choose_layers("Mine", Odd(), ["narrow"], [], 16)
    with pytest.raises(ValueError, match="Mine converts linear layers, and ReLU has none"):
        choose_layers("Mine", nn.ReLU(), ["*"], [], 16)


@each
def test_a_filter_that_matches_nothing_stops_the_fit(name: str) -> None:
    module = Mlp()
    with pytest.raises(ValueError, match=r"include='nett.\*' matches no linear layer.*net.0 \(16 to 32\)"):
        train(PLUGINS[name](include="nett.*"), module)
    assert not module.losses
    train(PLUGINS[name](), module, max_steps=1)


class NoOp(nn.Linear):
    """Claims to quantize, and does not."""


class Nonsense(nn.Linear):
    """Its gradients are nonsense."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.01 * super().forward(x) + 1e3 * (x.sum() - x.sum().detach())


class Broken(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel")


def test_the_check_finds_a_torchao_that_does_nothing_or_nonsense() -> None:
    layer, every = nn.Linear(16, 16), (True, True, True)
    weight = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"Mine: torchao does not quantize net\.0: the output is bit for bit"):
        probe("Mine", "net.0", layer, Sample(NoOp, {"row_multiple": 1}, every))
    with pytest.raises(RuntimeError, match=r"Mine: the gradient of the input of net\.0 .* is off by"):
        probe("Mine", "net.0", layer, Sample(Nonsense, {"row_multiple": 1}, every))
    with pytest.raises(RuntimeError, match=r"Mine: torchao cannot compute net\.0 .*: no kernel"):
        probe("Mine", "net.0", layer, Sample(Broken, {"row_multiple": 1}, every))
    assert type(layer) is nn.Linear
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, weight)


@each
def test_the_check_runs_in_a_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = PLUGINS[name]()
    monkeypatch.setattr(plugin, "_convert_sample", lambda *_: Sample(NoOp, {"row_multiple": 1}, (True, True, True)))
    module = Mlp()
    with pytest.raises(RuntimeError, match=f"{PLUGINS[name].__name__}: torchao does not quantize net.0"):
        train(plugin, module)
    assert not module.losses


@each
@pytest.mark.parametrize("change", ["zero", "frozen", "not finite", "without bias", "bfloat16"])
def test_the_check_leaves_honest_layers_alone(name: str, change: str) -> None:
    layer = nn.Linear(16, 32, bias=change != "without bias")
    layer.requires_grad_(change != "frozen")
    with torch.no_grad():
        if change == "zero":
            layer.weight.zero_()
        if change == "not finite":
            layer.weight[0, 0] = float("inf")
    layer.to(torch.bfloat16 if change == "bfloat16" else torch.float32)
    sample, random = sample_of(PLUGINS[name]()), torch.get_rng_state()
    probe("Mine", "net.0", layer, sample)
    assert torch.equal(torch.get_rng_state(), random)
