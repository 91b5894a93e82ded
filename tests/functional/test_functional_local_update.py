"""The length of a round: schedules, what is refused, and the fewest steps that hide an exchange."""

import math

import pytest

from lightning_stable.functional.local_update import check_local_steps, round_length, steps_that_hide


@pytest.mark.parametrize("step", [0, 1, 10_000])
def test_a_count_holds_at_every_step(step):
    assert round_length(24, step) == 24
    assert round_length(1, step) == 1


@pytest.mark.parametrize("schedule", [[(0, 48), (100, 24), (150, 6)], [[0, 48], [100, 24], [150, 6]]])
def test_a_schedule_holds_from_its_steps_on(schedule):
    found = {step: round_length(schedule, step) for step in (0, 99, 100, 149, 150, 151, 10_000)}
    assert found == {0: 48, 99: 48, 100: 24, 149: 24, 150: 6, 151: 6, 10_000: 6}


def test_a_schedule_may_be_a_tuple_and_have_one_entry():
    assert round_length(((0, 5),), 3) == 5


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "24", "auto", None, math.inf])
def test_a_count_below_one_or_no_count_is_refused_and_shown(count):
    with pytest.raises(ValueError, match="local_steps") as caught:
        check_local_steps(count)
    assert repr(count) in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ([], "no entry"),
        ([(0, 6), 12], "12, which is not a pair"),
        ([(0, 6, 1)], "not a pair"),
        (["06"], "not a pair"),
        ([(0, 0)], "local steps of a pair"),
        ([(0, 6), (10, -2)], "-2"),
        ([(0, 6.5)], "6.5"),
        ([(-1, 6)], "first step of a pair"),
        ([(True, 6)], "True"),
        ([(5, 6)], "begins at step 5"),
        ([(0, 6), (10, 3), (10, 2)], "do not rise"),
        ([(0, 6), (10, 3), (4, 2)], "do not rise"),
    ],
)
def test_a_schedule_that_leaves_a_round_without_a_length_is_refused(schedule, words):
    for use in (check_local_steps, lambda given: round_length(given, 0)):
        with pytest.raises(ValueError, match="local_steps") as caught:
            use(schedule)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("transfer", "step", "margin", "steps"),
    [(1.0, 0.25, 1.0, 4), (1.0, 0.25, 1.25, 5), (1.0, 0.3, 1.0, 4), (0.0, 0.1, 1.25, 1), (0.01, 1.0, 1.25, 1)],
)
def test_the_fewest_steps_that_hide(transfer, step, margin, steps):
    assert steps_that_hide(transfer, step, margin) == steps


def test_they_hide_and_one_fewer_would_not():
    for transfer in (0.013, 0.4, 1.7, 33.0):
        for step in (0.002, 0.13, 2.0):
            steps = steps_that_hide(transfer, step)
            assert steps * step >= 1.25 * transfer * (1 - 1e-12)
            assert steps == 1 or (steps - 1) * step < 1.25 * transfer


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1.0, 0.1), "transfer_seconds"),
        ((math.nan, 0.1), "transfer_seconds"),
        ((1.0, 0.0), "step_seconds"),
        ((1.0, math.inf), "step_seconds"),
        ((1.0, 0.1, 0.0), "margin"),
    ],
)
def test_durations_that_cannot_be_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        steps_that_hide(*arguments)
