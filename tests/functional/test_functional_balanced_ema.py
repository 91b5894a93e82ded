"""The stability-plasticity balanced average against a slow twin, in both forms, and at every edge of its formula."""

import math

import pytest
import torch
from oracles import averaging_twin

from lightning_stable.functional.balanced_ema import (
    BalancedEMAState,
    balance_coefficients,
    init_balanced_ema,
    update_balanced_ema,
)

SIZES = ((3, 4), (5,), (1,), (2, 3, 2))
FORMS = ("derived", "released")


def as_lists(tensors):
    return [None if tensor is None else tensor.detach().double().flatten().tolist() for tensor in tensors]


def random_tensors(generator, scale=1.0, dtype=torch.float32):
    return [(torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype) for size in SIZES]


def trajectory(steps, seed=0, step_size=0.3, gradient_scale=3.0):
    """Weights after each step (the starting ones first) and the gradients of each step."""
    generator = torch.Generator().manual_seed(seed)
    weights = [random_tensors(generator)]
    gradients = []
    for _ in range(steps):
        gradients.append(random_tensors(generator, gradient_scale))
        moves = random_tensors(generator, step_size)
        weights.append([weight + move for weight, move in zip(weights[-1], moves, strict=True)])
    return weights, gradients


def one(shadow, weights, previous_weights, gradient, previous_gradient, form, fallback=0.99):
    """The coefficient of a model of one tensor, given as plain numbers."""
    tensors = [[torch.tensor(values)] for values in (shadow, weights, previous_weights, gradient, previous_gradient)]
    return balance_coefficients(*tensors, form=form, fallback=fallback).item()


# ----------------------------------------------------------------------------- the coefficient


def test_a_worked_example_of_each_form():
    # |g| = 5, |w - w_prev| = 0.5, |w - shadow| = 4, |g - g_prev| = 6: 6 * 0.5 / 24 and 1 - 2 * 6 / 24.
    numbers = ([0.0, 0.0], [2.0, -2.0], [2.0, -1.5], [2.0, -3.0], [-1.0, 0.0])
    assert one(*numbers, "derived") == pytest.approx(0.125)
    assert one(*numbers, "released") == pytest.approx(0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_same_as_the_twin(form, seed):
    generator = torch.Generator().manual_seed(seed)
    shadow, weights, previous_weights, gradients, previous_gradients = (
        random_tensors(generator, scale) for scale in (1.0, 1.0, 1.0, 3.0, 3.0)
    )
    values = balance_coefficients(
        shadow, weights, previous_weights, gradients, previous_gradients, form=form, fallback=0.97
    )
    lists = [as_lists(tensors) for tensors in (shadow, weights, previous_weights, gradients, previous_gradients)]
    expected = [averaging_twin.balance(*(tensors[i] for tensors in lists), form, 0.97) for i in range(len(SIZES))]
    assert values.shape == (len(SIZES),)
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_random_tensors_above_reach_values_and_fallbacks(form):
    """The comparison with the twin would say little if every value were the fallback."""
    inside = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lists = [as_lists(random_tensors(generator, scale)) for scale in (1.0, 1.0, 1.0, 3.0, 3.0)]
        for i in range(len(SIZES)):
            inside += averaging_twin.balance(*(tensors[i] for tensors in lists), form, 0.97) != 0.97
    assert 10 < inside < 20 * len(SIZES)


def test_the_defaults_are_the_derived_form_and_the_papers_fallback():
    weights, gradients = trajectory(2)
    arguments = (weights[0], weights[2], weights[1], gradients[1], gradients[0])
    assert torch.equal(
        balance_coefficients(*arguments), balance_coefficients(*arguments, form="derived", fallback=0.99)
    )
    nothing_before = balance_coefficients(weights[0], weights[1], weights[0], gradients[0], None)
    assert nothing_before.tolist() == pytest.approx([0.99] * len(SIZES))


@pytest.mark.parametrize("form", FORMS)
def test_without_previous_gradients_every_tensor_takes_the_fallback(form):
    weights, gradients = trajectory(1)
    values = balance_coefficients(weights[0], weights[1], weights[0], gradients[0], None, form=form, fallback=0.75)
    assert values.dtype == torch.float32
    assert values.tolist() == [0.75] * len(SIZES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        ("weights equal the shadow", ([1.0, 2.0], [1.0, 2.0], [0.5, 2.0], [1.0, 1.0], [0.0, 3.0])),
        ("equal gradients", ([0.0, 0.0], [1.0, 2.0], [0.5, 2.0], [1.0, 1.0], [1.0, 1.0])),
        ("both", ([1.0, 2.0], [1.0, 2.0], [0.5, 2.0], [1.0, 1.0], [1.0, 1.0])),
        ("nothing moved at all", ([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0])),
        ("nan gradient", ([0.0, 0.0], [1.0, 2.0], [0.5, 2.0], [math.nan, 1.0], [1.0, 0.0])),
        ("nan gradient before", ([0.0, 0.0], [1.0, 2.0], [0.5, 2.0], [1.0, 1.0], [math.nan, 0.0])),
        ("infinite gradient", ([0.0, 0.0], [1.0, 2.0], [0.5, 2.0], [math.inf, 1.0], [1.0, 0.0])),
        ("infinite gradients cancel", ([0.0, 0.0], [1.0, 2.0], [0.5, 2.0], [math.inf, 1.0], [math.inf, 0.0])),
        ("nan weight", ([0.0, 0.0], [math.nan, 2.0], [0.5, 2.0], [1.0, 1.0], [1.0, 0.0])),
        ("value above one, or below zero", ([0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [1.0, 1.0], [1.0, 0.9])),
    ],
)
def test_the_fallback_stands_in_wherever_the_formula_has_no_value(form, case, numbers):
    assert one(*numbers, form, fallback=0.625) == 0.625


def test_the_ends_of_the_open_interval_take_the_fallback():
    # Derived, value 0: the weights did not move in this step.
    assert one([0.0], [1.0], [1.0], [4.0], [1.0], "derived", 0.5) == 0.5
    # Derived, value 1: (1 + 3) * 1 / (1 * 4).
    assert one([0.0], [1.0], [0.0], [3.0], [-1.0], "derived", 0.5) == 0.5
    # Released, r = 1, so beta = 0: 2 * (1 + 3) / (2 * 4).
    assert one([0.0], [2.0], [0.0], [3.0], [-1.0], "released", 0.5) == 0.5


def test_an_infinite_gradient_before_gives_the_fallback_in_the_derived_form():
    assert one([0.0], [1.0], [0.5], [1.0], [math.inf], "derived", 0.5) == 0.5


@pytest.mark.parametrize("form", FORMS)
def test_one_bad_tensor_does_not_touch_its_neighbours(form):
    weights, gradients = trajectory(2)
    arguments = [weights[0], weights[2], weights[1], gradients[1], gradients[0]]
    good = balance_coefficients(*arguments, form=form, fallback=0.97).tolist()
    spoiled = [tensor.clone() for tensor in gradients[1]]
    spoiled[1][2] = math.nan
    arguments[3] = spoiled
    values = balance_coefficients(*arguments, form=form, fallback=0.97).tolist()
    assert values[1] == pytest.approx(0.97)
    assert values[:1] + values[2:] == good[:1] + good[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tensors_are_measured_in_float32(dtype):
    # 200 entries of 400 sum to 80 000, more than float16 can hold and beyond bfloat16's three digits.
    n = 200
    shadow = [torch.zeros(n)]
    weights = [torch.full((n,), 0.25, dtype=dtype)]
    previous_weights = [torch.full((n,), 0.125, dtype=dtype)]
    gradients = [torch.full((n,), 400.0, dtype=dtype)]
    previous_gradients = [torch.full((n,), -416.0, dtype=dtype)]
    arguments = (shadow, weights, previous_weights, gradients, previous_gradients)
    derived = balance_coefficients(*arguments, form="derived")
    released = balance_coefficients(*arguments, form="released")
    assert derived.dtype == released.dtype == torch.float32
    assert derived.item() == pytest.approx(80_001 * 25 / (50 * 163_200), rel=1e-5)
    assert 1 - released.item() == pytest.approx(2 * 80_001 / (50 * 163_200), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_bfloat16_tensors_with_a_float32_shadow_follow_the_twin(form, seed):
    generator = torch.Generator().manual_seed(seed)
    shadow = random_tensors(generator)
    rest = [random_tensors(generator, scale, torch.bfloat16) for scale in (1.0, 1.0, 3.0, 3.0)]
    values = balance_coefficients(shadow, *rest, form=form, fallback=0.97)
    lists = [as_lists(tensors) for tensors in (shadow, *rest)]
    expected = [averaging_twin.balance(*(tensors[i] for tensors in lists), form, 0.97) for i in range(len(SIZES))]
    # The difference of two bfloat16 tensors may itself be rounded to bfloat16, which moves two of the norms by at most
    # 2**-9 each. The formula's quotient is beta in one form and 1 - beta in the other.
    quotient = (lambda beta: beta) if form == "derived" else (lambda beta: 1 - beta)
    assert [quotient(v) for v in values.tolist()] == pytest.approx([quotient(v) for v in expected], rel=2**-8)


def test_an_unknown_form_is_named_with_the_allowed_ones():
    weights, gradients = trajectory(1)
    with pytest.raises(ValueError, match="paper") as caught:
        balance_coefficients(weights[0], weights[1], weights[0], gradients[0], None, form="paper")
    for form in FORMS:
        assert form in str(caught.value)
    with pytest.raises(ValueError, match="paper"):
        update_balanced_ema(init_balanced_ema(weights[0]), weights[1], weights[0], gradients[0], form="paper")


@pytest.mark.parametrize("short", range(5))
def test_a_different_number_of_tensors_is_an_error(short):
    weights, gradients = trajectory(2)
    arguments = [weights[0], weights[2], weights[1], gradients[1], gradients[0]]
    arguments[short] = arguments[short][:-1]
    with pytest.raises((ValueError, RuntimeError)):
        balance_coefficients(*arguments)


# ----------------------------------------------------------------------------- the average


def test_the_average_starts_as_a_detached_copy_without_gradients():
    weights = [torch.nn.Parameter(tensor) for tensor in trajectory(0)[0][0]]
    state = init_balanced_ema(weights)
    assert isinstance(state, BalancedEMAState)
    assert state.gradients is None
    assert state.updates == 0
    for shadow, weight in zip(state.shadow, weights, strict=True):
        assert torch.equal(shadow, weight)
        assert shadow.data_ptr() != weight.data_ptr()
        assert not shadow.requires_grad
    wide = init_balanced_ema([weight.detach().bfloat16() for weight in weights], dtype=torch.float32)
    assert all(shadow.dtype == torch.float32 for shadow in wide.shadow)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fallback", [0.99, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_whole_run_is_the_twins(form, fallback, seed):
    weights, gradients = trajectory(40, seed)
    twin = averaging_twin.BalancedAverage(as_lists(weights[0]), form, fallback)
    state = init_balanced_ema(weights[0])
    measured = 0
    for step, gradient in enumerate(gradients):
        new, before = weights[step + 1], weights[step]
        state, coefficients = update_balanced_ema(state, new, before, gradient, form=form, fallback=fallback)
        expected = twin.update(as_lists(new), as_lists(before), as_lists(gradient))
        assert coefficients.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert state.updates == step + 1
        measured += sum(value != fallback for value in expected)
    assert measured > 5
    for shadow, values in zip(state.shadow, twin.shadow, strict=True):
        assert shadow.flatten().tolist() == pytest.approx(values, rel=1e-3, abs=1e-3)


def test_the_first_update_uses_the_fallback_and_keeps_the_gradients():
    weights, gradients = trajectory(1)
    state, coefficients = update_balanced_ema(init_balanced_ema(weights[0]), weights[1], weights[0], gradients[0])
    assert coefficients.shape == (len(SIZES),)
    assert coefficients.tolist() == pytest.approx([0.99] * len(SIZES))
    for shadow, start, new in zip(state.shadow, weights[0], weights[1], strict=True):
        torch.testing.assert_close(shadow, 0.99 * start + 0.01 * new)
    assert state.gradients is not None
    for kept, gradient in zip(state.gradients, gradients[0], strict=True):
        assert torch.equal(kept, gradient)


def test_the_kept_gradients_outlive_zeroing():
    weights, gradients = trajectory(2)
    fresh = [[tensor.clone() for tensor in step] for step in gradients]
    state, _ = update_balanced_ema(init_balanced_ema(weights[0]), weights[1], weights[0], fresh[0])
    for tensor in fresh[0]:
        tensor.zero_()
    _, coefficients = update_balanced_ema(state, weights[2], weights[1], fresh[1])
    twin = averaging_twin.BalancedAverage(as_lists(weights[0]))
    for step in (0, 1):
        expected = twin.update(as_lists(weights[step + 1]), as_lists(weights[step]), as_lists(gradients[step]))
    assert coefficients.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("absent", [{0}, {7}, {2, 3, 6}, {0, 1, 2}], ids=str)
def test_a_tensor_takes_the_fallback_without_a_gradient_now_or_in_the_step_before(form, absent):
    """There is no difference of gradients across a gap; the other tensors do not notice it."""
    weights, gradients = trajectory(8, seed=5)
    twin = averaging_twin.BalancedAverage(as_lists(weights[0]), form, 0.9)
    state = init_balanced_ema(weights[0])
    for step in range(8):
        given = list(gradients[step])
        if step in absent:
            given[1] = None
        new, before = weights[step + 1], weights[step]
        state, coefficients = update_balanced_ema(state, new, before, given, form=form, fallback=0.9)
        expected = twin.update(as_lists(new), as_lists(before), as_lists(given))
        if step in absent or step - 1 in absent:
            assert expected[1] == 0.9
        assert coefficients.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for shadow, values in zip(state.shadow, twin.shadow, strict=True):
        assert shadow.flatten().tolist() == pytest.approx(values, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_gradient_is_the_fallback_at_once_and_measured_again_two_steps_later(form):
    weights, gradients = trajectory(8, seed=5)
    state = init_balanced_ema(weights[0])
    for step in range(8):
        given = list(gradients[step])
        if step in {2, 3}:
            given[1] = None
        shadow = [tensor.clone() for tensor in state.shadow]
        new, before = weights[step + 1], weights[step]
        state, coefficients = update_balanced_ema(state, new, before, given, form=form, fallback=0.9)
        if step in {2, 3}:
            assert coefficients[1].item() == pytest.approx(0.9)
        elif step not in {0, 4}:
            expected = balance_coefficients(
                shadow, new, before, gradients[step], gradients[step - 1], form=form, fallback=0.9
            )
            assert coefficients.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_first_step_may_lack_a_gradient():
    weights, gradients = trajectory(1)
    state, coefficients = update_balanced_ema(
        init_balanced_ema(weights[0]), weights[1], weights[0], [None, *gradients[0][1:]], fallback=0.5
    )
    assert coefficients.tolist() == [0.5] * len(SIZES)
    assert state.updates == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_blew_up_does_not_spoil_the_shadow(form):
    weights, gradients = trajectory(4)
    gradients[1][0].fill_(math.inf)
    gradients[2][1].fill_(math.nan)
    state = init_balanced_ema(weights[0])
    for step in range(4):
        state, coefficients = update_balanced_ema(state, weights[step + 1], weights[step], gradients[step], form=form)
        assert torch.isfinite(coefficients).all()
        assert ((coefficients > 0) & (coefficients < 1)).all()
    assert all(torch.isfinite(shadow).all() for shadow in state.shadow)


@pytest.mark.parametrize("short", range(3))
def test_an_update_with_a_different_number_of_tensors_is_an_error(short):
    weights, gradients = trajectory(2)
    state, _ = update_balanced_ema(init_balanced_ema(weights[0]), weights[1], weights[0], gradients[0])
    arguments = [weights[2], weights[1], gradients[1]]
    arguments[short] = arguments[short][:-1]
    with pytest.raises((ValueError, RuntimeError)):
        update_balanced_ema(state, *arguments)


def test_live_weights_and_gradients_are_left_alone():
    weights, gradients = trajectory(2)
    live = [torch.nn.Parameter(tensor.clone()) for tensor in weights[2]]
    before = [tensor.clone() for tensor in weights[1]]
    given = [tensor.clone() for tensor in gradients[1]]
    state, _ = update_balanced_ema(init_balanced_ema(weights[0]), weights[1], weights[0], gradients[0])
    state, coefficients = update_balanced_ema(state, live, before, given)
    assert not coefficients.requires_grad
    assert not any(tensor.requires_grad for tensor in [*state.shadow, *(state.gradients or [])])
    for left, right in ((live, weights[2]), (before, weights[1]), (given, gradients[1])):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_float32_shadow_of_bfloat16_weights():
    weights, gradients = trajectory(12)
    weights = [[tensor.bfloat16() for tensor in step] for step in weights]
    gradients = [[tensor.bfloat16() for tensor in step] for step in gradients]
    twin = averaging_twin.BalancedAverage(as_lists(weights[0]))
    state = init_balanced_ema(weights[0], dtype=torch.float32)
    for step in range(12):
        state, _ = update_balanced_ema(state, weights[step + 1], weights[step], gradients[step])
        twin.update(as_lists(weights[step + 1]), as_lists(weights[step]), as_lists(gradients[step]))
    for shadow, values in zip(state.shadow, twin.shadow, strict=True):
        assert shadow.dtype == torch.float32
        assert shadow.flatten().tolist() == pytest.approx(values, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_restored_state_goes_on_to_the_bit(form):
    weights, gradients = trajectory(10)

    def run(state, steps):
        for step in steps:
            state, _ = update_balanced_ema(state, weights[step + 1], weights[step], gradients[step], form=form)
        return state

    whole = run(init_balanced_ema(weights[0]), range(10))
    half = run(init_balanced_ema(weights[0]), range(5))
    copied = BalancedEMAState(
        [shadow.clone() for shadow in half.shadow], [gradient.clone() for gradient in half.gradients], half.updates
    )
    again = run(copied, range(5, 10))
    assert again.updates == whole.updates
    assert all(torch.equal(a, b) for a, b in zip(again.shadow, whole.shadow, strict=True))
