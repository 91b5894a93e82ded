"""Local SGD's outer step is the mean of the workers' weights."""

import torch
from torch import nn

from lightning_stable.functional.local_sgd import update_local_sgd


def test_after_a_blocking_round_the_anchor_is_the_mean_of_the_workers():
    generator = torch.Generator().manual_seed(0)
    anchor = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (7, 5)]
    workers = [[a + torch.randn(a.shape, generator=generator, dtype=a.dtype) for a in anchor] for _ in range(3)]
    moved = [[a - x for a, x in zip(anchor, worker, strict=True)] for worker in workers]
    delta = [torch.stack(parts).mean(0) for parts in zip(*moved, strict=True)]
    update_local_sgd(anchor, delta)
    for mine, parts in zip(anchor, zip(*workers, strict=True), strict=True):
        assert torch.allclose(mine, torch.stack(parts).mean(0), rtol=1e-13, atol=1e-13)


def test_the_anchor_is_changed_in_place_and_the_movement_is_not():
    anchor, delta = [torch.ones(3), torch.ones(2, dtype=torch.float64)], [torch.ones(3), torch.ones(2).double()]
    places = [a.data_ptr() for a in anchor]
    assert update_local_sgd(anchor, delta) is None
    assert [a.data_ptr() for a in anchor] == places
    assert torch.equal(anchor[0], torch.zeros(3))
    assert torch.equal(delta[0], torch.ones(3))


def test_weights_that_take_gradients_are_stepped_without_being_recorded():
    anchor = [nn.Parameter(torch.ones(2))]
    update_local_sgd(anchor, [torch.ones(2)])
    assert anchor[0].is_leaf
    assert torch.equal(anchor[0].detach(), torch.zeros(2))


def test_no_value_is_read_by_the_host():
    update_local_sgd([torch.zeros(3, device="meta")], [torch.zeros(3, device="meta")])
