"""The band of usual values against the standard library's statistics, and how it comes to a new level."""

import math
import random
import statistics

import pytest
import torch

from lightning_stable.functional._vectors import global_norm
from lightning_stable.functional.spike_guard import (
    init_spike_band,
    reject_spike,
    running_median,
    spike_limit,
    update_spike_band,
)


def band_of(values, window=16):
    state = init_spike_band(window)
    for value in values:
        state = update_spike_band(state, value)
    return state


def expected_limit(values, threshold):
    middle = statistics.median(values)
    spread = statistics.median([abs(value - middle) for value in values])
    return middle + threshold * max(1.4826 * spread, 0.01 * abs(middle))


def numbers(count, seed=0, centre=1.0):
    source = random.Random(seed)  # noqa: S311
    return [centre + source.gauss(0, 0.2) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 60])
@pytest.mark.parametrize("threshold", [0.5, 6.0])
@pytest.mark.parametrize("centre", [1.0, 0.0, -3.0])
def test_the_limit_is_over_the_last_accepted_values(count, threshold, centre):
    values = numbers(count, centre=centre)
    state = band_of(values)
    assert spike_limit(state, threshold, 1) == pytest.approx(expected_limit(values[-16:], threshold), rel=1e-12)
    assert running_median(state) == pytest.approx(statistics.median(values[-16:]), rel=1e-12)


def test_there_is_no_limit_before_the_minimum():
    state = init_spike_band(8)
    assert math.isnan(running_median(state))
    for count, value in enumerate(numbers(8)):
        assert math.isinf(spike_limit(state, 6.0, 4)) is (count < 4)
        state = update_spike_band(state, value)


def test_values_that_do_not_vary_leave_a_margin():
    assert spike_limit(band_of([2.0] * 8), 6.0, 2) == pytest.approx(2.0 * 1.06)
    assert spike_limit(band_of([0.0] * 8), 6.0, 2) == math.inf, "zeros tell no scale"


def test_outliers_that_were_accepted_hardly_move_the_limit():
    values = numbers(16)
    spoiled = [*values[:12], 1e6, 1e6, 1e6, 1e6]
    assert spike_limit(band_of(spoiled), 6.0, 2) < 2 * spike_limit(band_of(values), 6.0, 2)


def test_a_rejected_value_is_not_in_the_band():
    state = band_of(numbers(16))
    after = reject_spike(state, 50.0)
    assert torch.equal(after.values, state.values)
    assert spike_limit(after, 6.0, 2) == spike_limit(state, 6.0, 2)
    used = reject_spike(state, 50.0, used=2.0)
    assert used.values[-1] == 2.0
    assert torch.equal(used.values[:-1], state.values[1:])


def test_functions_leave_the_state_that_they_are_given():
    state = band_of(numbers(4))
    before = [value.clone() for value in state]
    update_spike_band(state, 1.0)
    reject_spike(state, 9.0, used=2.0)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(state, before, strict=True))
    assert torch.equal(state.values.isnan(), before[0].isnan())


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_new_level_is_accepted_in_the_end(share):
    source = random.Random(1)  # noqa: S311
    state, rejected = band_of(numbers(32), window=32), []
    for _ in range(300):
        value = (100.0 if source.random() < share else 1.0) + source.gauss(0, 0.1)
        spiked = value > spike_limit(state, 6.0, 4)
        rejected.append(spiked)
        state = reject_spike(state, value) if spiked else update_spike_band(state, value)
    assert rejected[0] or share < 1
    assert not any(rejected[-100:]), "the guard rejects for ever"
    if share == 1.0:
        assert rejected.count(True) == 17, "more than half of a window"


def test_rare_spikes_are_rejected_for_ever():
    source = random.Random(2)  # noqa: S311
    state, wrong = band_of(numbers(16)), 0
    for step in range(400):
        spike = step % 4 == 0
        value = (100.0 if spike else 1.0) + source.gauss(0, 0.1)
        found = value > spike_limit(state, 20.0, 4)
        wrong += found is not spike
        state = reject_spike(state, value) if found else update_spike_band(state, value)
    assert wrong == 0


def test_the_norm_is_over_all_gradients_in_any_precision():
    parts = [torch.tensor([3.0], dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert float(global_norm(parts)) == pytest.approx(math.sqrt(27))
    assert float(global_norm([*parts, torch.tensor([[3.0]], dtype=torch.float64)])) == pytest.approx(6.0)
    large = [torch.full((4,), 3e4, dtype=torch.float16)]
    assert float(global_norm(large)) == pytest.approx(6e4, rel=1e-3)
    assert math.isnan(float(global_norm([torch.tensor([math.nan])])))


@pytest.mark.parametrize("window", [1, 0, -3, 2.5, True, "8"])
def test_a_bad_window_is_told(window):
    with pytest.raises(ValueError, match=r"is not a number of values from 2 on"):
        init_spike_band(window)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_part_of_a_band(value):
    for call in (
        lambda: update_spike_band(init_spike_band(4), value),
        lambda: reject_spike(init_spike_band(4), value),
        lambda: reject_spike(init_spike_band(4), 1.0, used=value),
    ):
        with pytest.raises(ValueError, match="is not finite"):
            call()
