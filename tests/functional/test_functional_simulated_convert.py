"""Converting layers in place and back, what it leaves as it was, observers, copies and compilation."""

import copy
import io

import pytest
import torch
from functional.simulated_nets import INT4, convnet, mlp, train
from oracles.simulated_twin import quantized
from torch import nn

from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import (
    LayerQuantization,
    QuantizedConv2d,
    QuantizedLinear,
    convert,
    quantized_layers,
    restore,
    unconvertible,
)

# ----------------------------------------------------------------------------- converting and back


def test_converting_changes_the_class_alone_and_restoring_gives_it_back():
    net = convnet()
    hooked, x = [], torch.randn(2, 2, 4, 4, dtype=torch.float64)
    net[0].register_forward_hook(lambda *args: hooked.append(1))
    parts, parameters, keys, before = list(net), list(net.parameters()), list(net.state_dict()), net(x)
    assert convert(net, weights=INT4) == ["0", "2", "4"]
    assert [type(part) for part in net][::2] == [QuantizedConv2d, QuantizedConv2d, QuantizedLinear]
    assert all(a is b for a, b in zip(net, parts, strict=True))
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == keys
    assert not torch.equal(net(x), before)
    net.load_state_dict(convnet().state_dict())
    restore(net)
    assert [type(part) for part in net] == [type(part) for part in convnet()]
    assert not quantized_layers(net)
    assert all("quantization" not in vars(part) for part in net)
    assert torch.equal(net(x), before)
    assert len(hooked) == 3


def test_nothing_quantized_and_disabled_are_bit_equal_to_the_plain_layer():
    x, plain = torch.randn(7, 6, dtype=torch.float64), mlp()
    inert, disabled = mlp(), mlp()
    convert(inert)
    convert(disabled, weights=INT4, activations=INT4, gradients=INT4)
    for state in quantized_layers(disabled).values():
        state.enabled = False
    expected = train(plain, x)
    assert all(a.equal(b) for a, b in zip(train(inert, x), expected, strict=True))
    assert all(a.equal(b) for a, b in zip(train(disabled, x), expected, strict=True))
    for state in quantized_layers(disabled).values():
        state.enabled = True
    assert not train(disabled, x)[0].equal(train(plain, x)[0])


def test_converting_again_gives_the_new_settings():
    net = mlp()
    convert(net, weights=INT4)
    convert(net, activations=INT4, include=["2"])
    layers = quantized_layers(net)
    assert layers["2"].weights is None
    assert layers["2"].activations is INT4
    assert layers["0"].weights is INT4
    restore(net)
    assert type(net[2]) is nn.Linear


def test_names_choose_layers():
    net = nn.ModuleDict({"body": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "lm_head": nn.Linear(2, 2)})
    assert convert(net, weights=INT4, exclude=["*head*"]) == ["body.0", "body.1"]
    assert type(net["lm_head"]) is nn.Linear
    restore(net)
    assert convert(net, weights=INT4, include=["body.[0]", "lm_*"]) == ["body.0", "lm_head"]
    restore(net)
    with pytest.raises(ValueError, match=r"include=\['x'\].*'body.0', 'body.1', 'lm_head'") as caught:
        convert(net, weights=INT4, include=["x"])
    assert "ModuleDict" in str(caught.value)
    with pytest.raises(ValueError, match="are none"):
        convert(nn.Sequential(nn.ReLU()), weights=INT4)


def test_a_layer_under_two_names_is_one_and_excluded_by_either():
    shared = nn.Linear(2, 2)
    net = nn.ModuleDict({"one": shared, "other": shared, "third": nn.Linear(2, 2)})
    assert convert(net, weights=INT4) == ["one", "third"]
    restore(net)
    assert convert(net, weights=INT4, exclude=["other"]) == ["third"]


def test_tied_weights_stay_tied():
    embedding, one, two = nn.Embedding(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    one.weight = two.weight = embedding.weight
    net = nn.Sequential(embedding, one, two)
    convert(net, weights=INT4)
    assert one.weight is two.weight is embedding.weight
    assert len(list(net.parameters())) == 1
    ids = torch.arange(6)
    low = quantized(embedding.weight.detach(), ("int4", "row"))
    torch.testing.assert_close(net(ids), embedding.weight @ low.t() @ low.t())
    before = embedding.weight.detach().clone()
    net(ids).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    restore(net)
    assert one.weight is two.weight is embedding.weight
    assert not embedding.weight.equal(before)


def test_what_cannot_be_converted_is_named_with_a_reason():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Renamed(nn.Linear):
        pass

    net = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "own": Own(2, 2),
            "lazy": nn.LazyLinear(2),
            "up": nn.ConvTranspose2d(2, 2, 2),
            "renamed": Renamed(2, 2),
            "rnn": nn.GRU(2, 2),
        }
    )
    assert convert(net, weights=INT4) == ["renamed"]
    assert isinstance(net["renamed"], Renamed)
    assert type(net["attention"].out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert type(net["own"]) is Own
    reasons = unconvertible(net)
    assert list(reasons) == ["attention", "own", "lazy", "up", "rnn"]
    assert "out_proj" in reasons["attention"]
    assert "forward of its own" in reasons["own"]
    assert "first batch" in reasons["lazy"]
    assert "ConvTranspose2d" in reasons["up"]
    assert list(unconvertible(net, exclude=["own", "lazy"])) == ["attention", "up", "rnn"]
    restore(net)
    assert type(net["renamed"]) is Renamed


def test_a_width_that_groups_do_not_divide_is_padded_or_an_error_that_names_the_layer():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv1d(2, 2, 3))
    padded, strict = (Quantizer("int4", scaling="group:4", padding=padding) for padding in (True, False))
    convert(net, weights=padded)
    restore(net)
    with pytest.raises(ValueError, match="weights of layer '0'"):
        convert(net, weights=strict)
    with pytest.raises(ValueError, match="gradients of layer '1'"):
        convert(net, weights=padded, gradients=strict)
    with pytest.raises(ValueError, match="weights of layer '2'"):
        convert(net, weights=strict, include=["2"])
    assert not quantized_layers(net)
    assert convert(net, weights=strict, activations=strict, include=["1"]) == ["1"]


# ----------------------------------------------------------------------------- observers, copies, compilation


def test_observers_see_each_operand_and_change_nothing():
    net, plain, x = mlp(), mlp(), torch.randn(7, 6, dtype=torch.float64)
    seen = {}
    for each in (net, plain):
        convert(each, weights=INT4, activations=INT4, gradients=Quantizer("int8", scaling="row"))

    def look(name, operand, exact, low):
        assert not exact.requires_grad
        assert not low.requires_grad
        assert not torch.is_grad_enabled()
        seen[name, operand] = exact.clone(), low.clone()

    for state in quantized_layers(net).values():
        state.observers.append(look)
    assert all(a.equal(b) for a, b in zip(train(net, x, 2), train(plain, x, 2), strict=True))
    assert set(seen) == {(name, operand) for name in "024" for operand in ("weights", "activations", "gradients")}
    exact, low = seen["2", "weights"]
    torch.testing.assert_close(low, quantized(exact, ("int4", "row")))
    exact, low = seen["4", "gradients"]
    torch.testing.assert_close(low, quantized(exact, ("int8", "row")))
    seen.clear()
    with torch.no_grad():
        net(x)
    assert {operand for _, operand in seen} == {"weights", "activations"}


def test_a_copy_is_converted_too_and_unobserved():
    net, x = mlp(), torch.randn(7, 6, dtype=torch.float64)
    convert(net, weights=INT4, generator=torch.Generator())
    seen = []
    state = quantized_layers(net)["0"]
    state.observers.append(lambda *args: seen.append(args))
    other = copy.deepcopy(net)
    assert torch.equal(other(x), net(x))
    assert len(seen) == 1
    assert quantized_layers(other)["0"].generator is state.generator
    quantized_layers(other)["0"].enabled = False
    assert state.enabled
    restore(other)
    assert type(other[0]) is nn.Linear
    assert isinstance(state, LayerQuantization)
    assert type(net[0]) is QuantizedLinear


def test_a_converted_module_is_pickled_with_its_settings():
    net, x = mlp(), torch.randn(7, 6, dtype=torch.float64)
    convert(net, weights=INT4)
    content = io.BytesIO()
    torch.save(net, content)
    content.seek(0)
    assert torch.equal(torch.load(content, weights_only=False)(x), net(x))


def test_stochastic_rounding_draws_from_the_generator_alone():
    layer, x = nn.Linear(6, 5), torch.randn(7, 6)
    generator, state = torch.Generator(), torch.get_rng_state()
    convert(layer, weights=Quantizer("int4", scaling="row", rounding="stochastic"), generator=generator)
    found = []
    for seed in (1, 2, 1):
        generator.manual_seed(seed)
        found.append(layer(x))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_multiplies_what_was_quantized_in_its_own_dtype():
    layer, x = nn.Linear(6, 5), torch.randn(7, 6)
    convert(layer, weights=INT4, activations=INT4, gradients=INT4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        low = [quantized(each.detach(), ("int4", "row")).bfloat16() for each in (x, layer.weight)]
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, low[0] @ low[1].t() + layer.bias.bfloat16())
    y.float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32


# Of torch's own compiler, on every autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
def test_torch_compile_gives_the_same_and_follows_the_switch():
    plain, x = nn.Linear(6, 5), torch.randn(7, 6)
    net = copy.deepcopy(plain)
    convert(net, weights=INT4, activations=INT4, gradients=INT4)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    expected, found = net(x), compiled(x)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    found.sum().backward()
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    for state in quantized_layers(net).values():
        state.enabled = False
    torch.testing.assert_close(compiled(x), plain(x))
