"""The metrics of continual learning at values that follow by hand, and what is refused."""

import io
import json
import math
import time

import pytest
import torch

from lightning_stable.functional.continual import (
    compute_continual,
    end_task,
    init_continual,
    pack_continual,
    unpack_continual,
    update_continual,
)


def one_task(scores, task=0, **settings):
    """Return the metrics of one task's scores."""
    state = init_continual(**settings)
    for score in scores:
        update_continual(state, {task: score}, task)
    return compute_continual(state)


def three_tasks(sign=1, steps=True, **settings):
    """Return a state in which task 2 is learned, after two that fell and came back; losses with sign=-1."""
    state = init_continual((2, 10), higher_is_better=sign == 1, **settings)
    history = [
        (0, 0, {0: 0.1, 1: 0.2, 2: 0.3}),
        (0, 10, {0: 0.9, 1: 0.3, 2: 0.3}),
        "end",
        (1, 10, {0: 0.9, 1: 0.3, 2: 0.3}),
        (1, 12, {0: 0.3, 1: 0.5, 2: 0.4}),
        (1, 15, {0: 0.7, 1: 0.7, 2: 0.2}),
        (1, 20, {0: 0.85, 1: 0.8, 2: 0.2}),
        "end",
        (2, 20, {0: 0.85, 1: 0.8, 2: 0.2}),
        (2, 21, {0: 0.55, 1: 0.9, 2: 0.6}),
        (2, 30, {0: 0.6, 1: 0.7, 2: 0.8}),
    ]
    for entry in history:
        if entry == "end":
            end_task(state, state.current)
        else:
            task, step, scores = entry
            update_continual(state, {t: sign * s for t, s in scores.items()}, task, step if steps else None)
    return state


BY_HAND = {
    "average_accuracy": (0.6 + 0.7 + 0.8) / 3,
    "forgetting": ((0.9 - 0.6) + (0.8 - 0.7)) / 2,
    "backward_transfer": -((0.9 - 0.6) + (0.8 - 0.7)) / 2,
    "forward_transfer": ((0.3 - 0.2) + (0.2 - 0.3)) / 2,
    "min_accuracy": (0.3 + 0.7) / 2,
    "worst_case_accuracy": (0.8 + 0.3 + 0.7) / 3,
    "windowed_forgetting_2": (0.6 + 0.2 + 0.2) / 3,
    "windowed_plasticity_2": (0.8 + 0.2 + 0.4) / 3,
    "windowed_forgetting_10": (0.6 + 0.2 + 0.2) / 3,
    "windowed_plasticity_10": (0.8 + 0.7 + 0.6) / 3,
    "learning_curve_area": ((0.1 + 0.9) / 2 + (0.3 + 0.5 + 0.7 + 0.8) / 4 + (0.2 + 0.6 + 0.8) / 3) / 3,
    # Task 0 fell by 0.6 at the first switch and by 0.3 at the second, task 1 by 0.1.
    "gap_depth": (0.6 + 0.3 + 0.1) / 3,
    # 0.3 + 0.9 * 0.6 = 0.84 is reached at step 20, 10 steps after the switch; the others are still down.
    "gap_recovery": 10.0,
    "gap_recovered": 1 / 3,
}


def test_three_tasks_by_hand():
    assert compute_continual(three_tasks()) == pytest.approx(BY_HAND)


def test_of_losses_changes_keep_their_meaning_and_levels_their_sign():
    levels = ("average_accuracy", "min_accuracy", "worst_case_accuracy", "learning_curve_area")
    expected = {name: -value if name in levels else value for name, value in BY_HAND.items()}
    assert compute_continual(three_tasks(sign=-1)) == pytest.approx(expected)


def test_without_steps_recovery_counts_evaluations():
    assert compute_continual(three_tasks(steps=False)) == pytest.approx({**BY_HAND, "gap_recovery": 3.0})


def test_the_rise_after_a_fall_counts():
    """A search that skips starting points lower than an earlier one, right for drops, finds no rise here."""
    values = one_task([0.9, 0.1, 0.8], windows=(2, 10))
    for window in (2, 10):
        assert values[f"windowed_plasticity_{window}"] == pytest.approx(0.7)
        assert values[f"windowed_forgetting_{window}"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("scores", "window", "drop", "rise"),
    [
        ([0.5], 2, math.nan, math.nan),
        ([0.5, 0.5], 2, 0.0, 0.0),
        ([0.1, 0.3, 0.6], 2, -0.2, 0.3),
        ([0.1, 0.3, 0.6], 3, -0.2, 0.5),
        ([0.9, 0.6, 0.3, 0.0], 3, 0.6, -0.3),
        ([0.9, 0.5, 0.5, 0.0], 3, 0.5, 0.0),
        ([0.0, 1.0, 0.5, 0.5, 0.5, 0.2], 3, 0.5, 1.0),
    ],
)
def test_a_window_of_evaluations(scores, window, drop, rise):
    values = one_task(scores, windows=(window,))
    assert values[f"windowed_forgetting_{window}"] == pytest.approx(drop, nan_ok=True)
    assert values[f"windowed_plasticity_{window}"] == pytest.approx(rise, nan_ok=True)


def test_a_window_counts_the_evaluations_of_its_task():
    state = init_continual((2,))
    for scores in ({0: 0.9}, {1: 0.5}, {1: 0.5}, {0: 0.4}):
        update_continual(state, scores, 0)
    assert compute_continual(state)["windowed_forgetting_2"] == pytest.approx((0.5 + 0.0) / 2)


def test_nothing_is_defined_before_it_can_be():
    state = init_continual((2,))
    assert all(math.isnan(value) for value in compute_continual(state).values())
    update_continual(state, {0: 0.25}, 0)
    defined = {name: value for name, value in compute_continual(state).items() if not math.isnan(value)}
    assert defined == {"average_accuracy": 0.25, "worst_case_accuracy": 0.25, "learning_curve_area": 0.25}


def test_the_minimum_begins_after_the_end_of_the_task():
    state = init_continual(())
    for score in (0.1, 0.9):
        update_continual(state, {0: score}, 0)
    end_task(state, 0)
    update_continual(state, {0: 0.2}, 0)  # after its end, while no other task is learned
    assert math.isnan(compute_continual(state)["min_accuracy"])
    update_continual(state, {0: 0.7, 1: 0.5}, 1)
    assert compute_continual(state)["min_accuracy"] == 0.7
    assert compute_continual(state)["worst_case_accuracy"] == pytest.approx(0.6)


def test_scores_at_the_end_are_a_reference_and_no_evaluation():
    state = init_continual((2,))
    update_continual(state, {0: 0.5}, 0)
    before = pack_continual(state)["evaluations"]
    end_task(state, 0, {0: 0.8, 3: 0.1})
    update_continual(state, {0: 0.5}, 1)
    values = compute_continual(state)
    assert values["forgetting"] == pytest.approx(0.3)
    assert values["windowed_forgetting_2"] == 0.0
    assert pack_continual(state)["evaluations"] == before + 1


def test_a_task_that_returns_is_learned_again():
    state = init_continual(())
    for task, scores in [(0, {0: 0.9}), (1, {0: 0.5, 1: 0.1}), (1, {0: 0.4, 1: 0.8})]:
        update_continual(state, scores, task)
        end_task(state, task)
    update_continual(state, {0: 0.4, 1: 0.8}, 0)
    update_continual(state, {0: 0.7, 1: 0.6}, 0)
    values = compute_continual(state)
    assert values["average_accuracy"] == pytest.approx(0.65)
    assert values["forgetting"] == pytest.approx(0.2), "task 1 is the past one now"
    assert values["min_accuracy"] == 0.6
    # 0.5 to 0.4 after the first switch, 0.8 to 0.6 after the second.
    assert values["gap_depth"] == pytest.approx((0.1 + 0.2) / 2)
    end_task(state, 0)
    update_continual(state, {0: 0.65, 1: 0.6}, 1)
    assert compute_continual(state)["forgetting"] == pytest.approx(0.05), "measured from its last end"


def test_tasks_need_no_order():
    state = init_continual(())
    for task, scores in [(2, {0: 0.5, 2: 0.1}), (2, {0: 0.4, 2: 0.9}), (0, {0: 0.4, 2: 0.9}), (0, {0: 0.8, 2: 0.7})]:
        update_continual(state, scores, task)
    assert compute_continual(state)["average_accuracy"] == pytest.approx(0.75)
    assert compute_continual(state)["forward_transfer"] == pytest.approx(0.4 - 0.5)
    assert compute_continual(state)["gap_depth"] == pytest.approx(0.2)


def test_a_new_minimum_starts_the_search_for_the_recovery_anew():
    state = init_continual((), recovery_share=0.5)
    update_continual(state, {0: 1.0}, 0, 0)
    recoveries = []
    for step, score in enumerate([1.0, 0.5, 0.75, 0.0, 0.4, 0.5, 0.0, 1.0]):
        update_continual(state, {0: score}, 1, step)
        recoveries.append(compute_continual(state)["gap_recovery"])
    assert recoveries == pytest.approx([math.nan, math.nan, 2, math.nan, math.nan, 5, 5, 5], nan_ok=True)
    assert compute_continual(state)["gap_depth"] == 1.0


def test_all_of_a_fall_can_be_asked_for():
    """By rounding, 0.3 + (0.9 - 0.3) is more than 0.9."""
    assert 0.3 + (0.9 - 0.3) > 0.9
    state = init_continual((), recovery_share=1.0)
    for task, score in [(0, 0.9), (1, 0.9), (1, 0.3), (1, 0.9)]:
        update_continual(state, {0: score}, task)
    assert compute_continual(state)["gap_recovered"] == 1.0


@pytest.mark.parametrize("baseline", [0.25, {1: 0.25}])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_baseline_stands_in_where_nothing_was_evaluated_before_training(baseline, sign):
    signed = {1: sign * 0.25} if isinstance(baseline, dict) else sign * baseline
    state = init_continual((), higher_is_better=sign == 1, baseline=signed)
    update_continual(state, {0: sign * 0.5}, 0, 0)
    update_continual(state, {0: sign * 0.9, 1: sign * 0.4}, 1, 5)
    update_continual(state, {0: sign * 0.9, 1: sign * 0.8}, 1, 6)
    assert compute_continual(state)["forward_transfer"] == pytest.approx(0.15)
    assert unpack_continual(json.loads(json.dumps(pack_continual(state)))) == state


def test_a_history_that_begins_after_some_steps_knows_nothing_from_before_training():
    state = init_continual(())
    update_continual(state, {0: 0.9, 1: 0.2}, 0, 50)
    update_continual(state, {0: 0.9, 1: 0.4}, 1, 60)
    assert math.isnan(compute_continual(state)["forward_transfer"])


def test_a_packed_history_goes_on_alike_from_json_and_from_a_checkpoint():
    state = three_tasks(baseline=0.1)
    packed = pack_continual(state)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    for copy in (json.loads(json.dumps(packed)), loaded):
        other = unpack_continual(copy)
        assert other == state
        for one in (state, other):
            update_continual(one, {0: 0.1, 1: 0.9, 2: 1 / 3}, 2, 31)
            end_task(one, 2)
        assert other == state
        assert repr(compute_continual(other)) == repr(compute_continual(state))
        state = unpack_continual(packed)


@pytest.mark.parametrize("direction", [1, -1])
def test_the_state_is_bounded_where_the_candidates_pile_up(direction):
    state = init_continual((2, 10, 100))
    sizes = []
    for number in range(1000):
        update_continual(
            state, {0: float(direction * number), 1: -float(direction * number)}, number // 100 % 3, number
        )
        windows = [window for history in state.tasks.values() for window in history.windows]
        assert all(max(len(window.highs), len(window.lows)) <= window.size for window in windows)
        sizes.append(len(json.dumps(pack_continual(state))))
    assert max(sizes[500:]) < 1.3 * max(sizes[:500])


def test_an_evaluation_costs_the_same_in_any_window():
    def seconds(window):
        best = math.inf
        for _ in range(3):
            state = init_continual((window,))
            began = time.perf_counter()
            for number in range(4000):
                # Falling for long, then above all before: a whole window of candidates leaves at once.
                update_continual(state, {0: -float(number % 1000) + number}, 0)
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(1000) < 10 * seconds(2)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, "holds no score"),
        (None, "holds no score"),
        ([0.5], "holds no score"),
        ({0: 0.5, 1: math.nan}, "score of task 1 is nan"),
        ({2: math.inf}, "score of task 2 is inf"),
        ({0: torch.tensor([0.1, 0.2])}, "not one number"),
        ({0: None}, "not one number"),
        ({0: "0.5"}, "is '0.5', which is not one number"),
        ({0: b"1"}, "not one number"),
        ({-1: 0.5}, "task -1 is not a whole number"),
        ({True: 0.5}, "task True is not a whole number"),
        ({"0": 0.5}, "task '0' is not a whole number"),
    ],
)
def test_bad_scores_are_refused_and_change_nothing(scores, words):
    state = three_tasks()
    before = pack_continual(state)
    with pytest.raises(ValueError, match=words):
        update_continual(state, scores, 2, 40)
    with pytest.raises(ValueError, match=words):
        end_task(state, 2, scores if scores is not None else {})
    assert pack_continual(state) == before


@pytest.mark.parametrize(
    ("task", "step", "words"),
    [
        (-1, 40, "task -1 is not a whole number"),
        (0.5, 40, "task 0.5 is not a whole number"),
        (2, 29, "step=29 is before 30"),
        (2, None, "step=None follows step=30"),
        (2, 30.5, "step=30.5 is not a number of optimizer steps"),
    ],
)
def test_bad_tasks_and_steps_are_refused_and_change_nothing(task, step, words):
    state = three_tasks()
    before = pack_continual(state)
    with pytest.raises(ValueError, match=words):
        update_continual(state, {0: 0.5}, task, step)
    assert pack_continual(state) == before


def test_steps_that_begin_late_are_refused():
    with pytest.raises(ValueError, match="step=40 follows step=None"):
        update_continual(three_tasks(steps=False), {0: 0.5}, 2, 40)


@pytest.mark.parametrize(
    ("task", "scores", "words"),
    [
        (7, None, "Task 7 ends but was never evaluated"),
        (-1, None, "task -1 is not a whole number"),
        (1, {0: 0.5}, r"scores at the end of task 1 are of the tasks \[0\]"),
    ],
)
def test_bad_ends_are_refused(task, scores, words):
    with pytest.raises(ValueError, match=words):
        end_task(three_tasks(), task, scores)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"windows": (1,)}, "The window 1 is not a number of evaluations from 2 on"),
        ({"windows": (10, 2.5)}, "The window 2.5"),
        ({"windows": (True,)}, "The window True"),
        ({"windows": 10}, "windows=10 is not a list"),
        ({"windows": "10"}, "The window '1'"),
        ({"windows": (10, 10)}, "has a window twice"),
        ({"curve_steps": 0}, "curve_steps=0"),
        ({"recovery_share": 0.0}, "recovery_share=0.0"),
        ({"recovery_share": 1.5}, "recovery_share=1.5"),
        ({"higher_is_better": "yes"}, "higher_is_better='yes'"),
        ({"baseline": math.nan}, "baseline=nan"),
        ({"baseline": {0: math.inf}}, "is no finite score"),
        ({"baseline": {-1: 0.5}}, "task -1 is not a whole number"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        init_continual(**settings)
