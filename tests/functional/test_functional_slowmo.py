"""SlowMo's outer step against a slow twin in NumPy, and where the learning rate is zero or changes."""

import numpy as np
import pytest
import torch
from oracles import outer_twin

from lightning_stable.functional.slowmo import init_slowmo, update_slowmo

SIZES = (7, 5)


def rounds(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(n, generator=generator, dtype=torch.float64) for n in SIZES] for _ in range(count + 1)]
    return made[0], made[1:]


def flat(buffers):
    return np.concatenate([buffer.numpy() for buffer in buffers])


def anchors(start, history, rates, alpha, beta):
    anchor = [buffer.clone() for buffer in start]
    state, found = init_slowmo(anchor), [flat(anchor)]
    for movement, rate in zip(history, rates, strict=True):
        state = update_slowmo(state, anchor, movement, learning_rate=rate, outer_lr=alpha, outer_momentum=beta)
        found.append(flat(anchor))
    return found


@pytest.mark.parametrize("rates", [[0.1] * 6, [0.1, 0.08, 0.05, 0.02, 0.01, 0.001], [0.1, 0.0, 0.05, 0.0, 0.0, 0.2]])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.8])
def test_it_is_the_twin(rates, alpha, beta):
    start, history = rounds(len(rates))
    expected = outer_twin.slowmo(flat(start), [flat(one) for one in history], rates, alpha, beta)
    for mine, twin in zip(anchors(start, history, rates, alpha, beta), expected, strict=True):
        assert np.allclose(mine, twin, rtol=1e-12, atol=1e-12)


def test_without_momentum_the_learning_rate_cancels():
    start, history = rounds(4)
    found = anchors(start, history, [0.3, 0.1, 1e-5, 0.2], 1.0, 0.0)
    expected = outer_twin.local_sgd(flat(start), [flat(one) for one in history])
    assert all(np.allclose(mine, twin, atol=1e-12) for mine, twin in zip(found, expected, strict=True))


def test_at_a_constant_rate_it_is_torchs_sgd_with_momentum():
    start, history = rounds(6)
    weights = [torch.nn.Parameter(buffer.clone()) for buffer in start]
    peer = torch.optim.SGD(weights, lr=1.0, momentum=0.6)
    for movement in history:
        for weight, part in zip(weights, movement, strict=True):
            weight.grad = part.clone()
        peer.step()
    assert np.allclose(anchors(start, history, [0.01] * 6, 1.0, 0.6)[-1], flat([w.detach() for w in weights]))


def test_a_rate_of_zero_moves_nothing_and_only_fades_the_momentum():
    anchor = [torch.ones(3)]
    state = update_slowmo(
        init_slowmo(anchor), anchor, [torch.ones(3)], learning_rate=0.5, outer_lr=1.0, outer_momentum=0.5
    )
    before = anchor[0].clone()
    movement = [torch.full((3,), 9.0)]
    state = update_slowmo(state, anchor, movement, learning_rate=0.0, outer_lr=1.0, outer_momentum=0.5)
    assert torch.equal(anchor[0], before)
    assert torch.equal(state.momentum[0], torch.ones(3))


def test_anchor_and_momentum_are_changed_in_place_and_the_movement_is_not():
    anchor, movement = [torch.zeros(3)], [torch.ones(3)]
    state = init_slowmo(anchor)
    where, momentum = anchor[0].data_ptr(), state.momentum[0].data_ptr()
    after = update_slowmo(state, anchor, movement, learning_rate=0.1, outer_lr=1.0, outer_momentum=0.5)
    assert (anchor[0].data_ptr(), after.momentum[0].data_ptr()) == (where, momentum)
    assert torch.equal(movement[0], torch.ones(3))


def test_no_value_is_read_by_the_host():
    anchor = [torch.zeros(3, device="meta")]
    state = init_slowmo(anchor)
    movement = [torch.zeros(3, device="meta")]
    state = update_slowmo(state, anchor, movement, learning_rate=0.1, outer_lr=1.0, outer_momentum=0.5)
    assert state.momentum[0].device.type == "meta"
