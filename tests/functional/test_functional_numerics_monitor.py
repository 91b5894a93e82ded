"""Statistics of quantized operands: against counts one by one, where nothing is left, and how they merge."""

import math
from typing import Any

import pytest
import torch
from oracles.numerics_twin import LARGEST, Counts, nearest, quantized

from lightning_stable.functional.numerics_monitor import (
    SIZE,
    _scattered_counts,
    add_statistics,
    count_nonfinite,
    empty_statistics,
    exponent_histogram,
    measure,
    merge_statistics,
    operand_statistics,
    saturated,
)
from lightning_stable.functional.quantize import Quantizer, quantize, value_table


def spread(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Values over many powers of two, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(scale * torch.randn(shape, generator=generator))
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, x)


def assert_statistics(found: torch.Tensor, counts: Counts) -> None:
    assert measure(found).tolist() == pytest.approx(counts.measures(), rel=1e-5, abs=1e-5)
    assert exponent_histogram(found) == counts.histogram()
    assert int(count_nonfinite(found)) == counts.nonfinite


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_entry_is_counted(form: str, dtype: torch.dtype) -> None:
    x = spread(7, 40, scale=5.0 if form == "e4m3" else 12.0).to(dtype)
    quantizer = Quantizer(form)
    counts = Counts(LARGEST[form])
    counts.add(x, quantized(x.float(), form))
    found = operand_statistics(x, quantize(x, quantizer), quantizer)
    assert_statistics(found, counts)
    underflow, saturation, sqnr, _ = counts.measures()
    assert min(underflow, saturation) > 0.01, "the case shows nothing"
    assert 0 < sqnr < 40


def test_small_numbers_have_squares() -> None:
    x = spread(500) * 1e-30
    quantizer = Quantizer("e8m3")
    counts = Counts(Quantizer("e8m3").spec.largest)
    counts.add(x, quantize(x, quantizer))
    assert_statistics(operand_statistics(x, quantize(x, quantizer), quantizer), counts)


def test_what_is_not_finite_is_counted_apart() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.25, 0.0, 1000.0])
    quantizer = Quantizer("e4m3")
    counts = Counts(448.0)
    counts.add(x, quantize(x, quantizer))
    assert counts.nonfinite == 3
    assert_statistics(operand_statistics(x, quantize(x, quantizer), quantizer), counts)


def test_the_ends_are_told_apart() -> None:
    quantizer = Quantizer("e4m3")

    def measured(*values: float) -> list[float]:
        x = torch.tensor(values)
        return measure(operand_statistics(x, quantize(x, quantizer), quantizer)).tolist()

    assert measured(448.0, -448.0, 2.0) == [0.0, 0.0, math.inf, 448.0]  # the largest itself is not beyond
    assert measured(449.0, 2.0)[1] == 0.5
    assert measured(2.0**-9, 2.0**-11)[0] == 0.5  # the smallest is kept, a quarter of it is lost
    assert measured(0.0, 0.0)[0] == 0.0  # nothing could be lost
    assert math.isnan(measured(0.0, 0.0)[2])
    assert all(math.isnan(value) for value in measure(empty_statistics(1, torch.device("cpu")))[0].tolist())
    assert operand_statistics(torch.empty(0, 3), torch.empty(0, 3), quantizer).tolist() == [0.0] * SIZE
    assert exponent_histogram(torch.zeros(SIZE)) == (0, [])


@pytest.mark.parametrize("form", ["mxfp4", "mxfp8"])
def test_of_blocks_each_has_its_own_largest_value(form: str) -> None:
    x = spread(3, 64, seed=2, scale=1.0)
    quantizer = Quantizer(form)
    table = value_table(form).tolist()
    own = []
    for row in x:
        for block in row.split(32):
            scale = 2.0 ** (math.floor(math.log2(block.abs().max())) - math.floor(math.log2(table[-1])))
            own += [abs(value) > table[-1] * scale for value in block.tolist()]
            expected = [nearest(value, table, scale) for value in block.tolist()]
            assert quantize(block, quantizer).tolist() == pytest.approx(expected), "the case is not what it seems"
    assert any(own)
    assert saturated(x, quantize(x, quantizer), quantizer).flatten().tolist() == own


def test_outliers_that_are_kept_do_not_saturate_and_leave_the_scale_to_the_others() -> None:
    x = torch.full((1, 32), 0.1)
    x[0, :3] = torch.tensor([100.0, 7.9, 7.4])
    quantizer = Quantizer("mxfp4", keep_outliers=1)
    # Of the others 7.9 is the largest: its scale is 1, and the largest value 6.
    assert saturated(x, quantize(x, quantizer), quantizer)[0, :4].tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"format": "e4m3", "scaling": "tensor"}, 0.0),
        ({"format": "int8", "scaling": "row"}, 0.0),
        ({"format": "int4"}, 0.5),
        ({"format": "e2m1", "exponent_bias": 3.0}, 0.75),
    ],
)
def test_a_scale_that_is_fitted_leaves_nothing_beyond(settings: dict[str, Any], share: float) -> None:
    x = torch.tensor([[1.0, 7.0, -9.0, 30.0]])  # int4 ends at 7; e2m1 with two more powers of two below at 1.5
    quantizer = Quantizer(**settings)
    assert float(measure(operand_statistics(x, quantize(x, quantizer), quantizer))[1]) == share


def test_binary_and_ternary_cut_what_is_above_their_level() -> None:
    x = torch.tensor([[1.0, -3.0, 0.1, 5.0]])
    for form in ("binary", "ternary"):
        quantizer = Quantizer(form, scaling="row")
        q = quantize(x, quantizer)
        expected = [abs(a) > abs(b) and b != 0 for a, b in zip(x[0].tolist(), q[0].tolist(), strict=True)]
        assert saturated(x, q, quantizer)[0].tolist() == expected
        assert any(expected)


def test_parts_merge_into_the_whole() -> None:
    quantizer, x = Quantizer("e4m3"), spread(60, 5, seed=4) * 100
    q = quantize(x, quantizer)
    whole = operand_statistics(x, q, quantizer)
    parts = [operand_statistics(a, b, quantizer) for a, b in zip(x.split(7), q.split(7), strict=True)]
    total = empty_statistics(1, x.device)[0]
    for part in parts:
        add_statistics(total, part)
    for merged in (total, merge_statistics(torch.stack(parts))):
        assert merged.tolist() == pytest.approx(whole.tolist(), rel=1e-6)
        assert float(measure(merged)[3]) == float(x.abs().max())
    rows = torch.stack([whole, parts[0]])
    assert torch.equal(merge_statistics(rows[None]), rows)


def test_devices_that_would_wait_for_a_bincount_count_the_same() -> None:
    places = torch.randint(256, (500,), generator=torch.Generator().manual_seed(6))
    assert torch.equal(_scattered_counts(places), torch.bincount(places, minlength=256))
