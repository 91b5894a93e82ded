"""The warmup-stable-decay multiplier against a slow twin and closed forms, and the plans it refuses."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import wsd_twin

from lightning_stable.functional.wsd import (
    SHAPES,
    Cycle,
    check_length,
    decay_multiplier,
    plan_cycles,
    plan_multiplier,
    wsd_multiplier,
)

ALL_SHAPES = ("linear", "cosine", "1-sqrt", "exponential", "inverse")
FLOORLESS = ("linear", "cosine", "1-sqrt")


def ours(n, total_steps, **kwargs):
    return [wsd_multiplier(step, total_steps, **kwargs) for step in range(n)]


def test_the_shapes_are_the_five_documented_ones():
    assert tuple(SHAPES) == ALL_SHAPES


# ----------------------------------------------------------------------------- the shape of the decay


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("floor", [0.01, 0.1, 0.5, 1.0])
def test_decay_runs_from_one_to_the_floor_and_never_rises(shape, floor):
    values = [decay_multiplier(i / 200, shape, floor) for i in range(201)]
    assert values[0] == pytest.approx(1.0, abs=1e-15)
    assert values[-1] == pytest.approx(floor, rel=1e-12)
    assert all(after <= before + 1e-15 for before, after in pairwise(values))


@pytest.mark.parametrize("shape", FLOORLESS)
def test_shapes_without_a_reciprocal_reach_zero(shape):
    assert decay_multiplier(0.0, shape, 0.0) == pytest.approx(1.0)
    assert decay_multiplier(1.0, shape, 0.0) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("shape", "progress", "floor", "value"),
    [
        ("linear", 0.25, 0.2, 0.8),
        ("linear", 0.5, 0.0, 0.5),
        ("cosine", 0.5, 0.0, 0.5),
        ("cosine", 1 / 3, 0.2, 0.8),
        ("1-sqrt", 0.25, 0.0, 0.5),
        ("1-sqrt", 0.25, 0.2, 0.6),
        ("exponential", 0.5, 0.25, 0.5),
        ("exponential", 0.5, 0.01, 0.1),
        ("inverse", 0.5, 0.1, 1 / 5.5),
        ("inverse", 1 / 9, 0.1, 0.5),
    ],
)
def test_closed_form_values_of_each_shape(shape, progress, floor, value):
    assert decay_multiplier(progress, shape, floor) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_progress_outside_the_decay_is_clamped(shape):
    assert decay_multiplier(-3.0, shape, 0.1) == decay_multiplier(0.0, shape, 0.1)
    assert decay_multiplier(7.5, shape, 0.1) == decay_multiplier(1.0, shape, 0.1)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_decay_equals_the_twin(shape):
    for floor in (0.003, 0.1, 0.7, 1.0):
        for i in range(101):
            expected = wsd_twin.decayed(i / 100, shape, floor)
            assert decay_multiplier(i / 100, shape, floor) == pytest.approx(expected, rel=1e-11)


# ----------------------------------------------------------------------------- the slow twin

SETTINGS = [
    {"total_steps": 100, "warmup": 10, "decay": 20},
    {"total_steps": 100, "warmup": 0.1, "decay": 0.2},
    {"total_steps": 100, "warmup": 0, "decay": 0},
    {"total_steps": 100, "warmup": 0.0, "decay": 0.0},
    {"total_steps": 100, "warmup": 60, "decay": 40},
    {"total_steps": 1, "warmup": 0, "decay": 1},
    {"total_steps": 1, "warmup": 0.01, "decay": 0.1},
    {"total_steps": 97, "warmup": 0.01, "decay": 0.29},
    {"total_steps": 100, "warmup": 5, "decay": 0.1, "budgets": [30, 70]},
    {"total_steps": 100, "warmup": 0.1, "decay": 10, "budgets": [30, 70]},
    {"total_steps": 100, "warmup": 0, "decay": 0.99, "budgets": [50, 51]},
    {"total_steps": 100, "warmup": 3, "decay": 0.25, "budgets": [10, 20, 40, 80]},
    {"total_steps": 100, "warmup": 0, "decay": 0, "budgets": [10]},
    {"total_steps": None, "warmup": 12, "decay": 0.1},
    {"total_steps": None, "warmup": 0, "decay": 5},
    {"total_steps": None, "warmup": 0.2, "decay": 0.2, "budgets": [30, 70]},
]


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_same_as_the_twin(shape, floor, setting):
    if floor == 0.0 and shape not in FLOORLESS:
        floor = 0.02
    kwargs = {"shape": shape, "min_ratio": floor, **setting}
    n = (setting["total_steps"] or 100) + 10
    assert ours(n, **kwargs) == pytest.approx(wsd_twin.curve(n, **kwargs), rel=1e-11, abs=1e-14)


@st.composite
def random_settings(draw):
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    shares = draw(st.tuples(st.integers(0, 500), st.integers(0, 499)))
    in_steps = draw(st.tuples(st.booleans(), st.booleans()))
    warmup = shares[0] * lengths[0] // 1000 if in_steps[0] else shares[0] / 1000
    decay = shares[1] * min(lengths) // 1000 if in_steps[1] else shares[1] / 1000
    open_end = draw(st.booleans())
    if open_end:
        return {
            "total_steps": None,
            "warmup": warmup,
            "decay": decay,
            "budgets": ends,
        }
    return {"total_steps": ends[-1], "warmup": warmup, "decay": decay, "budgets": ends[:-1] or None}


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    setting=random_settings(),
    shape=st.sampled_from(ALL_SHAPES),
    floor=st.integers(1, 100).map(lambda percent: percent / 100),
)
def test_same_as_the_twin_at_random_settings(setting, shape, floor):
    n = max([setting["total_steps"] or 0, *(setting["budgets"] or [])]) + 5
    kwargs = {"shape": shape, "min_ratio": floor, **setting}
    assert ours(n, **kwargs) == pytest.approx(wsd_twin.curve(n, **kwargs), rel=1e-11, abs=1e-14)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(setting=random_settings())
def test_planned_cycles_are_the_twins_and_join_without_gaps(setting):
    planned = plan_cycles(**setting)
    assert [tuple(cycle) for cycle in planned] == wsd_twin.cycles(**setting)
    assert planned[0].start == 0
    assert planned[-1].end == setting["total_steps"]
    for before, after in pairwise(planned):
        assert before.end == after.start
    for cycle in planned:
        if cycle.end is not None:
            assert cycle.start <= cycle.warmup_end <= cycle.decay_start <= cycle.end


# ----------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_values_at_every_boundary(shape):
    def at(step):
        return wsd_multiplier(step, 100, warmup=10, decay=20, shape=shape, min_ratio=0.1)

    assert at(0) == 0.0
    assert at(1) == pytest.approx(0.1)
    assert at(9) == pytest.approx(0.9)
    assert at(10) == 1.0
    assert at(79) == 1.0
    assert at(80) == pytest.approx(1.0, abs=1e-15)
    assert at(81) < 1.0
    assert at(99) > 0.1
    assert at(99) == pytest.approx(decay_multiplier(19 / 20, shape, 0.1))
    assert at(100) == pytest.approx(0.1)
    assert at(10_000) == pytest.approx(0.1)


def test_the_first_step_is_at_the_peak_without_warmup():
    assert wsd_multiplier(0, 100, warmup=0, decay=10) == 1.0
    # Half a step of warm-up is none.
    assert wsd_multiplier(0, 50, warmup=0.01, decay=10) == 1.0


def test_without_decay_the_rate_stays_at_the_peak_even_after_the_end():
    assert set(ours(30, 20, warmup=0, decay=0)) == {1.0}


def test_the_defaults_are_those_of_the_wsd_s_recipe():
    explicit = ours(1010, 1000, warmup=0.01, decay=0.1, shape="inverse", min_ratio=0.1)
    assert ours(1010, 1000) == explicit
    assert explicit[9] == pytest.approx(0.9)
    assert explicit[950] == pytest.approx(1 / 5.5)


def test_the_rate_jumps_back_to_the_peak_at_a_budget():
    values = ours(1001, 1000, warmup=20, decay=0.1, shape="linear", min_ratio=0.0, budgets=[300, 700])
    for budget, start in ((300, 0), (700, 300)):
        decay = (budget - start) // 10
        assert values[budget - decay - 1] == 1.0
        assert values[budget - decay] == 1.0
        assert values[budget - 1] == pytest.approx(1 / decay)
        assert values[budget] == 1.0
    # The warm-up belongs to the first cycle only, and the end of the run is the last budget.
    assert values[300:660] == [1.0] * 360
    assert values[999] == pytest.approx(1 / 30)
    assert values[1000] == 0.0


def test_shares_are_of_the_cycle_and_steps_are_of_every_cycle():
    shares = plan_cycles(1000, 0.1, 0.1, [300, 700])
    assert shares == (Cycle(0, 30, 270, 300), Cycle(300, 300, 660, 700), Cycle(700, 700, 970, 1000))
    steps = plan_cycles(1000, 20, 50, [300, 700])
    assert steps == (Cycle(0, 20, 250, 300), Cycle(300, 300, 650, 700), Cycle(700, 700, 950, 1000))


def test_shares_are_rounded_down_but_not_by_rounding_noise():
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert plan_cycles(100, 0.29, 0.0)[0].warmup_end == 29
    assert plan_cycles(100, 0.0, 0.57)[0].decay_start == 43
    assert plan_cycles(99, 0.1, 0.1) == (Cycle(0, 9, 90, 99),)
    assert plan_cycles(9, 0.1, 0.1) == (Cycle(0, 0, 9, 9),)
    assert plan_cycles(3, 1 / 3, 0.0)[0].warmup_end == 1
    # A real remainder is never rounded up, however near it is to a step.
    assert plan_cycles(1, 0.0, 0.9999)[0].decay_start == 1
    assert plan_cycles(2, 0.49999, 0.0)[0].warmup_end == 0


def test_the_end_of_the_run_may_also_be_named_as_a_budget():
    assert plan_cycles(100, 5, 0.1, [50, 100]) == plan_cycles(100, 5, 0.1, [50])
    assert plan_cycles(100, 5, 0.1, [100]) == plan_cycles(100, 5, 0.1)
    assert plan_cycles(100, 5, 0.1, []) == plan_cycles(100, 5, 0.1)


def test_an_open_run_stays_at_the_peak():
    assert plan_cycles(None, 10, 0.1) == (Cycle(0, 10, None, None),)
    values = ours(5000, None, warmup=10, decay=0.1)
    assert values[:10] == [step / 10 for step in range(10)]
    assert set(values[10:]) == {1.0}


def test_an_open_run_with_budgets_decays_at_each_and_then_stays_open():
    assert plan_cycles(None, 0.1, 0.1, [100, 200]) == (
        Cycle(0, 10, 90, 100),
        Cycle(100, 100, 190, 200),
        Cycle(200, 200, None, None),
    )
    values = ours(400, None, warmup=0.1, decay=0.1, budgets=[100, 200])
    assert values[199] < 0.2
    assert set(values[200:]) == {1.0}


def test_a_share_of_nothing_is_known_without_a_horizon():
    assert plan_cycles(None, 0.0, 0.1) == (Cycle(0, 0, None, None),)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_a_hand_made_plan_is_read_like_a_planned_one(shape):
    """A decay that is asked for in the middle of a run is a plan with another end."""
    cycles = (Cycle(0, 4, 30, 35), Cycle(35, 35, 50, 60))
    twin = [
        *[step / 4 for step in range(4)],
        *[1.0] * 26,
        *[wsd_twin.decayed(done / 5, shape, 0.1) for done in range(5)],
        *[1.0] * 15,
        *[wsd_twin.decayed(done / 10, shape, 0.1) for done in range(10)],
        *[0.1] * 5,
    ]
    assert [plan_multiplier(step, cycles, shape, 0.1) for step in range(65)] == pytest.approx(twin, rel=1e-11)
    planned = plan_cycles(60, 4, 0.25, [35])
    assert [plan_multiplier(step, planned, shape, 0.1) for step in range(65)] == ours(
        65, 60, warmup=4, decay=0.25, shape=shape, min_ratio=0.1, budgets=[35]
    )


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("length", [0, 1, 10_000, 0.0, 0.01, 0.999])
def test_a_length_is_steps_or_a_share(length):
    check_length("warmup", length)


@pytest.mark.parametrize("length", [-1, 1.0, 1.5, -0.25, True, math.nan, math.inf])
def test_a_length_that_is_neither_is_named(length):
    with pytest.raises(ValueError, match="some_name") as caught:
        check_length("some_name", length)
    assert str(length) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((100, 60, 50), ["60", "50", "100"]),
        ((100, 0.6, 0.5), ["100"]),
        ((100, 0, 101), ["101", "100"]),
        ((100, 5, 30, [50, 70]), ["30", "20"]),
        ((100, 30, 30, [50]), ["30", "50"]),
        ((100, 0, 0, [50, 50]), ["50"]),
        ((100, 0, 10, [70, 50]), ["70", "50"]),
        ((100, 0, 0, [0, 50]), ["0"]),
        ((100, 0, 0, [-5, 50]), ["-5"]),
        ((100, 0, 0, [50, 150]), ["150", "100"]),
        ((None, 0, 0, [50, 20]), ["50", "20"]),
        ((None, 0.1, 0.1), ["0.1"]),
        ((100, 1.0, 0), ["1.0"]),
        ((100, 0, 1.0), ["1.0"]),
        ((100, 1.5, 0), ["1.5"]),
        ((100, 0, -0.25), ["-0.25"]),
        ((100, -7, 0), ["-7"]),
        ((100, 0, -7), ["-7"]),
        ((0, 0, 0), ["0"]),
        ((-10, 0, 0), ["-10"]),
        ((True, 0, 0), ["True"]),
        ((100, True, 0), ["True"]),
        ((100, 0, True), ["True"]),
        ((100, float("nan"), 0), ["nan"]),
        ((100, 0, float("inf")), ["inf"]),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_kept_is_refused_and_named(arguments, named):
    with pytest.raises(ValueError, match=r".") as caught:
        plan_cycles(*arguments)
    for value in named:
        assert value in str(caught.value)


@pytest.mark.parametrize("arguments", [(100, 60, 50), (100, 0, 1.0), (100, 0, 0, "linear", 0.1, [150])], ids=str)
def test_the_multiplier_refuses_the_same_plans(arguments):
    with pytest.raises(ValueError, match=r"60|1\.0|150"):
        wsd_multiplier(0, *arguments)


def test_a_wrong_name_of_a_parameter_is_in_the_message():
    with pytest.raises(ValueError, match="warmup"):
        plan_cycles(100, -7, 0)
    with pytest.raises(ValueError, match="decay"):
        plan_cycles(100, 0, -7)
    with pytest.raises(ValueError, match="budget"):
        plan_cycles(100, 0, 0, [150])


def test_an_unknown_shape_is_named_with_the_allowed_ones():
    for call in (
        lambda: decay_multiplier(0.5, "sine", 0.1),
        lambda: wsd_multiplier(95, 100, shape="sine"),
    ):
        with pytest.raises(ValueError, match="sine") as caught:
            call()
        for shape in ALL_SHAPES:
            assert shape in str(caught.value)


@pytest.mark.parametrize("shape", ["exponential", "inverse"])
def test_shapes_that_divide_by_the_floor_refuse_a_floor_of_zero(shape):
    with pytest.raises(ValueError, match=shape) as caught:
        decay_multiplier(0.5, shape, 0.0)
    assert "0" in str(caught.value)
