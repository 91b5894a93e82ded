"""Rounding onto the values of a format: against torch's own dtypes, and against tables enumerated code by code."""

import math

import pytest
import torch
from oracles import quantize_twin as twin

from lightning_stable.functional import _rounding
from lightning_stable.functional.quantize import Quantizer, parse_format, quantize, value_table

FLOATS = [f"e{x}m{y}" for x in range(1, 9) for y in range(11)]
INTEGERS = [f"int{k}" for k in range(2, 9)]
POWERS = [f"shift{k}" for k in range(2, 9)]
ELEMENTS = [*FLOATS, *INTEGERS, *POWERS, "binary", "ternary"]
# torch's own formats of few bits, and where each ends.
TORCH = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
WIDE = {"e8m7": torch.bfloat16, "e5m10": torch.float16}


def same(a, b):
    """Equal in every number and the sign of every zero, with NaN at the same places."""
    a, b = a.double(), b.double()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0).view(torch.int64), b.nan_to_num(0.0).view(torch.int64)
    )


def every_sixteen_bits(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def random_bits(count, seed=0):
    """Float32 numbers of random bits: every exponent, both signs, infinities and NaN of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF]
    both = torch.tensor([[b, b - 2**31] for b in special], dtype=torch.int64).to(torch.int32)
    return torch.cat([bits, both.flatten()]).view(torch.float32)


def grid(name, dtype, most=200):
    """Every value of a format (or some over its whole range), each midpoint, their neighbours, and beyond the end."""
    values = torch.tensor(twin.table(name), dtype=torch.float64)
    if len(values) > most:
        pick = torch.linspace(0, len(values) - 2, most // 2).long()
        values = torch.cat([values[pick], values[pick + 1], values[-2:]]).unique()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, values[-1:] * 1.01, values[-1:] * 1.9])
    points = points[points <= torch.finfo(dtype).max].to(dtype)
    up = torch.nextafter(points, torch.tensor(math.inf, dtype=dtype))
    down = torch.nextafter(points, torch.tensor(-math.inf, dtype=dtype))
    points = torch.cat([points, up, down])
    points = points[points.isfinite()]
    return torch.cat([points, -points])


def by_twin(name, x, rounding):
    return torch.tensor([twin.element(name, value, rounding) for value in x.tolist()], dtype=x.dtype)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(TORCH))
def test_all_sixteen_bit_numbers_round_as_torch_casts_them(name, source):
    dtype, largest = TORCH[name]
    x = every_sixteen_bits(source)
    assert len(x) == 2**16
    # Saturated by hand, for the casts do it differently from format to format; NaN stays.
    expected = x.float().clamp(-largest, largest).to(dtype).float()
    assert same(quantize(x, Quantizer(name)), expected)
    assert same(quantize(x.float(), Quantizer(name)), expected)
    assert same(quantize(x.double(), Quantizer(name)), expected)


@pytest.mark.parametrize("name", sorted(TORCH))
def test_random_float32_numbers_round_as_torch_casts_them(name):
    dtype, largest = TORCH[name]
    x = torch.cat([random_bits(300_000), torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * 30])
    assert same(quantize(x, Quantizer(name)), x.clamp(-largest, largest).to(dtype).float())


@pytest.mark.parametrize("way", ["casts", "bits", "float64"])
@pytest.mark.parametrize("name", sorted(WIDE))
def test_the_sixteen_bit_formats_are_those_of_torch(name, way, monkeypatch):
    dtype = WIDE[name]
    if way == "bits":
        monkeypatch.setattr(_rounding, "_CASTS", {})
    x = random_bits(500_000)
    largest = torch.finfo(dtype).max
    expected = x.to(dtype).float().clamp(-largest, largest)
    assert same(quantize(x.double() if way == "float64" else x, Quantizer(name)), expected)
    exact = every_sixteen_bits(dtype)
    assert same(quantize(exact, Quantizer(name)), exact.clamp(-largest, largest))


@pytest.mark.parametrize("name", [f"e8m{y}" for y in range(11)])
def test_a_truncated_mantissa_is_a_mask_of_bits(name):
    x = random_bits(100_000)
    cut = 23 - parse_format(name).mantissa_bits
    masked = (x.nan_to_num(0.0).view(torch.int32) >> cut << cut).view(torch.float32)
    masked = torch.where(x.isinf(), x.sign() * parse_format(name).largest, masked)
    masked = masked.clamp(-parse_format(name).largest, parse_format(name).largest)
    assert same(quantize(x, Quantizer(name, rounding="truncate")), torch.where(x.isnan(), x, masked))


@pytest.mark.parametrize("name", ELEMENTS)
def test_the_table_holds_every_value_a_code_stands_for(name):
    table = value_table(name)
    assert table.dtype == torch.float64
    assert table.tolist() == twin.table(name)
    assert parse_format(name).largest == table[-1]
    assert same(quantize(table, Quantizer(name)), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ELEMENTS)
def test_values_midpoints_and_their_neighbours_round_as_the_enumerated_table_says(name, dtype):
    x = grid(name, dtype)
    assert same(quantize(x, Quantizer(name)), by_twin(name, x, "nearest"))
    if name not in ("binary", "ternary"):
        assert same(quantize(x, Quantizer(name, rounding="truncate")), by_twin(name, x, "truncate"))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize(
    "name", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e1m2", "e3m0", "e7m2", "e8m0", "shift3", "int4"]
)
def test_random_numbers_round_to_the_nearest_or_lower_value(name, rounding):
    generator = torch.Generator().manual_seed(3)
    sizes = 2.0 ** torch.randint(-12, 12, (3000,), generator=generator)
    x = torch.cat([torch.randn(3000, generator=generator) * sizes, random_bits(1000, seed=4)])
    x = x[x.isfinite()]
    assert same(quantize(x, Quantizer(name, rounding=rounding)), by_twin(name, x, rounding))


def test_the_named_formats_end_where_their_standards_say():
    ends = {
        "e4m3": 448,
        "e5m2": 57344,
        "e3m2": 28,
        "e2m3": 7.5,
        "e2m1": 6,
        "e1m2": 3.5,
        "e3m4": 31,
        "int8": 127,
        "int2": 1,
    }
    assert {name: parse_format(name).largest for name in ends} == ends
    assert value_table("e2m1").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert value_table("shift3").tolist() == [1, 2, 4, 8]
    assert parse_format("nvfp4") == ("nvfp4", "float", 2, 1, 6.0, 16, "e4m3")
    assert parse_format("mxfp8_e5m2") == ("mxfp8_e5m2", "float", 5, 2, 57344.0, 32, "e8m0")
    assert value_table("mxfp6_e2m3").equal(value_table("e2m3"))


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_twice_is_rounding_once(name, rounding):
    if name in ("binary", "ternary") and rounding != "nearest":
        return
    quantizer = Quantizer(name, rounding=rounding)
    x = torch.cat([random_bits(2000, seed=5), torch.randn(2000, generator=torch.Generator().manual_seed(6)) * 4])
    once = quantize(x, quantizer, generator=torch.Generator().manual_seed(7))
    assert same(quantize(once, quantizer, generator=torch.Generator().manual_seed(8)), once)
    assert same(quantize(-x, Quantizer(name)), -quantize(x, Quantizer(name))) or name in [*POWERS, "binary"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["e4m3", "e2m1", "e3m0", "e8m7", "e8m0", "e5m10", "int8", "int2", "shift3"])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_on_average(name, dtype):
    draws = 20_000
    values = torch.tensor(twin.table(name), dtype=torch.float64)
    low = len(values) // 2 - 1 if len(values) > 2 else 0
    low, high = values[low], values[low + 1]
    for share in (0.5, 0.1, 0.97):
        x = (low + share * (high - low)).to(dtype)
        share = float((x.double() - low) / (high - low))
        for sign in (1.0, -1.0):
            generator = torch.Generator().manual_seed(11)
            made = quantize((sign * x).expand(draws), Quantizer(name, rounding="stochastic"), generator=generator)
            assert set(made.double().tolist()) == {sign * float(low), sign * float(high)}
            # Five standard deviations of the mean of as many draws: one run in two million lies beyond.
            bound = 5 * float(high - low) * math.sqrt(share * (1 - share) / draws)
            assert abs(float(made.double().mean()) - sign * float(x)) < bound


def test_stochastic_rounding_of_subnormals_of_float32_is_right_on_average():
    x = torch.full((20_000,), 0.25 * 2.0**-133)
    made = quantize(x, Quantizer("e8m7", rounding="stochastic"), generator=torch.Generator().manual_seed(0))
    assert set(made.tolist()) == {0.0, 2.0**-133}
    assert abs(float((made > 0).float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


@pytest.mark.parametrize("name", ["e4m3", "e8m3", "int4"])
def test_stochastic_rounding_repeats_with_its_generator_and_leaves_the_global_one_alone(name):
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 3
    quantizer = Quantizer(name, rounding="stochastic")
    before = torch.get_rng_state()
    first = quantize(x, quantizer, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, quantize(x, quantizer, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, quantize(x, quantizer, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    seeded = torch.get_rng_state()
    free = quantize(x, quantizer)
    assert not torch.equal(torch.get_rng_state(), seeded)
    torch.manual_seed(5)
    assert torch.equal(free, quantize(x, quantizer))


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_nan_stays_and_infinity_becomes_the_largest(name, rounding):
    if name in ("binary", "ternary") and rounding != "nearest":
        return
    x = torch.tensor([math.nan, math.inf, -math.inf, -math.nan, 3e38, -3e38])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        made = quantize(x.to(dtype), Quantizer(name, rounding=rounding))
        largest = torch.tensor(parse_format(name).largest, dtype=dtype)
        assert made.isnan().tolist() == [True, False, False, True, False, False]
        assert made[1:3].tolist() == [largest, -largest]
        if largest < 2e38:
            assert made[4:].tolist() == [largest, -largest]


@pytest.mark.parametrize("name", ELEMENTS)
def test_zero_keeps_its_sign_where_the_format_has_a_zero(name):
    made = quantize(torch.tensor([0.0, -0.0]), Quantizer(name))
    if name in POWERS or name == "binary":
        assert made.tolist() == [1.0, 1.0]
    else:
        assert torch.equal(made.view(torch.int32), torch.tensor([0, -(2**31)], dtype=torch.int64).to(torch.int32))


def test_a_subnormal_number_is_nothing_to_a_short_exponent_and_itself_to_a_long_one():
    x = torch.tensor([1e-40, -1e-44, 2.0**-149])
    assert quantize(x, Quantizer("e4m3")).tolist() == [0.0, 0.0, 0.0]
    assert quantize(x, Quantizer("e8m10"))[0] > 0
    assert same(quantize(x, Quantizer("e8m10")), by_twin("e8m10", x, "nearest"))


@pytest.mark.parametrize(
    "name", ["e4m3", "e8m7", "e8m3", "e3m0", "int8", "mxfp4", "nvfp4", "shift3", "binary", "ternary"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_input_is_left_alone_and_dtype_shape_and_emptiness_stay(name, dtype):
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    copy = x.detach().clone()
    for rounding in ("nearest",) if name in ("binary", "ternary") else ("nearest", "truncate", "stochastic"):
        for keep in (0, 2):
            made = quantize(x, Quantizer(name, rounding=rounding, keep_outliers=keep))
            assert made.dtype == dtype
            assert made.shape == x.shape
            assert not made.requires_grad
            assert made.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            assert torch.equal(x.detach(), copy)
    for shape in ((0,), (0, 4), (4, 0), (2, 0, 3, 3)):
        empty = quantize(torch.zeros(shape, dtype=dtype), Quantizer(name))
        assert empty.shape == torch.Size(shape)
        assert empty.dtype == dtype


def test_strides_do_not_matter():
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for quantizer in (Quantizer("e4m3"), Quantizer("e8m3"), Quantizer("int4", "row"), Quantizer("mxfp8")):
        assert torch.equal(quantize(x.T, quantizer), quantize(x.T.contiguous(), quantizer))
        assert torch.equal(quantize(x[::2, ::3], quantizer), quantize(x[::2, ::3].contiguous(), quantizer))
        last = image.to(memory_format=torch.channels_last)
        assert torch.equal(quantize(last, quantizer), quantize(image, quantizer))
