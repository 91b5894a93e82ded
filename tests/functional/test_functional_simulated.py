"""Converted layers against products by hand."""

import copy

import pytest
import torch
from functional.simulated_nets import INT4, NETS, quantizers, train
from oracles.simulated_twin import convolution, levels, linear, quantized
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_stable.functional.quantize import Quantizer, quantize, value_table
from lightning_stable.functional.simulated import convert

# Format and scaling of weights, activations and gradients.
RECIPES = {
    "int8": (("int8", "row"), ("int8", "row"), ("int8", "row")),
    "float8": (("e4m3", "row"), ("e4m3", "tensor"), ("e5m2", "tensor")),
    "int4 in groups": (("int4", "group:4"), ("int4", "group:3"), None),
    "float4 weights alone": (("e2m1", "tensor"), None, None),
    "gradients alone": (None, None, ("e3m2", "row")),
}


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
