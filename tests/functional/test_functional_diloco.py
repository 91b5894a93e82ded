"""DiLoCo's outer step against torch's SGD with Nesterov momentum, bit for bit, and a slow twin in NumPy."""

import numpy as np
import pytest
import torch
from oracles import outer_twin

from lightning_stable.functional.diloco import init_diloco, update_diloco

SIZES = (7, 5)


def rounds(count, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(n, generator=generator, dtype=dtype) for n in SIZES] for _ in range(count + 1)]
    return made[0], made[1:]


def stepped(start, history, alpha, mu):
    anchor = [buffer.clone() for buffer in start]
    state = init_diloco(anchor)
    for movement in history:
        state = update_diloco(state, anchor, [m.clone() for m in movement], outer_lr=alpha, outer_momentum=mu)
    return anchor, state


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("mu", [0.9, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_nesterov_bit_for_bit(alpha, mu, dtype):
    start, history = rounds(8, dtype)
    weights = [torch.nn.Parameter(buffer.clone()) for buffer in start]
    peer = torch.optim.SGD(weights, lr=alpha, momentum=mu, nesterov=True)
    for movement in history:
        for weight, part in zip(weights, movement, strict=True):
            weight.grad = part.clone()
        peer.step()
    anchor, state = stepped(start, history, alpha, mu)
    for mine, momentum, weight in zip(anchor, state.momentum, weights, strict=True):
        assert torch.equal(mine, weight.detach())
        assert torch.equal(momentum, peer.state[weight]["momentum_buffer"])


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9])
def test_it_is_the_twin(mu):
    start, history = rounds(6, torch.float64)

    def flat(buffers):
        return np.concatenate([buffer.numpy() for buffer in buffers])

    anchor, _ = stepped(start, history, 0.7, mu)
    expected = outer_twin.diloco(flat(start), [flat(one) for one in history], 0.7, mu)[-1]
    assert np.allclose(flat(anchor), expected, rtol=1e-12, atol=1e-12)


def test_at_rate_one_without_momentum_it_is_plain_averaging():
    start, history = rounds(3)
    anchor, _ = stepped(start, history, 1.0, 0.0)
    assert torch.allclose(anchor[0], start[0] - sum(movement[0] for movement in history))


def test_a_steady_movement_is_taken_with_the_gain_it_is_said_to_have():
    anchor = [torch.zeros(1, dtype=torch.float64)]
    state = init_diloco(anchor)
    for _ in range(300):
        before = anchor[0].clone()
        state = update_diloco(state, anchor, [torch.ones(1).double()], outer_lr=0.7, outer_momentum=0.9)
    assert float(before - anchor[0]) == pytest.approx(7.0)


def test_anchor_and_momentum_are_changed_in_place():
    anchor = [torch.zeros(3)]
    state = init_diloco(anchor)
    where, momentum = anchor[0].data_ptr(), state.momentum[0].data_ptr()
    after = update_diloco(state, anchor, [torch.ones(3)], outer_lr=0.7, outer_momentum=0.9)
    assert (anchor[0].data_ptr(), after.momentum[0].data_ptr()) == (where, momentum)


def test_no_value_is_read_by_the_host():
    anchor = [torch.zeros(3, device="meta")]
    state = init_diloco(anchor)
    state = update_diloco(state, anchor, [torch.zeros(3, device="meta")], outer_lr=0.7, outer_momentum=0.9)
    assert state.momentum[0].device.type == "meta"
