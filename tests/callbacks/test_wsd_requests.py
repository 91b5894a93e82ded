"""Branches, requests and open ends of WarmupStableDecay: what asks for a decay, and what a resume makes of it."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, Timer
from schedules import AskAt, endless, expected, factors, fit_against_the_clock

from lightning_stable.callbacks import WarmupStableDecay
from lightning_stable.functional.wsd import wsd_multiplier
from lightning_stable.testing.harness import ManualNet, Net, SaveAt, Stream, assert_same, fit

# ------------------------------------------------------------------ branches


def stable_checkpoint(tmp_path: Path) -> str:
    path = str(tmp_path / "stable.ckpt")
    fit([WarmupStableDecay(warmup=2, decay=4), SaveAt(8, path)], max_steps=20, limit_val_batches=0)
    return path


def test_another_horizon_wins_on_resume(tmp_path: Path) -> None:
    path = stable_checkpoint(tmp_path)
    run = fit([WarmupStableDecay(2, 4, "linear", 0.0)], max_steps=12, ckpt_path=path, limit_val_batches=0)
    assert factors(run) == pytest.approx([1, 0.75, 0.5, 0.25])
    longer = fit([WarmupStableDecay(2, 10)], max_steps=40, ckpt_path=path, limit_val_batches=0)
    assert factors(longer) == pytest.approx([wsd_multiplier(step, 40, 2, 10) for step in range(8, 40)])


def test_another_peak_wins_on_resume(tmp_path: Path) -> None:
    run = fit(
        [WarmupStableDecay(2, 4)],
        module=Net(rates=(0.5, 0.25)),
        max_steps=10,
        ckpt_path=stable_checkpoint(tmp_path),
        limit_val_batches=0,
    )
    assert run.steps[0].rates == pytest.approx([0.5 * wsd_multiplier(8, 10, 2, 4), 0.25 * wsd_multiplier(8, 10, 2, 4)])


def test_torch_schedulers_fall_into_that_trap(tmp_path: Path) -> None:
    """Why the callback exists: a resumed cosine keeps the horizon of the checkpoint."""
    module = torch.nn.Linear(2, 2)

    def cosine(horizon: int) -> torch.optim.lr_scheduler.CosineAnnealingLR:
        return torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(module.parameters(), lr=1.0), horizon)

    resumed = cosine(100)
    resumed.load_state_dict(cosine(10).state_dict())
    assert resumed.T_max == 10


def test_decay_now_on_a_stable_checkpoint(tmp_path: Path) -> None:
    schedule = WarmupStableDecay(warmup=2, decay=4, shape="linear", min_ratio=0.0)
    schedule.decay_now(5)
    run = fit([schedule], max_steps=1000, ckpt_path=stable_checkpoint(tmp_path), limit_val_batches=0)
    assert factors(run) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert run.trainer.global_step == 13


def test_decay_now_during_training_resumes_in_the_middle_of_the_decay(tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")

    def run(**settings: Any) -> Any:
        schedule = WarmupStableDecay(warmup=2, decay=4, shape="linear", min_ratio=0.0)
        extra = [] if "ckpt_path" in settings else [AskAt(schedule, 6), SaveAt(8, path)]
        return fit(
            [schedule, *extra], train=settings.pop("train", None), max_steps=100, limit_val_batches=0, **settings
        )

    straight = run()
    assert factors(straight)[6:] == pytest.approx([1, 0.75, 0.5, 0.25])
    resumed = run(ckpt_path=path)
    assert_same([s._asdict() for s in resumed.steps], [s._asdict() for s in straight.steps[8:]], "resumed in the decay")


def test_a_decay_asked_for_in_the_warmup_waits_for_its_end() -> None:
    schedule = WarmupStableDecay(warmup=5, decay=2, shape="linear", min_ratio=0.0)
    run = fit([schedule, AskAt(schedule, 2)], max_steps=100, limit_val_batches=0)
    assert factors(run) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 0.5])


def test_a_decay_asked_for_in_a_decay_ends_the_fit_with_it() -> None:
    schedule = WarmupStableDecay(warmup=0, decay=4, shape="linear", min_ratio=0.0, budgets=[8])
    run = fit([schedule, AskAt(schedule, 5)], max_steps=100, limit_val_batches=0)
    assert factors(run) == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


# ------------------------------------------------------------------ open horizon


def test_an_open_horizon_stays_stable_and_says_so_at_the_end() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 7

    with pytest.warns(UserWarning, match=r"optimizer step 7 before the decay .* was over"):
        run = fit([WarmupStableDecay(warmup=2), Stop()], train=endless(), max_epochs=-1, limit_val_batches=0)
    assert factors(run) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1])


def test_an_open_horizon_ends_by_a_file(tmp_path: Path) -> None:
    flag = tmp_path / "decay"

    class Touch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 9:
                flag.touch()

    # A share of an open run: a tenth of all steps when the decay is over.
    run = fit(
        [WarmupStableDecay(2, 0.1, decay_on=str(flag)), Touch()], train=endless(), max_epochs=-1, limit_val_batches=0
    )
    assert run.trainer.global_step == 10
    assert factors(run)[-1] == 1.0


def test_an_open_horizon_ends_before_max_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit_against_the_clock(monkeypatch, WarmupStableDecay(2, 10, "linear", 0.0), seconds=60)
    assert 50 <= run.trainer.global_step <= 60
    assert factors(run)[-11:] == pytest.approx([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    timer = next(callback for callback in run.trainer.callbacks if isinstance(callback, Timer))
    assert timer.time_remaining() > 0


# ------------------------------------------------------------------ what a request must not do


def schedule(*args: Any, **kwargs: Any) -> WarmupStableDecay:
    return WarmupStableDecay(0, 4, "linear", 0.0, *args, **kwargs)


def test_a_request_does_not_outlive_an_exception() -> None:
    used, module = schedule(), Net()
    module.fail_at = ("train", 5)
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([used, AskAt(used, 3)], module=module, max_steps=20, limit_val_batches=0)
    again = fit([used], max_steps=20, limit_val_batches=0)
    assert factors(again) == expected(20, 20, 0, 4, "linear", 0.0)


def test_validating_a_checkpoint_does_not_ask_for_its_decay(tmp_path: Path) -> None:
    path, used = str(tmp_path / "cut.ckpt"), schedule()
    run = fit([used, AskAt(used, 3), SaveAt(5, path)], validation=Stream(2), max_steps=20)
    run.trainer.validate(run.module, Stream(2), ckpt_path=path, verbose=False)
    assert factors(fit([used], max_steps=20, limit_val_batches=0)) == expected(20, 20, 0, 4, "linear", 0.0)


@pytest.mark.parametrize("cut", [5, 7])
def test_new_settings_win_over_a_decay_that_was_asked_for(cut: int, tmp_path: Path) -> None:
    path, used = str(tmp_path / "cut.ckpt"), schedule()
    fit([used, AskAt(used, 3), SaveAt(cut, path)], max_steps=50, limit_val_batches=0)
    resumed = fit([schedule()], max_steps=20, ckpt_path=path, limit_val_batches=0)
    assert factors(resumed) == pytest.approx([wsd_multiplier(step, 20, 0, 4, "linear", 0.0) for step in range(cut, 20)])


def test_a_finished_decay_can_be_continued_with_the_same_settings(tmp_path: Path) -> None:
    path, used = str(tmp_path / "end.ckpt"), schedule()
    first = fit([used, AskAt(used, 3), SaveAt(7, path)], max_steps=50, limit_val_batches=0)
    assert first.trainer.global_step == 7
    resumed = fit([schedule()], max_steps=50, ckpt_path=path, limit_val_batches=0)
    assert factors(resumed) == pytest.approx([wsd_multiplier(step, 50, 0, 4, "linear", 0.0) for step in range(7, 50)])


def test_total_steps_ends_a_fit_that_knows_no_end() -> None:
    run = fit([schedule(total_steps=10)], train=endless(), max_epochs=-1, limit_val_batches=0)
    assert factors(run) == expected(10, 10, 0, 4, "linear", 0.0)


def test_a_checkpoint_beyond_total_steps_is_a_clear_error(tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")
    fit([schedule(), SaveAt(8, path)], max_steps=10, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"is at optimizer step 8, and total_steps=6 is not beyond it"):
        fit([schedule(total_steps=6)], max_steps=20, ckpt_path=path, limit_val_batches=0)


def test_a_decay_that_max_time_leaves_no_room_for_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit_against_the_clock(monkeypatch, WarmupStableDecay(24, 10, "linear", 0.0), seconds=30)
    assert factors(run)[24:] == pytest.approx([1, 2 / 3, 1 / 3])
    assert run.trainer.global_step == 27


def test_changing_accumulation_needs_total_steps() -> None:
    def run(**settings: Any) -> Any:
        changing = GradientAccumulationScheduler({0: 1, 1: 2})
        return fit([schedule(**settings), changing], max_epochs=3, limit_val_batches=0)

    with pytest.raises(ValueError, match=r"GradientAccumulationScheduler changes .* Give total_steps"):
        run()
    assert factors(run(total_steps=12)) == expected(12, 12, 0, 4, "linear", 0.0)


class TwoSteps(ManualNet):
    """Takes two optimizer steps for each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        super().training_step(batch, batch_idx)


def test_several_steps_in_a_batch_have_their_own_rates_and_a_budget_between_them_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"Budget 5 fell within a batch of 2 optimizer steps: its checkpoint is of step 6"
    ):
        run = fit([schedule(budgets=[5])], module=TwoSteps(), max_steps=12, limit_val_batches=0)
    assert factors(run) == expected(12, 12, 0, 4, "linear", 0.0, budgets=[5])
    with pytest.raises(ValueError, match=r"manual optimisation a batch may take any number"):
        fit([schedule()], module=TwoSteps(), max_steps=1000, max_epochs=2, limit_val_batches=0)


def test_no_decay_has_no_length() -> None:
    with pytest.raises(ValueError, match=r"decay_now\(\) has no length with decay=0"):
        WarmupStableDecay(0, 0).decay_now()


def test_budgets_go_to_a_remote_directory() -> None:
    fsspec.filesystem("memory").store.clear()
    saving = ModelCheckpoint("memory://bucket/run")
    fit([saving, schedule(budgets=[5])], max_steps=9, enable_checkpointing=True, limit_val_batches=0)
    assert fsspec.filesystem("memory").exists("memory://bucket/run/budget-5.ckpt")
