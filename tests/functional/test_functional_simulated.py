"""Converted layers against products by hand, and what converting leaves as it was."""

import copy
import io

import pytest
import torch
from oracles.simulated_twin import convolution, levels, linear, quantized
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_stable.functional.quantize import Quantizer, quantize, value_table
from lightning_stable.functional.simulated import (
    LayerQuantization,
    QuantizedConv2d,
    QuantizedLinear,
    convert,
    quantized_layers,
    restore,
    unconvertible,
)

# Format and scaling of weights, activations and gradients.
RECIPES = {
    "int8": (("int8", "row"), ("int8", "row"), ("int8", "row")),
    "float8": (("e4m3", "row"), ("e4m3", "tensor"), ("e5m2", "tensor")),
    "int4 in groups": (("int4", "group:4"), ("int4", "group:3"), None),
    "float4 weights alone": (("e2m1", "tensor"), None, None),
    "gradients alone": (None, None, ("e3m2", "row")),
}
INT4 = Quantizer("int4", scaling="row")


def quantizers(recipes):
    made = [None if recipe is None else Quantizer(recipe[0], scaling=recipe[1]) for recipe in recipes]
    return dict(zip(("weights", "activations", "gradients"), made, strict=True))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def convnet():
    torch.manual_seed(2)
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 1)]
    return nn.Sequential(*parts).double()


NETS = {"mlp": (mlp, (7, 6)), "convnet": (convnet, (3, 2, 4, 4))}


def train(net, x, steps=4):
    y = torch.sin(x.flatten(1).sum(1, keepdim=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


# ----------------------------------------------------------------------------- the twin


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m2", "e2m1", "int4", "int8"])
def test_the_twin_has_the_values_of_the_format(name):
    assert levels(name) == value_table(name).tolist()


@pytest.mark.parametrize("recipes", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", NETS)
def test_several_steps_are_those_of_products_by_hand(kind, recipes):
    make, shape = NETS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    net, twin, plain = make(), make(), make()
    convert(net, **quantizers(recipes))
    for part in twin:
        if isinstance(part, nn.Linear):
            part.forward = linear(part, recipes)
        elif isinstance(part, nn.Conv2d):
            part.forward = convolution(part, recipes)
    found, expected, exact = train(net, x), train(twin, x), train(plain, x)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert max(float((mine - other).abs().max()) for mine, other in zip(found, exact, strict=True)) > 1e-4


def test_other_kinds_of_layers_give_the_same_products():
    torch.manual_seed(0)
    recipes = RECIPES["float8"]
    flat, transposed = nn.Linear(6, 5), Conv1D(5, 6)
    along = {1: nn.Conv1d(6, 5, 1), 3: nn.Conv3d(6, 5, 1)}
    with torch.no_grad():
        flat.bias.copy_(torch.randn(5))
        transposed.weight.copy_(flat.weight.t())
        transposed.bias.copy_(flat.bias)
        for dimensions, layer in along.items():
            layer.weight.copy_(flat.weight.reshape(5, 6, *(1,) * dimensions))
            layer.bias.copy_(flat.bias)
    x = torch.randn(7, 6)
    expected = linear(flat, recipes)(x)
    expected.square().sum().backward()
    for layer, shape in [(flat, ()), (transposed, ()), (along[1], (1,)), (along[3], (1, 1, 1))]:
        before = copy.deepcopy(flat.weight.grad)
        layer.zero_grad()
        convert(layer, **quantizers(recipes))
        y = layer(x.reshape(7, 6, *shape)).reshape(7, 5)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        gradient = layer.weight.grad.t() if layer is transposed else layer.weight.grad.reshape(5, 6)
        torch.testing.assert_close(gradient, before)
        flat.weight.grad = before


def test_a_grouped_and_an_unbatched_convolution():
    torch.manual_seed(0)
    whole, x = nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1), torch.randn(4, 5, 5)
    low = copy.deepcopy(whole)
    with torch.no_grad():
        low.weight.copy_(quantized(whole.weight.flatten(1), ("int4", "row")).view_as(whole.weight))
    expected = low(quantized(x.reshape(1, -1), ("int4", "row")).view_as(x))
    convert(whole, weights=INT4, activations=INT4, gradients=INT4)
    torch.testing.assert_close(whole(x), expected)
    torch.testing.assert_close(whole(x[None])[0], expected)


def test_a_scale_of_each_channel_by_shifts_is_one_of_the_channels_of_a_convolution():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    layer, quantizer = nn.Conv1d(3, 4, 1, bias=False), Quantizer("int4", scaling="shift:4")
    convert(layer, activations=quantizer)
    expected = quantize(x.movedim(1, -1), quantizer).movedim(-1, 1)
    torch.testing.assert_close(layer(x), nn.functional.conv1d(expected, layer.weight))


def test_samples_of_many_dimensions_are_rows():
    x = torch.randn(2, 3, 3, 6, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(6, 5, bias=False)
    convert(layer, activations=Quantizer("int4", scaling="row"))
    torch.testing.assert_close(layer(x)[1, 2, 0], layer(x[1, 2, 0]))
    assert layer(x[:0]).shape == (0, 3, 3, 5)


# ----------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("gradients", [None, INT4])
def test_features_with_outliers_multiply_as_they_are(gradients):
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    x[2, 1], x[4, 3] = 9.0, -6.0
    layer = nn.Linear(6, 4, bias=False)
    convert(layer, weights=INT4, activations=INT4, gradients=gradients, outlier_threshold=6.0)
    out, rest = [1, 3], [0, 2, 4, 5]
    # The scales of the input are those of what is left, the weight's those of all of it.
    left = quantized(x[:, rest], ("int4", "row"))
    right = quantized(layer.weight.detach(), ("int4", "row"))
    expected = left @ right[:, rest].t() + x[:, out] @ layer.weight[:, out].t()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad[:, out], x[:, out].sum(0).expand(4, 2))
    torch.testing.assert_close(layer.weight.grad[:, rest], left.sum(0).expand(4, 4))


def test_outliers_of_a_convolution_are_channels_of_its_input():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5)
    x[0, 2, 1, 1] = 7.0
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    exact = layer.weight.detach()
    low, mixed = quantized(exact.flatten(1), ("int4", "row")).view_as(exact).clone(), x.clone()
    low[3:, 0] = exact[3:, 0]  # the first channel of the second group
    mixed[:, 2] = 0
    mixed = quantized(mixed.flatten(1), ("int4", "row")).view_as(x)
    mixed[:, 2] = x[:, 2]
    convert(layer, weights=INT4, activations=INT4, outlier_threshold=6.0)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(mixed, low, groups=2))


def test_outliers_of_a_transposed_layer_are_rows_of_its_weight():
    torch.manual_seed(0)
    flat, layer, x = nn.Linear(6, 5), Conv1D(5, 6), torch.randn(3, 6)
    x[0, 4] = 8.0
    with torch.no_grad():
        layer.weight.copy_(flat.weight.t())
        layer.bias.copy_(flat.bias)
    for each in (flat, layer):
        convert(each, weights=INT4, activations=INT4, outlier_threshold=6.0)
    torch.testing.assert_close(layer(x), flat(x))


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
