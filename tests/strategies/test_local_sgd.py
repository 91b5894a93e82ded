"""LocalSGDStrategy: its settings, and the outer step that it takes with them."""

import pytest
import torch

from lightning_stable.strategies import LocalSGDStrategy


def test_the_outer_step_goes_to_the_mean():
    strategy = LocalSGDStrategy()
    start, ends = torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 3.0], [4.0, 1.0]])
    anchor = [start.clone()]
    state = strategy.init_outer(anchor)
    assert strategy.update_outer(state, anchor, [start - ends.mean(0)], learning_rate=None) == state
    assert torch.equal(anchor[0], ends.mean(0))


def test_a_schedule_is_kept_and_a_measured_round_has_to_be_delayed():
    assert LocalSGDStrategy(local_steps=[(0, 4), (100, 16)]).local_steps == [(0, 4), (100, 16)]
    assert LocalSGDStrategy(local_steps="auto", delayed=True).delayed
    with pytest.raises(ValueError, match=r"local_steps='auto' .* set delayed=True or give a number"):
        LocalSGDStrategy(local_steps="auto")
    with pytest.raises(ValueError, match="the first pair must begin at step 0"):
        LocalSGDStrategy(local_steps=[(5, 4)])
