"""Stable-SPAM's clipping and normalisation: steps by hand, the element-wise twin, zero and non-finite gradients."""

import math

import pytest
import torch
from oracles.stable_spam_twin import StableSPAMTwin

from lightning_stable.functional.stable_spam import (
    StableSPAMInfo,
    StableSPAMState,
    init_stable_spam,
    update_stable_spam,
)

SIZES = ((3, 4), (5,), (1,), (), (2, 3, 2))
KINDS = [(clip, norm) for clip in (True, False) for norm in ("unit", "history", None)]


def gradients(seed, dtype=torch.float32):
    """Gradients of many sizes, now and then with an entry or a whole tensor far beyond the usual."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]
    if seed % 4 == 3:
        made[0][1, 2] *= 50
        made[4] *= 20
    return [(scale * value).to(dtype) for scale, value in zip((1e-3, 1.0, 30.0, 0.1, 1.0), made, strict=True)]


def as_lists(tensors):
    return [tensor.double().flatten().tolist() for tensor in tensors]


def values(state):
    return {name: value.clone() for name, value in state._asdict().items()}


def test_a_new_state_is_zero_for_each_tensor():
    state = init_stable_spam(3)
    assert isinstance(state, StableSPAMState)
    for name, dtype in (
        ("maximum", torch.float32),
        ("norm", torch.float32),
        ("square", torch.float32),
        ("clips", torch.int64),
        ("norms", torch.int64),
    ):
        value = getattr(state, name)
        assert (value.dtype, value.shape) == (dtype, (3,))
        assert not value.any()


# ----------------------------------------------------------------------------- by hand


def test_clipping_by_hand():
    first = [torch.tensor([1.0, 0.5])]
    state, info = update_stable_spam(first, init_stable_spam(1), norm=None)
    # The first threshold is the first maximum: 0.001 / (1 - 0.999).
    assert isinstance(info, StableSPAMInfo)
    assert info.thresholds.tolist() == pytest.approx([1.0], rel=1e-4)
    assert info.clipped.tolist() == [0.0]
    assert first[0].tolist() == pytest.approx([1.0, 0.5], rel=1e-4)

    second = [torch.tensor([-10.0, 1.0])]
    state, info = update_stable_spam(second, state, norm=None)
    limit = (0.999 * 0.001 + 0.001 * 10) / (1 - 0.999**2)
    assert limit == pytest.approx(5.50225, rel=1e-5)
    assert info.thresholds.tolist() == pytest.approx([limit], rel=1e-4)
    assert second[0].tolist() == pytest.approx([-limit, 1.0], rel=1e-4)
    assert info.clipped.tolist() == [0.5]
    assert info.norms.tolist() == pytest.approx([math.sqrt(101)])
    assert state.clips.tolist() == [2]


def test_entries_beyond_the_threshold_keep_their_proportions():
    state, _ = update_stable_spam([torch.ones(4)], init_stable_spam(1), norm=None)
    changed = [torch.tensor([8.0, -6.0, 2.0, 0.5])]
    update_stable_spam(changed, state, norm=None)
    limit = (0.999 * 0.001 + 0.001 * 8) / (1 - 0.999**2)
    assert 2 < limit < 6
    assert changed[0].tolist() == pytest.approx([limit, -6 / 8 * limit, 2.0, 0.5], rel=1e-4)


@pytest.mark.parametrize("norm", ["unit", "history"])
def test_normalisation_by_hand(norm):
    first = [torch.tensor([3.0, 4.0])]
    state, info = update_stable_spam(first, init_stable_spam(1), clip=False, norm=norm)
    # Both averages are of one value: 5 / sqrt(25), or 5.
    size = 1.0 if norm == "unit" else 5.0
    assert first[0].tolist() == pytest.approx([0.6 * size, 0.8 * size], rel=1e-5)
    assert info.norms.tolist() == pytest.approx([5.0])

    second = [torch.tensor([[0.0, 10.0]])]
    state, info = update_stable_spam(second, state, clip=False, norm=norm)
    mean = (0.7 * 0.3 * 5 + 0.3 * 10) / (1 - 0.7**2)
    square = (0.9 * 0.1 * 25 + 0.1 * 100) / (1 - 0.9**2)
    size = mean / math.sqrt(square) if norm == "unit" else mean
    assert second[0].tolist() == [pytest.approx([0.0, size], rel=1e-5)]
    assert state.norms.tolist() == [2]


# ----------------------------------------------------------------------------- the twin


@pytest.mark.parametrize(("clip", "norm"), KINDS)
@pytest.mark.parametrize("rates", [{}, {"gamma1": 0.85, "gamma2": 0.99, "gamma3": 0.9, "eps": 1e-6}])
def test_forty_steps_are_the_twins(clip, norm, rates):
    twin = StableSPAMTwin(len(SIZES), clip=clip, norm=norm, **rates)
    state = init_stable_spam(len(SIZES))
    for seed in range(40):
        now = gradients(seed)
        before = [list(tensor) for tensor in as_lists(now)]
        expected = twin.transform(before)
        state, info = update_stable_spam(now, state, clip=clip, norm=norm, **rates)
        for found, wanted, size in zip(now, expected, SIZES, strict=True):
            assert found.shape == size
            assert found.double().flatten().tolist() == pytest.approx(wanted, rel=5e-4, abs=1e-7)
        assert info.norms.tolist() == pytest.approx([math.hypot(*tensor) for tensor in before], rel=1e-5)
        if clip:
            shares = [
                sum(abs(value) > average.value / (1 - average.rate**average.updates) for value in tensor) / len(tensor)
                for tensor, average in zip(before, twin.maxima, strict=True)
            ]
            assert info.clipped.tolist() == pytest.approx(shares, abs=1e-6)
    if clip:
        assert state.maximum.tolist() == pytest.approx([average.value for average in twin.maxima], rel=1e-4)
        assert state.clips.tolist() == [40] * len(SIZES)
    if norm is not None:
        assert state.norm.tolist() == pytest.approx([average.value for average in twin.norms], rel=1e-4)
        assert state.square.tolist() == pytest.approx([average.value for average in twin.squares], rel=1e-4)
        assert state.norms.tolist() == [40] * len(SIZES)


def test_the_twin_clips_in_these_steps():
    # Else the comparison above would say nothing about clipping.
    state, most = init_stable_spam(len(SIZES)), 0.0
    for seed in range(40):
        state, info = update_stable_spam(gradients(seed), state)
        most = max(most, float(info.clipped.max()))
    assert most > 0


def test_tensors_do_not_know_of_each_other():
    together, alone = init_stable_spam(2), init_stable_spam(1)
    for seed in range(5):
        big, small = [gradients(seed)[0]], gradients(seed)[0]
        pair = [100 * gradients(seed + 7)[0], small]
        together, _ = update_stable_spam(pair, together)
        alone, _ = update_stable_spam(big, alone)
        assert torch.equal(pair[1], big[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs_and_their_statistics_are_float32(dtype):
    state, exact = init_stable_spam(len(SIZES)), init_stable_spam(len(SIZES))
    for seed in range(8):
        now = gradients(seed, dtype)
        wanted = [value.float() for value in now]
        state, _ = update_stable_spam(now, state)
        exact, _ = update_stable_spam(wanted, exact)
        for found, value in zip(now, wanted, strict=True):
            assert found.dtype == dtype
            assert torch.allclose(found.float(), value, rtol=2e-2, atol=1e-3)
    assert {state.maximum.dtype, state.norm.dtype, state.square.dtype} == {torch.float32}
    assert {state.clips.dtype, state.norms.dtype} == {torch.int64}


def test_switched_off_no_bit_changes():
    now = gradients(3)
    update_stable_spam(now, init_stable_spam(len(SIZES)), clip=False, norm=None)
    assert all(torch.equal(found, value) for found, value in zip(now, gradients(3), strict=True))


def test_gradients_change_in_place_and_the_given_state_does_not():
    state, _ = update_stable_spam(gradients(0), init_stable_spam(len(SIZES)))
    before, now = values(state), gradients(1)
    same = list(now)
    once, _ = update_stable_spam(now, state)
    assert all(a is b for a, b in zip(now, same, strict=True))
    assert not torch.equal(now[0], gradients(1)[0])
    for name, value in values(state).items():
        assert torch.equal(value, before[name]), f"{name} of the given state was changed"
    again = gradients(1)
    twice, _ = update_stable_spam(again, state)
    assert all(torch.equal(a, b) for a, b in zip((*once, *now), (*twice, *again), strict=True))


# ----------------------------------------------------------------------------- zeros, infinities


@pytest.mark.parametrize(("clip", "norm"), KINDS)
@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_or_non_finite_tensor_is_left_alone_and_not_counted(clip, norm, bad, dtype):
    state = init_stable_spam(3)
    for seed in range(3):
        state, _ = update_stable_spam(gradients(seed, dtype)[:3], state, clip=clip, norm=norm)
    before = values(state)
    now = gradients(4, dtype)[:3]
    now[1] = torch.zeros_like(now[1])
    if bad:
        now[1][2] = bad
    kept = now[1].clone()
    state, _ = update_stable_spam(now, state, clip=clip, norm=norm)
    assert torch.equal(now[1].nan_to_num(7.0), kept.nan_to_num(7.0))
    for name, value in values(state).items():
        assert value[1] == before[name][1], f"{name} took in the tensor"
    counted = ([state.clips] if clip else []) + ([state.norms] if norm else [])
    for counts in counted:
        assert counts.tolist() == [4, 3, 4]
    assert now[0].isfinite().all()
    assert now[2].isfinite().all()


def test_a_tensor_that_was_always_zero_begins_when_it_is_not():
    state = init_stable_spam(1)
    for _ in range(5):
        state, _ = update_stable_spam([torch.zeros(3)], state)
    late, first = [torch.tensor([1.0, 2.0, 2.0])], [torch.tensor([1.0, 2.0, 2.0])]
    state, _ = update_stable_spam(late, state)
    update_stable_spam(first, init_stable_spam(1))
    assert torch.equal(late[0], first[0])
    assert state.norms.tolist() == [1]


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1e4, 1e15])
def test_any_size_of_gradient_comes_out_with_the_unit_norm(scale):
    state = init_stable_spam(1)
    for _ in range(4):
        now = [scale * torch.tensor([1.0, -2.0, 2.0])]
        state, _ = update_stable_spam(now, state, eps=0.0)
        assert now[0].norm().item() == pytest.approx(1.0, rel=1e-4)
