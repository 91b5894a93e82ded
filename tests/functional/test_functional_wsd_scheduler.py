"""The warmup-stable-decay scheduler class against transformers and the multiplier, and across a resume."""

import io
import math

import pytest
import torch

from lightning_stable.functional.wsd import WarmupStableDecayLR, wsd_multiplier

ALL_SHAPES = ("linear", "cosine", "1-sqrt", "exponential", "inverse")
FLOORLESS = ("linear", "cosine", "1-sqrt")
PEAKS = (0.5, 2.0)


def ours(n, total_steps, **kwargs):
    return [wsd_multiplier(step, total_steps, **kwargs) for step in range(n)]


def make_optimizer(peaks=PEAKS):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks]
    return torch.optim.SGD(groups, lr=1.0)


def advance(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def expected_rates(multipliers, peaks=PEAKS):
    return [[pytest.approx(peak * value, rel=1e-12, abs=1e-15) for peak in peaks] for value in multipliers]


# ----------------------------------------------------------------------------- transformers as the oracle


def transformers_rates(n, warmup, decay, total, shape, floor):
    from transformers import get_wsd_schedule

    optimizer = make_optimizer((1.0,))
    scheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_stable_steps=total - warmup - decay,
        warmup_type="linear",
        decay_type=shape,
        min_lr_ratio=floor,
    )
    return [rates[0] for rates in advance(optimizer, scheduler, n)]


@pytest.mark.parametrize("shape", FLOORLESS)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(("warmup", "decay", "total"), [(0, 10, 40), (7, 13, 50), (5, 45, 50), (1, 1, 9), (0, 50, 50)])
def test_same_as_transformers(shape, floor, warmup, decay, total):
    n = total + 6
    theirs = transformers_rates(n, warmup, decay, total, shape, floor)
    # Theirs lifts the warm-up to the floor as well; ours starts at zero whatever the floor is.
    theirs[:warmup] = [(value - floor) / (1 - floor) for value in theirs[:warmup]]
    mine = ours(n, total, warmup=warmup, decay=decay, shape=shape, min_ratio=floor)
    assert mine == pytest.approx(theirs, rel=1e-12, abs=1e-14)


# ----------------------------------------------------------------------------- the scheduler class


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("budgets", [None, [20, 35]])
def test_the_scheduler_gives_the_multiplier_times_each_peak(shape, budgets):
    kwargs = {"warmup": 5, "decay": 0.2, "shape": shape, "min_ratio": 0.05, "budgets": budgets}
    optimizer = make_optimizer()
    rates = advance(optimizer, WarmupStableDecayLR(optimizer, 60, **kwargs), 65)
    assert rates == expected_rates(ours(65, 60, **kwargs))


def test_the_scheduler_has_the_defaults_of_the_multiplier():
    optimizer = make_optimizer()
    assert advance(optimizer, WarmupStableDecayLR(optimizer, 200), 205) == expected_rates(ours(205, 200))


def test_the_scheduler_takes_an_open_horizon():
    optimizer = make_optimizer()
    rates = advance(optimizer, WarmupStableDecayLR(optimizer, None, warmup=4), 20)
    assert rates == expected_rates(ours(20, None, warmup=4))


def test_the_scheduler_is_one_of_torchs_and_reports_its_rate():
    optimizer = make_optimizer()
    scheduler = WarmupStableDecayLR(optimizer, 10, warmup=2, decay=2)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert scheduler.get_last_lr() == [0.0, 0.0]
    advance(optimizer, scheduler, 1)
    assert scheduler.get_last_lr() == [pytest.approx(0.25), pytest.approx(1.0)]
    assert scheduler.last_epoch == 1


def test_the_scheduler_starts_from_a_given_step():
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scheduler = WarmupStableDecayLR(optimizer, 40, warmup=10, decay=10, last_epoch=32)
    assert advance(optimizer, scheduler, 12) == expected_rates(ours(45, 40, warmup=10, decay=10)[33:])


def saved_after(steps, make_scheduler):
    optimizer = make_optimizer()
    scheduler = make_scheduler(optimizer)
    advance(optimizer, scheduler, steps)
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_resuming_with_the_same_settings_goes_on_as_if_nothing_happened():
    kwargs = {"warmup": 6, "decay": 0.3, "shape": "cosine", "min_ratio": 0.0, "budgets": [25]}
    whole = expected_rates(ours(50, 50, **kwargs))
    for steps in (0, 3, 10, 24, 25, 40):
        saved = saved_after(steps, lambda optimizer: WarmupStableDecayLR(optimizer, 50, **kwargs))
        optimizer = make_optimizer()
        scheduler = WarmupStableDecayLR(optimizer, 50, **kwargs)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        assert advance(optimizer, scheduler, 50 - steps) == whole[steps:]


@pytest.mark.parametrize(
    "new",
    [
        {"total_steps": 200},
        {"total_steps": 45},
        {"total_steps": None},
        {"shape": "linear"},
        {"min_ratio": 0.5},
        {"decay": 30},
        {"budgets": [50]},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [20, 38])
def test_new_settings_win_over_saved_ones_and_the_step_is_kept(new, steps):
    old_settings = {"total_steps": 40, "warmup": 4, "decay": 10, "shape": "cosine", "min_ratio": 0.1, "budgets": None}
    new_settings = {**old_settings, **new}
    if "budgets" in new:
        new_settings["total_steps"] = 100
    saved = saved_after(steps, lambda optimizer: WarmupStableDecayLR(optimizer, **old_settings))
    optimizer = make_optimizer()
    scheduler = WarmupStableDecayLR(optimizer, **new_settings)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert scheduler.last_epoch == steps
    # From the first step after the load on: not one step later, at the rate that was saved.
    assert advance(optimizer, scheduler, 60) == expected_rates(ours(steps + 60, **new_settings)[steps:])


def test_the_rate_reported_after_a_load_is_the_new_settings_one():
    saved = saved_after(38, lambda optimizer: WarmupStableDecayLR(optimizer, 40, warmup=4, decay=10))
    optimizer = make_optimizer()
    scheduler = WarmupStableDecayLR(optimizer, 80, warmup=4, decay=10)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert scheduler.get_last_lr() == [pytest.approx(peak) for peak in PEAKS]


def test_only_the_step_count_is_taken_over_and_not_the_peaks():
    saved = saved_after(5, lambda optimizer: WarmupStableDecayLR(optimizer, 40, warmup=0))
    other = (0.1, 8.0)
    optimizer = make_optimizer(other)
    scheduler = WarmupStableDecayLR(optimizer, 40, warmup=0)
    scheduler.load_state_dict(saved["scheduler"])
    assert advance(optimizer, scheduler, 35) == expected_rates(ours(40, 40, warmup=0)[5:], other)


def test_torchs_own_scheduler_takes_the_old_horizon_back_on_load():
    """The trap this class avoids; if this fails, torch has mended it and the claim in the docs must go."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    saved = saved_after(5, lambda optimizer: cosine(optimizer, T_max=10))
    optimizer = make_optimizer()
    theirs = cosine(optimizer, T_max=100)
    theirs.load_state_dict(saved["scheduler"])
    assert theirs.T_max == 10

    saved = saved_after(5, lambda optimizer: WarmupStableDecayLR(optimizer, 10, warmup=0, decay=10, shape="cosine"))
    optimizer = make_optimizer()
    mine = WarmupStableDecayLR(optimizer, 100, warmup=0, decay=100, shape="cosine")
    optimizer.load_state_dict(saved["optimizer"])
    mine.load_state_dict(saved["scheduler"])
    whole = ours(30, 100, warmup=0, decay=100, shape="cosine")
    assert advance(optimizer, mine, 25) == expected_rates(whole[5:])


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("arguments", [(100, 60, 50), (100, 0, 1.0), (100, 0, 0, "linear", 0.1, [150])], ids=str)
def test_the_scheduler_refuses_a_plan_that_cannot_be_kept(arguments):
    with pytest.raises(ValueError, match=r"60|1\.0|150"):
        WarmupStableDecayLR(make_optimizer(), *arguments)


def test_the_scheduler_refuses_an_unknown_shape():
    with pytest.raises(ValueError, match="sine"):
        WarmupStableDecayLR(make_optimizer(), 100, shape="sine")


@pytest.mark.parametrize("shape", ["exponential", "inverse"])
def test_the_scheduler_refuses_a_floor_of_zero_before_the_decay_is_reached(shape):
    with pytest.raises(ValueError, match=shape):
        WarmupStableDecayLR(make_optimizer(), 100, shape=shape, min_ratio=0.0)


@pytest.mark.parametrize("floor", [-0.1, 1.5, math.nan])
def test_a_floor_that_is_no_share_of_the_peak_is_refused(floor):
    with pytest.raises(ValueError, match=str(floor).replace(".", r"\.")):
        WarmupStableDecayLR(make_optimizer(), 100, shape="linear", min_ratio=floor)


def test_a_refused_scheduler_leaves_the_optimizer_as_it_was():
    optimizer = make_optimizer()
    with pytest.raises(ValueError, match="60"):
        WarmupStableDecayLR(optimizer, 100, warmup=60, decay=50)
    assert [group["lr"] for group in optimizer.param_groups] == list(PEAKS)
