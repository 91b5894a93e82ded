"""The decision on precision against a slow twin, its boundaries in closed form, and what counts as saturated."""

import math
import random

import pytest
import torch
from oracles.fallback_twin import FallbackTwin

from lightning_stable.functional.numerics_monitor import MEASURES, can_saturate, measure, operand_statistics
from lightning_stable.functional.precision_fallback import (
    START,
    FallbackRule,
    init_fallback,
    saturated_share,
    signal_limits,
    update_fallback,
)
from lightning_stable.functional.quantize import Quantizer, quantize

RULE = FallbackRule(steps=4, cooldown=3, window=16, minimum=4)
CALM = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]


def run(values, rule=RULE, first=0):
    """Return for each step whether the next one is in high precision; a number is a loss."""
    state, found = init_fallback(first), []
    for value in values:
        state = update_fallback(state, value if isinstance(value, dict) else {"loss": value}, rule)
        found.append(state.is_high)
    return found, state


@pytest.mark.parametrize("seed", range(8))
def test_it_decides_as_the_twin_does(seed):
    source = random.Random(seed)  # noqa: S311
    limits = {"saturation": 0.1} if seed % 2 else {}
    rule = RULE._replace(threshold=4.0, lower_threshold=1.0 + seed / 4, steps=3 + seed, cooldown=seed, limits=limits)
    twin = FallbackTwin(4.0, 1.0 + seed / 4, 3 + seed, seed, 16, 4, limits, first=seed)
    state, switches = init_fallback(seed), 0
    level = 1.0
    for step in range(400):
        level = 3.0 if 200 <= step < 260 else level * 0.999
        values = {"loss": source.gauss(level, 0.1) + (5.0 if source.random() < 0.03 else 0.0)}
        if source.random() < 0.01:
            values["loss"] = source.choice([math.nan, math.inf])
        if source.random() < 0.3:
            values["saturation"] = source.random() * 0.12
        before, passed = state.is_high, source.choice([1, 1, 1, 2, 0])
        state = update_fallback(state, values, rule, passed)
        assert state.is_high == twin.step(values, passed), f"step {step}"
        switches += state.is_high != before
    assert switches >= 6, "the signals hardly switched anything"


def test_a_spike_leads_to_high_precision_for_exactly_so_many_steps():
    found, state = run([*CALM, 9.0, *CALM])
    assert found == [False] * 8 + [True] * 4 + [False] * 4 + [False]
    assert state.reason == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on(bad):
    found, _ = run([1.0, bad, 1.0])
    assert found == [False, True, True]
    found, state = run([bad] * 40)
    assert all(found), "it never is usual"
    assert not state.bands


def test_small_values_and_the_first_ones_are_no_spikes():
    assert not any(run([*CALM, -50.0, 0.0])[0])
    assert not any(run([1.0, 50.0, 2.0])[0]), "fewer than the minimum"


def test_the_way_back_is_at_the_lower_limit():
    state = run(CALM)[1]
    upper, lower = signal_limits(state, "loss", RULE)
    between = (upper + lower) / 2
    assert lower < between < upper
    assert not any(run([*CALM, between])[0]), "between the limits nothing begins"
    found, _ = run([*CALM, 9.0, 1.0, 1.0, 1.0, between, 1.0])
    assert found[8:] == [True, True, True, True, True, False], "nor does it end"


def test_no_fallback_begins_in_the_cooldown():
    found, _ = run([*CALM, 9.0, *CALM[:4], 9.0, 9.0, 1.0, 1.0])
    assert found[8:] == [True] * 4 + [False] * 5, "two spikes in a cooldown of three steps"
    found, _ = run([*CALM, 9.0, *CALM[:4], 9.0, 9.0, 9.0, 1.0])
    assert found[8:] == [True] * 4 + [False] * 3 + [True] * 2


def test_a_new_level_is_accepted_in_the_end():
    found, _ = run([*CALM, *CALM, *[10 * value for value in CALM * 4]])
    assert found[16]
    assert not found[-1]
    assert not any(found[-12:])


def test_one_signal_is_enough_to_begin_and_all_are_needed_to_end():
    rule = RULE._replace(limits={"sharpness": 8.0})
    assert signal_limits(init_fallback(), "sharpness", rule) == (8.0, 4.0)
    steps = [{"loss": 1.0}] * 6 + [{"sharpness": 9.0}] + [{"loss": 1.0}] * 6 + [{"sharpness": 5.0}, {"sharpness": 4.0}]
    found, state = run(steps, rule)
    assert found == [False] * 6 + [True] * 8 + [False]
    assert "sharpness" not in state.bands
    assert run([{"sharpness": 8.0}], rule)[0] == [False]


def test_it_says_which_signal_began_it():
    rule = RULE._replace(limits={"a": 1.0, "b": 1.0})
    assert run([{"a": 0.0, "b": 2.0}], rule)[1].reason == "b"
    assert run([{"a": 2.0, "b": 2.0}], rule)[1].reason == "a"


def test_the_first_steps():
    found, state = run([1.0] * 7, first=5)
    assert init_fallback(5).is_high
    assert init_fallback(5).reason == START
    assert found == [True] * 4 + [False] * 3
    assert state.cooldown == 1
    assert not init_fallback(0).is_high


def test_steps_that_passed_at_once_count_and_a_look_in_between_does_not():
    state = update_fallback(init_fallback(6), {}, RULE, passed=2)
    assert (state.is_high, state.remaining) == (True, 4)
    assert update_fallback(state, {"loss": 1.0}, RULE, passed=0).remaining == 4
    assert not update_fallback(state, {}, RULE, passed=4).is_high


def test_the_state_that_is_given_stays():
    state = run([*CALM, 9.0])[1]
    band = {name: value.clone() for name, value in state.bands["loss"]._asdict().items()}
    before = state._replace(bands=dict(state.bands), raised=dict(state.raised))
    update_fallback(state, {"loss": 1.0, "other": math.nan}, RULE)
    assert state == before
    assert all(
        torch.equal(band[name].nan_to_num(), value.nan_to_num())
        for name, value in state.bands["loss"]._asdict().items()
    )


# ------------------------------------------------------------------ saturation


def operand() -> torch.Tensor:
    """Return entries of which some lie beyond 448, and not all of a block are alike."""
    return 300 * torch.randn(6, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({"format": "e4m3"}, True),
        ({"format": "e4m3", "exponent_bias": 6.5}, True),
        ({"format": "e4m3", "keep_outliers": 1}, True),
        ({"format": "int4"}, True),
        ({"format": "shift3"}, True),
        ({"format": "binary"}, True),
        ({"format": "binary", "scaling": "row"}, True),
        ({"format": "ternary", "scaling": "tensor"}, True),
        ({"format": "mxfp4"}, True),
        ({"format": "mxfp8", "keep_outliers": 2}, True),
        ({"format": "nvfp4"}, True),
        ({"format": "e4m3", "scaling": "tensor"}, False),
        ({"format": "int8", "scaling": "row"}, False),
        ({"format": "int4", "scaling": "group:16", "asymmetric": True}, False),
        ({"format": "shift3", "scaling": "channel"}, False),
        ({"format": "e2m1", "scaling": "shift:4"}, False),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_it_saturates_as_the_monitor_says(settings, can):
    quantizer, exact = Quantizer(**settings), operand()
    if quantizer.layout == "none" and quantizer.spec.kind != "binary":
        exact[0, 0], exact[1, 1] = math.nan, math.inf  # which would make scales no numbers
    quantized = quantize(exact, quantizer)
    share = saturated_share(exact, quantized, quantizer)
    reported = measure(operand_statistics(exact, quantized, quantizer))[MEASURES.index("saturation")]
    assert float(share) == pytest.approx(float(reported))
    assert can_saturate(quantizer) == can == (float(share) > 0)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"format": "e4m3"}, 448.0),
        ({"format": "e2m1", "exponent_bias": 2.0}, 3.0),
        ({"format": "e4m3", "exponent_bias": 6.5}, 448.0 * 2**0.5),
        ({"format": "int4"}, 7.0),
        ({"format": "shift3"}, 8.0),
    ],
)
def test_the_share_is_that_of_finite_entries_beyond_the_largest_value(settings, limit):
    quantizer = Quantizer(**settings)
    exact = limit * torch.tensor([0.0, 0.5, 0.999, -0.999, 1.001, -2.0, math.inf, math.nan])
    share = saturated_share(exact, quantize(exact, quantizer), quantizer)
    assert float(share) == pytest.approx(2 / 6)
    assert share.dtype == torch.float32
    for nothing in (exact[:0], exact[-1:]):
        assert float(saturated_share(nothing, nothing, quantizer)) == 0


def test_entries_that_are_kept_did_not_saturate():
    exact = torch.tensor([[1.0, 900.0, 500.0, 2.0]])
    quantizer = Quantizer("e4m3", keep_outliers=1)
    assert float(saturated_share(exact, quantize(exact, quantizer), quantizer)) == 1 / 4
