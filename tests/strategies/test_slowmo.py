"""SlowMoStrategy: its settings, and the outer step that it takes with them."""

import pytest
import torch

from lightning_stable.strategies import SlowMoStrategy


def test_the_outer_step_is_the_papers():
    strategy = SlowMoStrategy(outer_lr=0.8, outer_momentum=0.5)
    anchor, momentum, weights = [torch.zeros(2)], torch.zeros(2), torch.zeros(2)
    state = strategy.init_outer(anchor)
    for delta, rate in ((torch.tensor([0.2, -0.1]), 0.1), (torch.tensor([0.1, 0.3]), torch.tensor(0.05))):
        state = strategy.update_outer(state, anchor, [delta.clone()], learning_rate=rate)
        momentum = 0.5 * momentum + delta / rate
        weights = weights - 0.8 * rate * momentum
    torch.testing.assert_close(anchor[0], weights)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"outer_lr": -1}, "outer_lr=-1"), ({"outer_momentum": 1.2}, r"outer_momentum=1.2 is not in \[0, 1\)")],
)
def test_settings_out_of_range_are_told(settings, words):
    with pytest.raises(ValueError, match=words):
        SlowMoStrategy(**settings)


def test_slow_momentum_needs_a_learning_rate():
    strategy = SlowMoStrategy()
    anchor = [torch.zeros(2)]
    with pytest.raises(ValueError, match="SlowMoStrategy scales its momentum by the learning rate"):
        strategy.update_outer(strategy.init_outer(anchor), anchor, [torch.ones(2)], None)
