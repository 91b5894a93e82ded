"""The metrics of continual evaluation against brute force over the full history, on random histories."""

import io
import math
from collections import deque
from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles.continual_twin import continual

from lightning_stable.functional.continual import (
    compute_continual,
    end_task,
    init_continual,
    pack_continual,
    unpack_continual,
    update_continual,
)

# The same histories in every run.
repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=100)

# Many ties, and what a share of a half or of all of a drop comes to is exact; or any score, a loss or a perplexity.
COARSE = st.integers(-8, 8).map(lambda eighths: eighths / 8)
FINE = st.floats(-50, 50, allow_subnormal=False)
SIGNED = ("average_accuracy", "min_accuracy", "worst_case_accuracy", "learning_curve_area")


@st.composite
def histories(draw, scores=COARSE | FINE, full=False):
    """Draw a history of up to six stretches, in which each task is new or one that returns, in any order of numbers.

    Args:
        draw: Hypothesis's own.
        scores: What a score may be.
        full: Each evaluation is of all tasks that are learned, and each task ends before the next one begins.
    """
    scores = draw(st.sampled_from([COARSE, FINE])) if not full else scores
    order = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    events, learned, scored = [], set(), set()
    counted, step = draw(st.booleans()), draw(st.sampled_from([0, 0, 7]))
    for task in order:
        learned |= {task}
        for _ in range(draw(st.integers(1, 6))):
            some = st.sets(st.integers(0, 3), min_size=1)
            chosen = sorted(learned if full or draw(st.booleans()) else draw(some))
            events.append(("scores", {one: draw(scores) for one in chosen}, task, step if counted else None))
            scored |= set(chosen)
            # The evaluation before a first update has the step of the one before it.
            step += draw(st.sampled_from([0, 1, 1, 5]))
        ending = [task] if full else draw(st.lists(st.sampled_from(sorted(learned)), max_size=2, unique=True))
        events += [("end", one) for one in ending if one in scored]
    return events


@st.composite
def options(draw):
    return {
        "windows": tuple(draw(st.lists(st.sampled_from([2, 3, 5, 10, 100]), min_size=1, max_size=3, unique=True))),
        "higher_is_better": draw(st.booleans()),
        "curve_steps": draw(st.sampled_from([1, 3, 10])),
        "recovery_share": draw(st.sampled_from([0.25, 0.5, 0.9, 1.0])),
        "baseline": draw(st.none() | COARSE),
    }


def feed(state, events):
    for event in events:
        if event[0] == "end":
            end_task(state, event[1])
        else:
            update_continual(state, *event[1:])
    return state


def streamed(events, windows=(10, 100), **options):
    return compute_continual(feed(init_continual(windows, **options), events))


def evaluations(*values, task=0):
    """Return a history of one task."""
    return [("scores", {task: value}, task, None) for value in values]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), name


# Tasks that are evaluated one by one before any training.
UNTRAINED = [
    *(("scores", {task: task / 8}, 0, 0) for task in (0, 1, 2)),
    ("scores", {0: 1.0, 1: 0.5, 2: 0.75}, 0, 9),
    *(("scores", {0: 1.0, 1: 0.5, 2: 0.75}, task, 9 * task) for task in (1, 2)),
]


# ----------------------------------------------------------------------------- brute force


@given(histories(), options(), st.data())
@example(evaluations(0.9, 0.1, 0.8), {"windows": (2, 3)}, None)
@example(UNTRAINED, {}, None)
@settings(repeatable, max_examples=250)
def test_every_metric_is_that_of_brute_force_after_any_event(events, chosen, data):
    same(streamed(events, **chosen), continual(events, **chosen))
    if data is not None:
        events = events[: data.draw(st.integers(1, len(events)))]
        same(streamed(events, **chosen), continual(events, **chosen))


@given(histories(), options(), st.data())
@repeatable
def test_a_state_that_was_saved_and_loaded_goes_on_alike(events, chosen, data):
    cut = data.draw(st.integers(0, len(events)))
    windows = chosen.pop("windows")
    state = feed(init_continual(windows, **chosen), events[:cut])
    file = io.BytesIO()
    torch.save(pack_continual(state), file)
    file.seek(0)
    loaded = unpack_continual(torch.load(file, weights_only=True))
    feed(loaded, events[cut:])
    feed(state, events[cut:])
    packed, expected = pack_continual(loaded), pack_continual(state)
    assert repr(packed) == repr(expected)
    assert repr(compute_continual(loaded)) == repr(compute_continual(state))


@given(histories(), options())
@settings(repeatable, max_examples=60)
def test_looking_changes_nothing_and_a_packed_state_is_a_copy(events, chosen):
    windows = chosen.pop("windows")
    state = init_continual(windows, **chosen)
    for event in events:
        before = pack_continual(state)
        kept = repr(before)
        compute_continual(state)
        assert repr(pack_continual(state)) == kept
        feed(state, [event])
        assert repr(before) == kept


# ----------------------------------------------------------------------------- long histories


def by_deques(tasks, window):
    """Return WF and WP of full histories by a queue of the last scores of each task: linear in the window."""
    drops, rises = [], []
    for scores in tasks:
        last, drop, rise = deque(maxlen=window), -math.inf, -math.inf
        for score in scores:
            earlier = list(last)[-(window - 1) :]
            drop = max([drop, *(one - score for one in earlier)])
            rise = max([rise, *(score - one for one in earlier)])
            last.append(score)
        drops.append(drop)
        rises.append(rise)
    return sum(drops) / len(drops), sum(rises) / len(rises)


@pytest.mark.parametrize("kind", ["walk", "noise", "sawtooth", "falling", "constant"])
def test_windows_over_thousands_of_evaluations(kind):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 3000, generator=generator).tolist()
    tasks = {
        "walk": [list(accumulate(values)) for values in noise],
        "noise": noise,
        "sawtooth": [[(number * stride) % 97 / 97 for number in range(3000)] for stride in (1, 96)],
        "falling": [[-number * 0.01 for number in range(3000)]] * 2,
        "constant": [[0.5] * 3000] * 2,
    }[kind]
    windows = (2, 7, 64, 100)
    state = init_continual(windows)
    for number in range(3000):
        update_continual(state, {0: tasks[0][number], 1: tasks[1][number]}, number // 1500)
    found = compute_continual(state)
    for window in windows:
        drop, rise = by_deques(tasks, window)
        assert found[f"windowed_forgetting_{window}"] == pytest.approx(drop, rel=1e-9, abs=1e-12)
        assert found[f"windowed_plasticity_{window}"] == pytest.approx(rise, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("direction", [1, -1])
def test_the_state_does_not_grow_with_the_history(direction):
    """Scores that only rise, or only fall, are the worst case of a monotone queue."""

    def size(count):
        state = init_continual((3, 20))
        for number in range(count):
            update_continual(state, {0: direction * float(number), 1: -direction * float(number)}, 0)
        return len(repr(pack_continual(state)))

    assert size(4000) < 1.5 * size(1000)


# ----------------------------------------------------------------------------- values that are known


@pytest.mark.parametrize("window", [2, 3, 10, 100])
def test_the_rise_after_a_drop_is_seen(window):
    """A search that skips starting points below the running maximum, right for drops, says -0.1 here."""
    found = streamed(evaluations(0.9, 0.1, 0.8), windows=(window,))
    assert found[f"windowed_plasticity_{window}"] == pytest.approx(0.7)
    assert found[f"windowed_forgetting_{window}"] == pytest.approx(0.8)


def test_a_drop_that_is_slower_than_the_window_is_not_seen_whole():
    found = streamed(evaluations(0.9, 0.6, 0.3, 0.0), windows=(2, 3, 4))
    drops = [found[f"windowed_forgetting_{window}"] for window in (2, 3, 4)]
    assert drops == pytest.approx([0.3, 0.6, 0.9])


TWO_TASKS = [
    ("scores", {0: 0.5, 1: 0.1}, 0, 0),
    ("scores", {0: 0.9, 1: 0.2}, 0, 4),
    ("end", 0),
    ("scores", {0: 0.9, 1: 0.2}, 1, 4),
    ("scores", {0: 0.4, 1: 0.5}, 1, 5),
    ("scores", {0: 0.6, 1: 0.7}, 1, 6),
    ("scores", {0: 0.86, 1: 0.8}, 1, 9),
    ("end", 1),
]


@pytest.mark.parametrize("compute", [streamed, continual])
def test_two_tasks_by_hand(compute):
    found = compute(TWO_TASKS, windows=(2, 100))
    assert found == pytest.approx(
        {
            "average_accuracy": (0.86 + 0.8) / 2,
            "forgetting": 0.9 - 0.86,
            "backward_transfer": 0.86 - 0.9,
            "forward_transfer": 0.2 - 0.1,
            "min_accuracy": 0.4,
            "worst_case_accuracy": (0.8 + 0.4) / 2,
            "learning_curve_area": ((0.5 + 0.9) / 2 + (0.2 + 0.5 + 0.7 + 0.8) / 4) / 2,
            "gap_depth": 0.9 - 0.4,
            "gap_recovery": 9 - 4,  # 0.4 + 0.9 * 0.5 = 0.85 is reached at step 9
            "gap_recovered": 1.0,
            "windowed_forgetting_2": (0.5 + 0.0) / 2,  # the second task never drops between neighbours
            "windowed_plasticity_2": (0.4 + 0.3) / 2,
            "windowed_forgetting_100": (0.5 + 0.0) / 2,
            "windowed_plasticity_100": (0.46 + 0.7) / 2,
        },
        abs=1e-12,
    )


def test_a_fresh_state_knows_nothing():
    assert all(math.isnan(value) for value in streamed([]).values())
    same(streamed([]), continual([]))


# ----------------------------------------------------------------------------- what always holds


@given(histories(scores=COARSE, full=True))
@repeatable
def test_the_worst_case_is_a_lower_bound_of_the_average(events):
    found = streamed(events)
    if not math.isnan(found["worst_case_accuracy"]):
        assert found["worst_case_accuracy"] <= found["average_accuracy"] + 1e-12
    last = events[-2][1]
    assert found["average_accuracy"] == pytest.approx(sum(last.values()) / len(last))


@given(histories(), options())
@repeatable
def test_a_score_to_be_lowered_is_the_negated_score_to_be_raised(events, chosen):
    negated = [
        ("scores", {task: -value for task, value in event[1].items()}, *event[2:]) if event[0] == "scores" else event
        for event in events
    ]
    baseline = chosen["baseline"] if chosen["baseline"] is None else -chosen["baseline"]
    other = {**chosen, "higher_is_better": not chosen["higher_is_better"], "baseline": baseline}
    found, mirrored = streamed(events, **chosen), streamed(negated, **other)
    same({name: -value if name in SIGNED else value for name, value in mirrored.items()}, found)
    # In the same direction of better, a rise of one is a drop of the other.
    upside_down = streamed(negated, **{**chosen, "baseline": baseline})
    for window in chosen["windows"]:
        rise, drop = f"windowed_plasticity_{window}", f"windowed_forgetting_{window}"
        assert upside_down[drop] == pytest.approx(found[rise], nan_ok=True)
        assert upside_down[rise] == pytest.approx(found[drop], nan_ok=True)


@given(histories())
@repeatable
def test_a_longer_window_sees_at_least_as_much(events):
    windows = (2, 3, 5, 100)
    found = streamed(events, windows=windows)
    for name in ("windowed_forgetting", "windowed_plasticity"):
        values = [found[f"{name}_{window}"] for window in windows]
        assert values == sorted(values) or all(math.isnan(value) for value in values)


@given(histories(scores=COARSE, full=True))
@repeatable
def test_signs_and_shares(events):
    found = streamed(events)
    assert found["backward_transfer"] == pytest.approx(-found["forgetting"], nan_ok=True)
    assert not found["gap_depth"] < 0
    assert not found["gap_recovery"] < 0
    assert math.isnan(found["gap_recovered"]) or 0 <= found["gap_recovered"] <= 1
    # Nothing recovers where nothing fell.
    assert math.isnan(found["gap_recovered"]) is not (found["gap_depth"] > 0)
    if found["gap_recovered"] == 0:
        assert math.isnan(found["gap_recovery"])


@given(histories(), options())
@repeatable
def test_scores_count_by_their_differences(events, chosen):
    """Raising every score by the same amount raises levels by it and leaves changes alone."""
    raised = [
        ("scores", {task: value + 2 for task, value in event[1].items()}, *event[2:]) if event[0] == "scores" else event
        for event in events
    ]
    baseline = chosen["baseline"] if chosen["baseline"] is None else chosen["baseline"] + 2
    # Half and all of a drop are exact for coarse scores; other shares may be met by rounding alone.
    chosen = {**chosen, "recovery_share": 0.5}
    found = streamed(events, **chosen)
    moved = streamed(raised, **{**chosen, "baseline": baseline})
    ties = ("gap_recovery", "gap_recovered")
    for name, value in found.items():
        if name not in ties:
            expected = value + 2 if name in SIGNED else value
            assert moved[name] == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), name
