"""What the schedulers of other libraries do at a floor and on resume: the faults that the card of WSD names."""

from typing import Any

import pytest
import torch
from pytorch_optimizer import get_wsd_schedule
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, SequentialLR

from lightning_stable.functional.wsd import WarmupStableDecayLR


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(scheduler: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_pytorch_optimizer_falls_below_its_floor_and_jumps_back() -> None:
    peer = rates(get_wsd_schedule(optimizer(), 0, 10, 100, min_lr_ratio=0.1, cooldown_type="1-sqrt"), 112)
    assert min(peer) == pytest.approx(0.0050, abs=1e-4)
    assert peer[-1] == pytest.approx(0.1)
    ours = rates(WarmupStableDecayLR(optimizer(), 110, 0, 100, "1-sqrt", 0.1), 112)
    assert min(ours) == ours[-1] == pytest.approx(0.1)


def test_one_cycle_restores_the_old_horizon() -> None:
    resumed = OneCycleLR(optimizer(), max_lr=1.0, total_steps=100)
    resumed.load_state_dict(OneCycleLR(optimizer(), max_lr=1.0, total_steps=10).state_dict())
    assert resumed.total_steps == 10


def test_sequential_restores_the_old_milestones() -> None:
    def chained(milestone: int) -> SequentialLR:
        mine = optimizer()
        return SequentialLR(mine, [LinearLR(mine), LinearLR(mine)], milestones=[milestone])

    resumed = chained(100)
    resumed.load_state_dict(chained(10).state_dict())
    assert resumed._milestones == [10]


def test_a_lambda_takes_its_first_step_after_a_resume_at_the_old_rate() -> None:
    first = LambdaLR(optimizer(), lambda step: 0.5)
    rates(first, 3)
    saved, saved_optimizer = first.state_dict(), first.optimizer.state_dict()
    resumed = LambdaLR(optimizer(), lambda step: 0.25)
    resumed.optimizer.load_state_dict(saved_optimizer)
    resumed.load_state_dict(saved)
    assert rates(resumed, 2) == [0.5, 0.25]
