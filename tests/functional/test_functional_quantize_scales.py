"""Quantization with scales: every way to share one against the slow twin, blocks, outliers, and what is refused."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from oracles import quantize_twin as twin

from lightning_stable.functional.quantize import (
    Quantizer,
    parse_format,
    quantize,
    search_exponent_bias,
    value_table,
)

SHAPES = [(), (1,), (37,), (6, 48), (5, 70), (3, 4, 33), (4, 3, 3, 3), (2, 5, 4, 4), (2, 3, 2, 2, 3)]
SCALINGS = ["tensor", "channel", "row", "group:16", "group:7", "group:100", "shift:4", "shift:1"]
BLOCKS = ["mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3", "mxfp4", "nvfp4"]
SCALED = ["e4m3", "e5m2", "e2m1", "e8m3", "e3m0", "int8", "int4", "int2", "shift3"]


def tensor(shape, seed=0, dtype=torch.float32):
    """Numbers whose size differs from row to row, with some zeros and now and then a row of nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10 ** torch.randint(-4, 3, (*shape[:-1], 1) if shape else (), generator=generator)
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    if len(shape) == 2:
        x[1] = 0
    return x.to(dtype)


def by_twin(x, *args, **kwargs):
    values = twin.quantize(x.double().flatten().tolist(), tuple(x.shape) or (1,), *args, **kwargs)
    return torch.tensor(values, dtype=torch.float64).reshape(x.shape).to(x.dtype)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", SCALED)
def test_each_way_to_share_a_scale_is_that_of_the_twin(name, scaling):
    for seed, shape in enumerate(SHAPES):
        x = tensor(shape, seed)
        for rounding in ("nearest", "truncate"):
            expected = by_twin(x, name, scaling, rounding)
            assert same(quantize(x, Quantizer(name, scaling, rounding)), expected), (shape, rounding)


@pytest.mark.parametrize("name", BLOCKS)
def test_block_formats_are_those_of_the_twin(name):
    for seed, shape in enumerate([*SHAPES, (8, 256), (2, 8, 4, 8)]):
        x = tensor(shape, seed)
        for rounding in ("nearest", "truncate"):
            assert same(quantize(x, Quantizer(name, rounding=rounding)), by_twin(x, name, "none", rounding)), shape


@pytest.mark.parametrize("name", [*BLOCKS, "e4m3", "int4"])
def test_float64_is_quantized_in_float64(name):
    scaling = "none" if name in BLOCKS else "row"
    x = tensor((6, 70), 3, torch.float64)
    expected = by_twin(x, name, scaling, fit=float)
    assert same(quantize(x, Quantizer(name, scaling)), expected)
    assert not torch.equal(expected, by_twin(x, name, scaling)) or name.startswith("mx")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*BLOCKS, "e4m3", "int4"])
def test_half_precision_is_quantized_in_float32_and_rounded_at_the_end(name, dtype):
    quantizer = Quantizer(name, "none" if name in BLOCKS else "group:16")
    x = tensor((6, 70), 4).clamp(-1e3, 1e3).to(dtype)
    assert torch.equal(quantize(x, quantizer), quantize(x.float(), quantizer).to(dtype))


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-37, 1e-20, 1e20, 3e38])
@pytest.mark.parametrize("name", [*BLOCKS, "e4m3", "int8", "shift3"])
def test_scales_at_the_ends_of_float32(name, size):
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).double() * size).float()
    scaling = "none" if name in BLOCKS else "row"
    made = quantize(x, Quantizer(name, scaling))
    assert made.isfinite().all()
    assert same(made, by_twin(x, name, scaling))


@pytest.mark.parametrize("scaling", ["tensor", "row", "channel", "group:16", "group:9"])
@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_binary_and_ternary_are_those_of_the_twin(name, scaling):
    for seed, shape in enumerate(SHAPES):
        x = tensor(shape, seed)
        for keep in (0, 2):
            made = quantize(x, Quantizer(name, scaling, keep_outliers=keep))
            expected = by_twin(x, name, scaling, keep=keep)
            torch.testing.assert_close(made, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("scaling", ["tensor", "row", "channel", "group:16"])
@pytest.mark.parametrize("name", [f"int{k}" for k in range(2, 9)])
def test_asymmetric_integers_are_those_of_the_twin(name, scaling):
    for (seed, shape), shift in product(enumerate(SHAPES), (0.0, 3.0, -50.0)):
        x = tensor(shape, seed) + shift
        for rounding in ("nearest", "truncate"):
            made = quantize(x, Quantizer(name, scaling, rounding, asymmetric=True))
            assert same(made, by_twin(x, name, scaling, rounding, asymmetric=True)), (shape, shift, rounding)


def test_asymmetric_integers_use_every_code_and_keep_zero():
    x = torch.cat([torch.zeros(1), torch.linspace(-1.0, 14.0, 1000)])
    made = quantize(x, Quantizer("int4", "tensor", asymmetric=True))
    assert made.unique().tolist() == [float(code) for code in range(-1, 15)]
    assert made[0] == 0
    assert len(quantize(x, Quantizer("int4", "tensor")).unique()) < 10


@pytest.mark.parametrize("keep", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("int4", "group:16"),
        ("int4", "row"),
        ("e4m3", "tensor"),
        ("e4m3", "none"),
        ("e2m1", "channel"),
        ("mxfp4", "none"),
        ("nvfp4", "none"),
    ],
)
def test_outliers_stay_exact_and_out_of_the_scale(name, scaling, keep):
    for seed, shape in enumerate(SHAPES):
        # All magnitudes differ, so that which are the largest is no matter of order.
        count = math.prod(shape)
        x = (
            torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            .float()
            .add(1.0)
            .mul(0.37)
            .reshape(shape)
        )
        x = x * torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.5, -1.0, 1.0)
        made = quantize(x, Quantizer(name, scaling, keep_outliers=keep))
        assert same(made, by_twin(x, name, scaling, keep=keep)), shape
        if keep == 1000:
            assert torch.equal(made, x)


def test_an_outlier_kept_lets_the_others_keep_their_levels():
    x = torch.cat([torch.linspace(-1, 1, 127), torch.tensor([1000.0])])
    without = quantize(x, Quantizer("int4", "tensor"))
    kept = quantize(x, Quantizer("int4", "tensor", keep_outliers=1))
    assert without[:-1].abs().max() == 0
    assert kept[-1] == 1000
    assert len(kept[:-1].unique()) == 15


def test_asymmetric_integers_keep_outliers():
    x = tensor((4, 64), 2)
    made = quantize(x, Quantizer("int4", "group:16", keep_outliers=2, asymmetric=True))
    assert same(made, by_twin(x, "int4", "group:16", keep=2, asymmetric=True))


def test_blocks_are_on_their_own_grid_and_rounding_twice_is_rounding_once():
    x = tensor((8, 96), 1)
    for name in BLOCKS[:-1]:
        once = quantize(x, Quantizer(name))
        assert torch.equal(quantize(once, Quantizer(name)), once)
        top = x.reshape(-1, 32).abs().amax(1, keepdim=True)
        elements = once.reshape(-1, 32) / torch.exp2(
            torch.floor(torch.log2(top)) - math.frexp(parse_format(name).largest)[1] + 1
        )
        assert set(elements[top.squeeze(1) > 0].abs().double().flatten().tolist()) <= set(value_table(name).tolist())


def test_an_nvfp4_block_below_the_smallest_scale_becomes_zeros():
    x = torch.full((2, 16), 1.0)
    x[1] *= 2.0**-20
    made = quantize(x, Quantizer("nvfp4"))
    assert made[1].tolist() == [0.0] * 16
    torch.testing.assert_close(made[0], x[0])
    x[1, 3] = math.nan
    assert quantize(x, Quantizer("nvfp4")).isnan().any()


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        *((name, "none") for name in BLOCKS),
        ("e4m3", "row"),
        ("int4", "group:16"),
        ("int4", "shift:2"),
        ("binary", "row"),
        ("ternary", "row"),
        ("shift3", "row"),
    ],
)
def test_an_infinity_becomes_finite_and_a_nan_stays(name, scaling):
    x = tensor((4, 32), 7)
    x[0, 3], x[2, 5] = math.inf, -math.inf
    made = quantize(x, Quantizer(name, scaling))
    assert made.isfinite().all()
    assert made[0, 3] > 1e38 * (name != "nvfp4")
    assert made[2, 5] < -1e38 * (name != "nvfp4")
    x[0, 4] = math.nan
    made = quantize(x, Quantizer(name, scaling))
    assert made[0, 4].isnan()
    # All that share its scale become NaN with it, and no others where a group's scale is its own.
    assert made[0, :16].isnan().all()
    if scaling in ("row", "group:16") or name.startswith("mx"):
        assert made[1:].isfinite().all()


@pytest.mark.parametrize(
    "name", [f"int{k}" for k in range(2, 9)] + [f"e{x}m{y}" for x in range(1, 5) for y in range(5)]
)
def test_infinity_times_its_scale_is_finite_again_in_every_format(name):
    for dtype in (torch.float32, torch.float64):
        made = quantize(
            torch.tensor([math.inf, -math.inf, torch.finfo(dtype).max], dtype=dtype), Quantizer(name, "row")
        )
        assert made.isfinite().all()
        assert made[0] == made[2] == -made[1]


def test_asymmetric_integers_with_infinity_and_nan():
    x = torch.tensor(
        [[1.0, -2.0, math.inf, 0.0], [1.0, -math.inf, math.inf, 0.0], [1.0, math.nan, 2.0, 0.0], [1.0, -2.0, 3.0, 0.0]]
    )
    made = quantize(x, Quantizer("int4", "row", asymmetric=True))
    assert made[[0, 1, 3]].isfinite().all()
    assert made[0, 2] > 1e38
    assert made[1, 1] < -1e37
    assert made[2].isnan().all()


@pytest.mark.parametrize("scaling", [*SCALINGS, "none"])
def test_a_tensor_of_zeros_stays_one(scaling):
    for name in ("e4m3", "int8", "e8m7", *BLOCKS):
        if scaling == "none" or name not in BLOCKS:
            assert torch.equal(quantize(torch.zeros(3, 40), Quantizer(name, scaling)), torch.zeros(3, 40))
    assert torch.equal(quantize(torch.zeros(3, 40), Quantizer("int4", "row", asymmetric=True)), torch.zeros(3, 40))
    if not scaling.startswith("shift"):
        level = float(scaling == "none")
        assert torch.equal(quantize(torch.zeros(3, 40), Quantizer("binary", scaling)), torch.full((3, 40), level))
        assert torch.equal(quantize(torch.zeros(3, 40), Quantizer("ternary", scaling)), torch.zeros(3, 40))


def test_channels_in_powers_of_two_share_the_ranges_of_their_group():
    sizes = torch.tensor([8.0, 5.0, 4.0, 3.9, 1.0, 0.01])
    x = torch.linspace(-1, 1, 101).unsqueeze(1) * sizes
    made = quantize(x, Quantizer("int4", "shift:4"))
    # Halvings of 8: 8 and 5 share the first, 4 and 3.9 the second, 1 has the fourth, and the last for want of more.
    steps = torch.tensor([8.0, 8.0, 4.0, 4.0, 1.0, 1.0]) / 7
    torch.testing.assert_close(made, torch.round(x / steps) * steps)


@pytest.mark.parametrize(
    ("name", "scaling"), [("int4", "row"), ("int4", "group:16"), ("e1m2", "row"), ("mxfp4", "none")]
)
def test_stochastic_rounding_with_scales_is_right_on_average(name, scaling):
    draws = 20_000
    row = torch.randn(32, generator=torch.Generator().manual_seed(2))
    # The largest value of each block is one of the grid, so that nothing saturates.
    row[0], row[16] = 6.0, -6.0
    generator = torch.Generator().manual_seed(3)
    made = quantize(row.clamp(-6, 6).expand(draws, 32), Quantizer(name, scaling, "stochastic"), generator=generator)
    # A step is at most 2 here, the deviation of a draw half a step at most: six deviations of the mean.
    widest = 2.0 if name == "mxfp4" else 1.0
    assert float((made.double().mean(0) - row.clamp(-6, 6)).abs().max()) < 6 * widest / 2 / math.sqrt(draws)
    assert (made.std(0) > 0.05).sum() > 20


def test_a_width_that_groups_do_not_divide_is_padded_or_refused():
    x = tensor((3, 40), 1)
    for quantizer, size in (
        (Quantizer("int4", "group:16", padding=False), 16),
        (Quantizer("mxfp8", padding=False), 32),
    ):
        with pytest.raises(ValueError, match=rf"width 40 of a tensor of shape \(3, 40\) is no multiple of the {size}"):
            quantize(x, quantizer)
        whole = tensor((3, 64), 1)
        assert torch.equal(quantize(whole, quantizer), quantize(whole, replace(quantizer, padding=True)))
    longer = torch.cat([x, torch.zeros(3, 8)], 1)
    assert torch.equal(
        quantize(x, Quantizer("int4", "group:16")), quantize(longer, Quantizer("int4", "group:16"))[:, :40]
    )


def test_a_convolutions_weight_is_cut_into_runs_of_all_its_inputs():
    weight = tensor((6, 8, 3, 3), 2)
    flat = quantize(weight.flatten(1), Quantizer("int4", "group:24"))
    assert torch.equal(quantize(weight, Quantizer("int4", "group:24")), flat.reshape(weight.shape))
    sequence = tensor((2, 5, 48), 3)
    rows = quantize(sequence.flatten(0, 1), Quantizer("int4", "group:24"))
    assert torch.equal(quantize(sequence, Quantizer("int4", "group:24")), rows.reshape(sequence.shape))


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(2, 1), (3, 0), (1, 2), (2, 3), (3, 2), (4, 1)])
def test_a_real_valued_exponent_bias_is_that_of_llm_fp4(exponent_bits, mantissa_bits):
    name = f"e{exponent_bits}m{mantissa_bits}"
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2000, generator=generator, dtype=torch.float64)
    for bias in (-1.3, 0.25, 2.7, 5.0):
        made = quantize(x, Quantizer(name, exponent_bias=bias))
        expected = [twin.llm_fp4(value, exponent_bits, mantissa_bits, bias) for value in x.tolist()]
        torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0.0)
        single = x.float()
        assert same(quantize(single, Quantizer(name, exponent_bias=bias)), by_twin(single, name, bias=bias))


def test_the_formats_own_bias_changes_nothing():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    for name, bias in (("e4m3", 7), ("e5m2", 15), ("e2m1", 1.0), ("e8m3", 127)):
        assert torch.equal(quantize(x, Quantizer(name, exponent_bias=bias)), quantize(x, Quantizer(name)))


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e4m3", "e5m2", "e8m3"])
@pytest.mark.parametrize("size", [1e-44, 1e-3, 1.0, 3e5, 1e37])
def test_the_searched_bias_is_the_best_of_the_candidates(name, size):
    x = (torch.randn(300, generator=torch.Generator().manual_seed(1)).double() * size).clamp(-3e38, 3e38).float()
    found = search_exponent_bias(x, name, candidates=25)
    assert quantize(x, Quantizer(name, exponent_bias=found)).isfinite().all()
    if 1e-20 < size < 1e20:
        wide = x.double()
        largest, top = twin.table(name)[-1], float(x.abs().max())
        own = 2 ** (int(name[1]) - 1) - 1
        errors = {}
        for i in range(25):
            bias = own - max(-126.0, math.log2((0.01 + 1.19 * i / 24) * top / largest))
            errors[bias] = float((quantize(wide, Quantizer(name, exponent_bias=bias)) - wide).square().sum())
        least = min(errors, key=errors.get)
        assert found == pytest.approx(least, abs=1e-9)
        assert errors[least] < max(errors.values()) or name == "e8m3"


def test_the_search_of_a_bias_leaves_out_what_is_not_finite_and_begins_at_the_formats_own():
    x = torch.randn(100, generator=torch.Generator().manual_seed(1))
    broken = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])])
    assert search_exponent_bias(broken, "e2m1") == search_exponent_bias(x, "e2m1")
    assert search_exponent_bias(x.bfloat16(), "e2m1", candidates=1) == pytest.approx(
        1 - math.log2(0.01 * float(x.bfloat16().abs().max()) / 6)
    )
    for nothing in (torch.zeros(5), torch.zeros(0), torch.tensor([math.nan])):
        assert search_exponent_bias(nothing, "e4m3") == 7.0


@pytest.mark.parametrize(
    ("name", "candidates", "message"),
    [
        ("int4", 10, "format='int4' has no exponent bias to search"),
        ("mxfp4", 10, "format='mxfp4' has no exponent bias to search"),
        ("e4", 10, "format='e4' is unknown"),
        ("e4m3", 0, "candidates=0 is not a whole number"),
    ],
)
def test_a_search_without_meaning_is_refused(name, candidates, message):
    with pytest.raises(ValueError, match=message):
        search_exponent_bias(torch.ones(3), name, candidates)
