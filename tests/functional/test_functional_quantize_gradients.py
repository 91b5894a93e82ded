"""Gradients through quantization: straight-through, masked where saturated, ReSTE's, and quantized on the way back."""

import math

import pytest
import torch

from lightning_stable.functional import _rounding
from lightning_stable.functional.quantize import (
    Quantizer,
    quantize,
    quantize_gradient,
    reste_exponent,
    straight_through,
)

EVERY = [
    ("e4m3", "none"),
    ("e8m7", "none"),
    ("e8m3", "tensor"),
    ("e2m1", "row"),
    ("int8", "channel"),
    ("int4", "group:16"),
    ("int4", "shift:2"),
    ("mxfp8", "none"),
    ("nvfp4", "none"),
    ("shift3", "row"),
    ("binary", "row"),
    ("ternary", "tensor"),
]


def gradient_of(x, quantizer, weight, **kwargs):
    x = x.clone().requires_grad_()
    made = straight_through(x, quantizer, **kwargs)
    (made * weight).sum().backward()
    return made.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "scaling"), EVERY)
def test_the_gradient_passes_straight_through_exactly_the_quantized_values(name, scaling, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 40, generator=generator) * 300).to(dtype)
    weight = torch.randn(5, 40, generator=generator).to(dtype)
    quantizer = Quantizer(name, scaling)
    made, gradient = gradient_of(x, quantizer, weight)
    assert torch.equal(made, quantize(x, quantizer))
    assert torch.equal(gradient, weight)
    assert made.dtype == gradient.dtype == dtype


def test_without_a_gradient_to_give_nothing_is_tracked():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert not straight_through(x, Quantizer("e4m3")).requires_grad
    with torch.no_grad():
        assert not straight_through(x.requires_grad_(), Quantizer("e4m3", passes_saturated=False)).requires_grad


@pytest.mark.parametrize(
    ("quantizer", "largest"),
    [
        (Quantizer("e4m3", passes_saturated=False), 448.0),
        (Quantizer("int4", passes_saturated=False), 7.0),
        (Quantizer("e2m1", passes_saturated=False, exponent_bias=0.0), 12.0),
        (Quantizer("binary", passes_saturated=False), 1.0),
        (Quantizer("ternary", passes_saturated=False), 1.0),
        (Quantizer("shift3", passes_saturated=False), 8.0),
    ],
)
def test_past_the_largest_value_the_gradient_is_masked_if_asked(quantizer, largest):
    above = math.nextafter(largest, math.inf)
    x = torch.tensor([0.0, largest, above, -largest, -above, math.inf, -math.inf, math.nan, 0.3], dtype=torch.float64)
    weight = torch.arange(1.0, 10.0, dtype=torch.float64)
    inside = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 1], dtype=torch.float64)
    made, gradient = gradient_of(x, quantizer, weight)
    assert torch.equal(gradient, weight * inside)
    assert torch.equal(made.nan_to_num(), quantize(x, quantizer).nan_to_num())
    everywhere = Quantizer(quantizer.format, exponent_bias=quantizer.exponent_bias)
    assert torch.equal(gradient_of(x, everywhere, weight)[1], weight)


def test_a_masked_gradient_is_zero_even_where_what_comes_back_is_infinite():
    _, gradient = gradient_of(
        torch.tensor([1.0, 900.0]), Quantizer("e4m3", passes_saturated=False), torch.tensor([1.0, math.inf])
    )
    assert gradient.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("scaling", ["tensor", "row", "channel", "group:16", "shift:2"])
@pytest.mark.parametrize("name", ["e4m3", "int4", "e8m3", "shift3"])
def test_a_scale_by_the_largest_magnitude_masks_nothing(name, scaling):
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 1000
    _, gradient = gradient_of(x, Quantizer(name, scaling, passes_saturated=False), torch.ones(8, 40))
    assert torch.equal(gradient, torch.ones(8, 40))


def test_block_scales_mask_what_their_rounding_cuts_off():
    # The scale of a block with a largest magnitude of 7.9 is 1, and the largest e2m1 is 6.
    x = torch.full((40,), 0.5)
    x[0], x[1], x[33] = 7.9, 6.0, 7.9
    _, gradient = gradient_of(x, Quantizer("mxfp4", passes_saturated=False), torch.ones(40))
    assert gradient.nonzero().flatten().tolist() == [i for i in range(40) if i not in (0, 33)]
    # Kept exact it is not saturated.
    _, gradient = gradient_of(x, Quantizer("mxfp4", passes_saturated=False, keep_outliers=1), torch.ones(40))
    assert gradient.min() == 1


def test_the_means_of_binary_and_ternary_mask_what_is_larger():
    x = torch.tensor([[0.1, -0.2, 0.3, -3.4], [1.0, 1.0, -1.0, 1.0]])
    _, gradient = gradient_of(x, Quantizer("binary", "row", passes_saturated=False), torch.ones(2, 4))
    assert gradient.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    x = torch.tensor([[0.1, -2.0, 3.0, -3.4]])
    _, gradient = gradient_of(x, Quantizer("ternary", "row", passes_saturated=False), torch.ones(1, 4))
    assert gradient.tolist() == [[1, 1, 0, 0]]


def reste_by_hand(value, exponent):
    size = abs(value)
    if size > 1.5:
        return 0.0
    if size <= 0.1:
        return 0.1 ** (1 / exponent) / 0.1
    return size ** ((1 - exponent) / exponent) / exponent


@pytest.mark.parametrize("exponent", [1.0, 1.7, 3.0])
@pytest.mark.parametrize("scaling", ["none", "row"])
def test_reste_is_the_slope_of_a_root_between_its_bounds(scaling, exponent):
    x = torch.tensor([[0.0, 0.05, -0.1, 0.100001, -0.5, 1.0, 1.5, -1.500001, 40.0]], dtype=torch.float64)
    weight = torch.arange(1.0, 10.0, dtype=torch.float64).unsqueeze(0)
    quantizer = Quantizer("binary", scaling, estimator="reste")
    made, gradient = gradient_of(x, quantizer, weight, reste_exponent=exponent)
    scale = float(x.abs().mean()) if scaling == "row" else 1.0
    assert torch.equal(made, quantize(x, Quantizer("binary", scaling)))
    expected = [
        [scale * w * reste_by_hand(v, exponent) for v, w in zip(x[0].tolist(), weight[0].tolist(), strict=True)]
    ]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_reste_joins_the_mask_of_saturation():
    x = torch.tensor([[0.2, 0.2, 0.2, 1.2]])
    plain = gradient_of(x, Quantizer("binary", "row", estimator="reste"), torch.ones(1, 4))[1]
    masked = gradient_of(x, Quantizer("binary", "row", estimator="reste", passes_saturated=False), torch.ones(1, 4))[1]
    assert plain.min() > 0
    assert masked.tolist() == [[*plain[0, :3].tolist(), 0.0]]


def test_restes_exponent_rises_along_a_cosine():
    assert [reste_exponent(p) for p in (0.0, 1.0)] == [1.0, pytest.approx(3.0)]
    assert reste_exponent(0.5) == pytest.approx(1 + 2 * (1 - math.sqrt(0.5)))
    assert reste_exponent(0.3, 1.0) == 1.0
    assert reste_exponent(1.0, 5.0) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reste_exponent(-0.1), r"progress=-0.1 is not in \[0, 1\]"),
        (lambda: reste_exponent(1.1), r"progress=1.1 is not in"),
        (lambda: reste_exponent(math.nan), "progress=nan"),
        (lambda: reste_exponent(0.5, 0.5), "final=0.5 is not a finite number from 1 on"),
        (lambda: reste_exponent(0.5, math.inf), "final=inf"),
        (
            lambda: straight_through(torch.ones(2), Quantizer("binary"), reste_exponent=0.9),
            "reste_exponent=0.9 is below 1",
        ),
        (lambda: straight_through(torch.ones(2, dtype=torch.int32), Quantizer("e4m3")), "int32 cannot be quantized"),
        (lambda: straight_through(torch.ones(5), Quantizer("mxfp8", padding=False)), "no multiple of the 32"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize(("name", "scaling"), EVERY)
def test_a_gradient_is_quantized_on_its_way_back_and_the_values_are_left(name, scaling, passes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 40, generator=generator, requires_grad=True)
    weight = torch.randn(5, 40, generator=generator) * 500
    quantizer = Quantizer(name, scaling, passes_saturated=passes)
    made = quantize_gradient(x, quantizer)
    assert torch.equal(made, x)
    (made * weight).sum().backward()
    # The mask of saturation is about gradients of what is quantized: here that is the gradient itself.
    assert torch.equal(x.grad, quantize(weight, quantizer))
    assert not torch.equal(x.grad, weight)


@pytest.mark.parametrize(("passes", "expected"), [(True, [2.0, 4.0]), (False, [2.0, 0.0])])
def test_a_second_derivative_passes_a_quantized_gradient_straight_through(passes, expected):
    x = torch.tensor([1.0, 300.0], requires_grad=True)
    quantizer = Quantizer("e4m3", passes_saturated=passes)
    (first,) = torch.autograd.grad((quantize_gradient(x, quantizer) ** 2).sum(), x, create_graph=True)
    assert first.tolist() == [2.0, 448.0]
    (second,) = torch.autograd.grad((first * torch.tensor([1.0, 2.0])).sum(), x)
    assert second.tolist() == expected


def test_stochastic_rounding_of_a_gradient_repeats_with_its_generator():
    weight = torch.randn(50, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer("int4", "tensor", "stochastic")

    def backward(seed):
        x = torch.zeros(50, requires_grad=True)
        (quantize_gradient(x, quantizer, generator=torch.Generator().manual_seed(seed)) * weight).sum().backward()
        return x.grad

    assert torch.equal(backward(1), backward(1))
    assert not torch.equal(backward(1), backward(2))
    expected = quantize(weight, quantizer, generator=torch.Generator().manual_seed(1))
    assert torch.equal(backward(1), expected)


def test_a_linear_layer_sees_quantized_operands_in_all_three_products():
    generator = torch.Generator().manual_seed(4)
    x, w = (
        torch.randn(6, 32, generator=generator, requires_grad=True),
        torch.randn(8, 32, generator=generator, requires_grad=True),
    )
    back = torch.randn(6, 8, generator=generator)
    four, eight = Quantizer("int4", "row"), Quantizer("e5m2", "tensor")
    out = quantize_gradient(straight_through(x, four) @ straight_through(w, four).T, eight)
    (out * back).sum().backward()
    qx, qw, qg = quantize(x, four), quantize(w, four), quantize(back, eight)
    torch.testing.assert_close(out, qx @ qw.T)
    torch.testing.assert_close(x.grad, qg @ qw)
    torch.testing.assert_close(w.grad, qg.T @ qx)


# torch.compile makes an object of each autograd function it meets, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer("e4m3", passes_saturated=False),
        Quantizer("e8m7"),
        Quantizer("int4", "group:16", keep_outliers=2),
    ],
)
def test_a_compiled_layer_does_the_same_in_one_graph_without_casts_that_would_be_dropped(quantizer):
    graphs = []

    def keep(module, example):
        graphs.append(module)
        return module.forward

    def layer(x, w):
        return quantize_gradient(straight_through(x, quantizer) @ straight_through(w, quantizer).T, quantizer)

    generator = torch.Generator().manual_seed(4)
    x, w = torch.randn(6, 40, generator=generator) * 300, torch.randn(8, 40, generator=generator)
    results = []
    for call in (layer, torch.compile(layer, backend=keep, fullgraph=True)):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        out = call(a, b)
        out.square().mean().backward()
        results.append((out.detach(), a.grad, b.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert len(graphs) == 1
    assert "bfloat16" not in str([module.code for module in graphs[0].modules() if hasattr(module, "code")])


def test_the_casts_are_the_fast_way_when_nothing_is_compiled(monkeypatch):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    expected = quantize(x, Quantizer("e8m7"))
    monkeypatch.setattr(_rounding, "_CASTS", {"e8m7": torch.float16})
    assert not torch.equal(quantize(x, Quantizer("e8m7")), expected)
