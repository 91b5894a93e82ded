"""CO2Strategy: its settings, and the outer step that it takes with them."""

import pytest
import torch

from lightning_stable.functional.co2 import init_co2, update_co2
from lightning_stable.strategies import CO2Strategy


def test_the_outer_step_is_that_of_the_functions_with_all_settings():
    strategy = CO2Strategy(outer_lr=0.7, outer_momentum=0.4, momentum_clip=0.3, staleness_penalty="gap")
    ours, theirs = [torch.ones(3)], [torch.ones(3)]
    state, expected = strategy.init_outer(ours), init_co2(theirs, outer_momentum=0.4)
    for delta in (torch.tensor([0.1, -2.0, 0.0]), torch.tensor([0.3, 0.1, 0.2]), torch.tensor([-0.2, 0.0, 1.0])):
        state = strategy.update_outer(state, ours, [delta.clone()], learning_rate=None)
        expected = update_co2(
            expected,
            theirs,
            [delta.clone()],
            outer_lr=0.7,
            outer_momentum=0.4,
            momentum_clip=0.3,
            staleness_penalty="gap",
        )
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[0], torch.ones(3))


def test_it_keeps_no_momentum_by_default():
    strategy = CO2Strategy()
    assert strategy.init_outer([torch.ones(3)]).momentum == []
    assert (strategy.delayed, strategy.variant, strategy.local_steps) == (True, "corrected", 24)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outer_lr": 0}, "outer_lr=0 is not a finite number above 0"),
        ({"outer_momentum": 1.0}, r"outer_momentum=1.0 is not in \[0, 1\)"),
        ({"momentum_clip": -1.0}, "momentum_clip=-1.0 is not a finite number above 0"),
        ({"staleness_penalty": "none"}, "staleness_penalty='none' is not a finite number above 0"),
        ({"variant": "fixed"}, "variant='fixed' is unknown"),
        ({"workers": "rack"}, "workers='rack' is unknown"),
        ({"comm_dtype": "int8"}, "comm_dtype='int8' is unknown"),
        ({"local_steps": 0}, "local_steps=0"),
        ({"local_steps": "often"}, "local_steps='often' is unknown"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"delayed": False}, "takes no delayed"),
        ({"find_unused_parameters": True}, "no use for find_unused_parameters"),
        ({"model_averaging_period": 4}, "cannot take model_averaging_period"),
    ],
)
def test_settings_out_of_range_are_told(settings, words):
    with pytest.raises(ValueError, match=words):
        CO2Strategy(**settings)
