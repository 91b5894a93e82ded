"""CO2's outer step against a slow twin in NumPy, at its boundaries, and on a device that has no values."""

import numpy as np
import pytest
import torch
from oracles import outer_twin
from torch import nn

from lightning_stable.functional.co2 import CO2State, init_co2, update_co2

SIZES = (7, 5)
ROUNDS = 8


def rounds(count=ROUNDS, seed=0, dtype=torch.float64):
    """A start and mean movements of falling and rising length, each in buffers of SIZES."""
    generator = torch.Generator().manual_seed(seed)
    scales = [1.0, *(0.3 + (k * 7 % 5) for k in range(count))]
    made = [[torch.randn(n, generator=generator, dtype=dtype) * scale for n in SIZES] for scale in scales]
    return made[0], made[1:]


def flat(buffers):
    return np.concatenate([buffer.double().numpy() for buffer in buffers])


def anchors(start, history, **settings):
    anchor = [buffer.clone() for buffer in start]
    state = init_co2(anchor, outer_momentum=settings["outer_momentum"])
    found = [flat(anchor)]
    for movement in history:
        state = update_co2(state, anchor, [buffer.clone() for buffer in movement], **settings)
        found.append(flat(anchor))
    return found


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("penalty", [1.0, 1.7, "gap"])
def test_it_is_the_twin(alpha, beta, clip, penalty):
    start, history = rounds()
    settings = {"outer_lr": alpha, "outer_momentum": beta, "momentum_clip": clip, "staleness_penalty": penalty}
    expected = outer_twin.co2(flat(start), [flat(one) for one in history], alpha, beta, clip, penalty)
    # The penalty's lengths are kept in float32.
    tolerance = 1e-6 if penalty == "gap" else 1e-13
    for mine, twin in zip(anchors(start, history, **settings), expected, strict=True):
        assert np.allclose(mine, twin, rtol=tolerance, atol=tolerance)


def test_alone_it_is_plain_averaging():
    start, history = rounds()
    found = anchors(start, history, outer_lr=1.0, outer_momentum=0.0)
    expected = outer_twin.local_sgd(flat(start), [flat(one) for one in history])
    assert all(np.allclose(mine, twin, atol=1e-13) for mine, twin in zip(found, expected, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_clip_bounds_each_entry_and_leaves_the_smaller_ones(beta):
    anchor, movement = [torch.zeros(4)], [torch.tensor([3.0, -3.0, 0.1, -0.2])]
    state = init_co2(anchor, outer_momentum=beta)
    update_co2(state, anchor, movement, outer_lr=2.0, outer_momentum=beta, momentum_clip=0.5)
    assert torch.equal(anchor[0], -2.0 * torch.tensor([0.5, -0.5, 0.1, -0.2]))


def test_the_clipped_momentum_is_what_is_remembered():
    anchor = [torch.zeros(1)]
    settings = {"outer_lr": 1.0, "outer_momentum": 0.5, "momentum_clip": 1.0}
    state = update_co2(init_co2(anchor, outer_momentum=0.5), anchor, [torch.tensor([100.0])], **settings)
    assert state.momentum[0].item() == 1.0
    state = update_co2(state, anchor, [torch.tensor([0.0])], **settings)
    assert (state.momentum[0].item(), anchor[0].item()) == (0.5, -1.5)


def test_the_gap_is_one_at_first_and_two_at_the_greatest_movement():
    anchor = [torch.zeros(2)]
    settings = {"outer_lr": 1.0, "outer_momentum": 0.0, "staleness_penalty": "gap"}
    state, taken = init_co2(anchor, outer_momentum=0.0), []
    for _ in range(3):
        before = anchor[0].clone()
        state = update_co2(state, anchor, [torch.tensor([3.0, 4.0])], **settings)
        taken.append(float((before - anchor[0]).norm()))
    # 5; then divided by 1 + 5/5; then by 1 + 2.5/5.
    assert taken == pytest.approx([5.0, 2.5, 5.0 / 1.5])
    assert (float(state.displacement), float(state.largest)) == pytest.approx((5.0 / 1.5, 5.0))


def test_the_gaps_length_is_over_all_buffers():
    anchor = [torch.zeros(1), torch.zeros(1, dtype=torch.float64)]
    movement = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)]
    state = init_co2(anchor, outer_momentum=0.0)
    state = update_co2(state, anchor, movement, outer_lr=0.5, outer_momentum=0.0, staleness_penalty="gap")
    assert float(state.displacement) == 2.5
    assert state.displacement.dtype == torch.float32


def test_an_anchor_that_never_moves_has_no_gap():
    anchor = [torch.ones(3)]
    state = init_co2(anchor, outer_momentum=0.2)
    for _ in range(3):
        movement = [torch.zeros(3)]
        state = update_co2(state, anchor, movement, outer_lr=1.0, outer_momentum=0.2, staleness_penalty="gap")
    assert torch.equal(anchor[0], torch.ones(3))
    assert (float(state.displacement), float(state.largest)) == (0.0, 0.0)


def test_a_penalty_divides_the_movement_and_not_the_momentum():
    anchor = [torch.zeros(1)]
    settings = {"outer_lr": 1.0, "outer_momentum": 0.5, "staleness_penalty": 4.0}
    state = update_co2(init_co2(anchor, outer_momentum=0.5), anchor, [torch.tensor([8.0])], **settings)
    state = update_co2(state, anchor, [torch.tensor([8.0])], **settings)
    assert state.momentum[0].item() == 3.0


def test_without_momentum_no_buffer_is_kept():
    anchor = [torch.zeros(3), torch.zeros(2, dtype=torch.float64)]
    assert init_co2(anchor, outer_momentum=0.0).momentum == []
    kept = init_co2(anchor, outer_momentum=0.2).momentum
    assert [(m.dtype, m.shape) for m in kept] == [(a.dtype, a.shape) for a in anchor]


def test_anchor_and_momentum_stay_the_same_tensors():
    anchor = [torch.zeros(3)]
    state = init_co2(anchor, outer_momentum=0.5)
    where, momentum = anchor[0].data_ptr(), state.momentum[0].data_ptr()
    after = update_co2(state, anchor, [torch.ones(3)], outer_lr=1.0, outer_momentum=0.5, staleness_penalty="gap")
    assert (anchor[0].data_ptr(), after.momentum[0].data_ptr()) == (where, momentum)


def test_gradients_are_not_recorded():
    anchor = [nn.Parameter(torch.ones(2))]
    state = init_co2(anchor, outer_momentum=0.5)
    state = update_co2(state, anchor, [torch.ones(2, requires_grad=True).clone()], outer_lr=1.0, outer_momentum=0.5)
    assert anchor[0].is_leaf
    assert not any(tensor.requires_grad for tensor in (*state.momentum, state.displacement))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 2.0, "gap"])
def test_no_value_is_read_by_the_host(clip, penalty):
    # Tensors of the meta device have no values: a read raises.
    anchor = [torch.zeros(3, device="meta")]
    state = init_co2(anchor, outer_momentum=0.5)
    movement = [torch.zeros(3, device="meta")]
    settings = {"outer_lr": 0.7, "outer_momentum": 0.5, "momentum_clip": clip, "staleness_penalty": penalty}
    state = update_co2(state, anchor, movement, **settings)
    assert {state.displacement.device.type, state.largest.device.type, state.momentum[0].device.type} == {"meta"}


def test_the_state_goes_through_a_safe_checkpoint(tmp_path):
    anchor = [torch.zeros(3)]
    state = init_co2(anchor, outer_momentum=0.5)
    state = update_co2(state, anchor, [torch.ones(3)], outer_lr=1.0, outer_momentum=0.5, staleness_penalty="gap")
    torch.save(state._asdict(), tmp_path / "state.pt")
    again = CO2State(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.momentum[0], state.momentum[0])
    assert torch.equal(again.largest, state.largest)
