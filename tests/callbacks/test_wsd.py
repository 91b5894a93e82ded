"""WarmupStableDecay in a Trainer: rates at every step, budgets, branches, open horizons, and clear errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from schedules import endless, expected, factors

from lightning_stable.callbacks import EMA, WarmupStableDecay
from lightning_stable.functional.wsd import SHAPES
from lightning_stable.testing.harness import ManualNet, Net, Stream, assert_same, fit


@pytest.mark.parametrize("shape", SHAPES)
def test_rates_are_exact_over_several_epochs(shape: str) -> None:
    run = fit([WarmupStableDecay(warmup=4, decay=0.5, shape=shape)], max_epochs=3, limit_val_batches=0)
    assert len(run.steps) == 18
    assert factors(run) == expected(18, 18, 4, 0.5, shape)


def test_accumulation_counts_optimizer_steps() -> None:
    run = fit([WarmupStableDecay(warmup=2, decay=2)], max_epochs=3, accumulate_grad_batches=2, limit_val_batches=0)
    assert len(run.steps) == 9
    assert factors(run) == expected(9, 9, 2, 2)


@pytest.mark.parametrize("monitor_first", [True, False])
def test_the_monitor_shows_the_rate_that_each_step_used(monitor_first: bool) -> None:
    callbacks: list[Any] = [LearningRateMonitor(logging_interval="step"), WarmupStableDecay(warmup=2, budgets=[6])]
    run = fit(callbacks if monitor_first else callbacks[::-1], max_steps=10, limit_val_batches=0)
    shown = [entry["lr-RecordingSGD/pg1"] for _, entry in run.logged if "lr-RecordingSGD/pg1" in entry]
    assert shown == pytest.approx([step.rates[0] for step in run.steps])


def test_the_phase_is_logged() -> None:
    run = fit([WarmupStableDecay(warmup=2, decay=3)], max_steps=8, limit_val_batches=0)
    phases = [entry["wsd/phase"] for _, entry in run.logged if "wsd/phase" in entry]
    assert phases == [0, 0, 1, 1, 1, 2, 2, 2]


def test_a_rate_kept_as_a_tensor_stays_the_same_tensor() -> None:
    class TensorRate(Net):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.1)
            return torch.optim.Adam(self.parameters(), lr=self.rate)

        def on_train_batch_end(self, *args: Any) -> None:
            assert self.trainer.optimizers[0].param_groups[0]["lr"] is self.rate

    fit([WarmupStableDecay(warmup=2, decay=2)], module=TensorRate(), max_steps=6, limit_val_batches=0)


# ------------------------------------------------------------------ budgets


def test_budgets_are_saved_and_resume_exactly_with_the_average_of_that_step() -> None:
    def plugins() -> list[Any]:
        # In this order EMA would be one step behind in the checkpoint, did the schedule not come last.
        return [WarmupStableDecay(warmup=2, decay=3, budgets=[5, 9]), EMA(decay=0.5)]

    common: dict[str, Any] = {"max_steps": 14, "enable_checkpointing": True}
    straight = fit(plugins(), validation=Stream(2, seed=5), **common)
    folder = Path(straight.trainer.checkpoint_callback.dirpath)
    assert sorted(path.name for path in folder.glob("budget-*")) == ["budget-14.ckpt", "budget-5.ckpt", "budget-9.ckpt"]
    assert factors(straight) == expected(14, 14, 2, 3, budgets=[5, 9])

    live = EMA.load_weights(folder / "budget-9.ckpt", "live")
    assert_same({name: live[name] for name in straight.steps[8].weights}, straight.steps[8].weights, "live at 9")
    resumed = fit(plugins(), validation=Stream(2, seed=5), ckpt_path=str(folder / "budget-9.ckpt"), **common)
    assert_same(resumed.module.state_dict(), straight.module.state_dict(), "resumed from a budget")
    assert_same([s._asdict() for s in resumed.steps], [s._asdict() for s in straight.steps[9:]], "its steps")


def test_without_model_checkpoint_budgets_go_to_the_root_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fit([WarmupStableDecay(warmup=1, budgets=[3])], max_steps=6, default_root_dir=root, limit_val_batches=0)
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == [
        "budget-3.ckpt",
        "budget-6.ckpt",
    ]


def test_budgets_can_be_left_unsaved(tmp_path: Path) -> None:
    fit([WarmupStableDecay(warmup=1, budgets=[3], save_at_budgets=False)], max_steps=6, limit_val_batches=0)
    assert not list(tmp_path.rglob("*.ckpt"))


# ------------------------------------------------------------------ company and clean-up


def test_model_checkpoint_and_resume_from_it(tmp_path: Path) -> None:
    def run(**settings: Any) -> Any:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        return fit([saving, WarmupStableDecay(2, 4)], max_steps=14, enable_checkpointing=True, **settings)

    straight = run(limit_val_batches=0)
    resumed = run(limit_val_batches=0, ckpt_path=str(tmp_path / "step=8.ckpt"))
    assert_same([s._asdict() for s in resumed.steps], [s._asdict() for s in straight.steps[8:]], "resumed")


def test_an_optimizer_that_outlives_the_fit_has_its_peak_again() -> None:
    class KeepsIt(Net):
        kept: Any = None

        def configure_optimizers(self) -> Any:
            self.kept = self.kept or super().configure_optimizers()
            return self.kept

    module = KeepsIt()
    for fitted in (1, 2):
        run = fit([WarmupStableDecay(2, 4)], module=module, max_steps=10, limit_val_batches=0)
        assert [group["lr"] for group in module.kept.param_groups] == [0.05, 0.02]
        assert factors(run)[-10:] == expected(10, 10, 2, 4)
        assert len(run.steps) == 10 * fitted


def test_groups_that_join_in_training_are_scheduled_too() -> None:
    class Grows(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.body.parameters(), lr=0.1)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": self.head.parameters(), "lr": 0.5})

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.rates_seen.append([group["lr"] for group in optimizer.param_groups])

    module = Grows()
    module.rates_seen = []
    fit([WarmupStableDecay(0, 6, "linear", 0.0)], module=module, max_steps=12, limit_val_batches=0)
    assert module.rates_seen[5] == [0.1]
    assert module.rates_seen[6] == [0.1, 0.5]
    assert module.rates_seen[11] == pytest.approx([0.1 / 6, 0.5 / 6])


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "square"}, r"shape='square' is unknown. Choose one of 'linear'"),
        ({"min_ratio": 1.5}, r"min_ratio=1.5 is not in \[0, 1\]"),
        ({"min_ratio": 0.0}, r"min_ratio=0 with shape='inverse'"),
        ({"warmup": -1}, r"warmup=-1 is negative"),
        ({"warmup": True}, r"warmup=True is not a number"),
        ({"decay": 1.0}, r"decay=1.0 is a float outside \[0, 1\)"),
        ({"decay": float("nan")}, r"decay=nan is a float outside"),
        ({"warmup": 0.6, "decay": 0.6}, r"warmup=0.6 and decay=0.6 are together more than the whole run"),
        ({"budgets": [10, 5]}, r"budgets=\[10, 5\] is not increasing"),
        ({"budgets": [0, 5]}, r"budgets=\[0, 5\] holds 0"),
        ({"budgets": [10], "total_steps": 5}, r"budgets=\[10\] holds 10, beyond the end of the run at 5"),
        ({"warmup": 8, "decay": 8, "total_steps": 10}, r"take 8 \+ 8 optimizer steps, more than the 10"),
        ({"total_steps": 0}, r"total_steps=0 is not a positive number"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(**settings)


def test_bad_lengths_of_an_asked_decay() -> None:
    with pytest.raises(ValueError, match="steps=0 is not a positive number"):
        WarmupStableDecay().decay_now(0)


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (lambda: WarmupStableDecay(budgets=[50]), {"max_steps": 10}, r"beyond the end of the run at 10"),
        (lambda: WarmupStableDecay(6, 6), {"max_steps": 10}, r"take 6 \+ 6 optimizer steps, more than the 10"),
        (lambda: WarmupStableDecay(), {"max_epochs": -1, "train": "endless"}, r"warmup=0.01 is a share of a run whose"),
        (
            lambda: WarmupStableDecay(),
            {"max_epochs": 2, "module": ManualNet},
            r"manual optimisation a batch.*Give total_steps",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_told_before_training(
    schedule: Any, settings: dict[str, Any], message: str
) -> None:
    module = settings.pop("module", Net)()
    train = endless() if settings.pop("train", None) else None
    with pytest.raises(ValueError, match=message):
        fit([schedule()], module=module, train=train, limit_val_batches=0, **settings)
    assert not module.steps


def test_a_scheduler_of_the_module_is_refused() -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(ValueError, match=r"WarmupStableDecay and StepLR would both set the learning rate: Scheduled"):
        fit([WarmupStableDecay()], module=Scheduled(), max_steps=10, limit_val_batches=0)


def test_asking_before_a_fit_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match="from the start of a fit on"):
        WarmupStableDecay().multiplier(3)
