"""DiLoCoStrategy: its settings, and the outer step that it takes with them."""

import pytest
import torch

from lightning_stable.strategies import DiLoCoStrategy


def test_the_outer_step_is_torchs_sgd_with_nesterov_momentum():
    strategy = DiLoCoStrategy(outer_lr=0.6, outer_momentum=0.8)
    anchor, weights = [torch.ones(3)], torch.nn.Parameter(torch.ones(3))
    outer = torch.optim.SGD([weights], lr=0.6, momentum=0.8, nesterov=True)
    state = strategy.init_outer(anchor)
    for step in range(4):
        delta = torch.tensor([0.1, -0.2, 0.3]) * (step + 1)
        state = strategy.update_outer(state, anchor, [delta.clone()], learning_rate=None)
        weights.grad = delta
        outer.step()
    torch.testing.assert_close(anchor[0], weights.detach())


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"outer_lr": 0.0}, "outer_lr=0.0"), ({"outer_momentum": -0.1}, r"outer_momentum=-0.1 is not in \[0, 1\)")],
)
def test_settings_out_of_range_are_told(settings, words):
    with pytest.raises(ValueError, match=words):
        DiLoCoStrategy(**settings)
