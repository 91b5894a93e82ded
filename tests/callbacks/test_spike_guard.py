"""SpikeGuard in a Trainer: skipping, clipping, going back, new levels, scalers, processes, and company."""

import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradients import NetWith, Watches, entries, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import AdamW

from lightning_stable.callbacks.spike_guard import SpikeGuard
from lightning_stable.callbacks.stable_spam import StableSPAM
from lightning_stable.testing.harness import Net, SaveAt, Step, Stream, TwoOptimizerNet, assert_same, fit
from lightning_stable.testing.workers import Pair

# Calm enough for the net of the contracts, whose loss falls and varies between batches.
CALM: dict[str, Any] = {"threshold": 20.0, "window": 12, "warmup_steps": 4}


class Spikes(Net):
    """The loss of some optimizer steps is changed, and with it the gradient or not."""

    def __init__(self, change: Callable[[Tensor], Tensor], at: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.change = change
        self.at = at

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().loss(batch)
        return self.change(loss) if self.training and self.trainer.global_step in self.at else loss


def larger(loss: Tensor) -> Tensor:
    return 1000.0 * loss


def lifted(loss: Tensor) -> Tensor:
    """A loss that spikes with its usual gradient."""
    return loss + 1000.0


def broken(loss: Tensor) -> Tensor:
    return loss * math.nan


def counts(run: Any) -> dict[str, float]:
    """The last logged counts."""
    return {
        name: list(entries(run.logged, f"spike_guard/{name}").values())[-1]
        for name in ("skipped", "clipped", "rewinds")
    }


def moved(step: Step) -> dict[str, Tensor]:
    return {name: value - step.before[name] for name, value in step.weights.items()}


# ------------------------------------------------------------------ skip


@pytest.mark.parametrize("change", [larger, lifted, broken])
def test_a_spike_changes_neither_weights_nor_momentum(change: Any) -> None:
    run = fit([SpikeGuard(**CALM)], module=Spikes(change, {8, 11}), max_steps=14, limit_val_batches=0)
    assert counts(run) == {"skipped": 2, "clipped": 0, "rewinds": 0}
    for spiked in (8, 11):
        assert_same(run.steps[spiked].weights, run.steps[spiked].before, "the skipped update")
        assert not run.steps[spiked].gradients
        # The momentum of the step before is the one that the step after goes on from.
        before, after = moved(run.steps[spiked - 1]), moved(run.steps[spiked + 1])
        for name, gradient in run.steps[spiked + 1].gradients.items():
            rate = run.steps[spiked].rates[0 if name.startswith("body") else 1]
            assert torch.allclose(after[name], 0.9 * before[name] - rate * gradient, atol=1e-6)


def test_what_is_watched_decides() -> None:
    def skipped(change: Any, watch: str) -> float:
        module = Spikes(change, {8})
        return counts(fit([SpikeGuard(watch=watch, **CALM)], module=module, max_steps=10, limit_val_batches=0))[
            "skipped"
        ]

    assert {watch: skipped(lifted, watch) for watch in ("norm", "loss", "both")} == {"norm": 0, "loss": 1, "both": 1}
    assert {watch: skipped(larger, watch) for watch in ("norm", "loss", "both")} == {"norm": 1, "loss": 1, "both": 1}
    assert {watch: skipped(broken, watch) for watch in ("norm", "loss", "both")} == {"norm": 1, "loss": 1, "both": 1}


def test_the_first_updates_are_judged_by_nothing_but_being_finite() -> None:
    run = fit([SpikeGuard(**CALM)], module=Spikes(broken, {0, 2}), max_steps=6, limit_val_batches=0)
    assert counts(run)["skipped"] == 2
    assert not entries(run.logged, "spike_guard/limit"), "four were accepted, and the fifth would be judged"
    run = fit([SpikeGuard(**CALM)], module=Spikes(larger, {0, 2}), max_steps=4, limit_val_batches=0)
    assert counts(run)["skipped"] == 0


def test_what_is_logged() -> None:
    raw = Watches()
    callback = SpikeGuard(**CALM)
    run = fit([raw, callback], module=Spikes(larger, {8}), max_steps=12, limit_val_batches=0)
    norms = [float(torch.cat([g.flatten() for g in gradients.values()]).norm()) for gradients in raw.seen]
    assert list(entries(run.logged, "spike_guard/norm").values()) == pytest.approx(norms, rel=1e-5)
    limits, accepted = entries(run.logged, "spike_guard/limit"), []
    for step, norm in enumerate(norms):
        if len(accepted) >= 4:
            middle = statistics.median(accepted)
            spread = max(1.4826 * statistics.median([abs(n - middle) for n in accepted]), 0.01 * middle)
            assert limits[step] == pytest.approx(middle + 20 * spread, rel=1e-5)
        else:
            assert step not in limits
        if step != 8:
            accepted.append(norm)
    assert list(entries(run.logged, "spike_guard/skipped").values()) == [0] * 8 + [1] * 4


def test_the_loss_is_that_of_the_whole_accumulated_batch() -> None:
    callback = SpikeGuard(**CALM)
    run = fit([callback], max_steps=6, limit_val_batches=0, accumulate_grad_batches=3, log_every_n_steps=1)
    seen = callback.state_dict()["optimizers"]["0"]["bands"]["loss"]["values"][-6:]
    module, stream, expected = Net(), Stream(), []
    for step in run.steps:
        module.load_state_dict({**module.state_dict(), **step.before})
        places = [(3 * len(expected) + micro) % 6 for micro in range(3)]
        expected.append(statistics.mean(float(module.loss(stream.batch(place)).detach()) for place in places))
    assert seen.tolist() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ clip


def test_a_spike_of_the_norm_is_clipped_to_the_limit() -> None:
    after = Watches()
    module = Spikes(larger, {8})
    run = fit([SpikeGuard("clip", "norm", **CALM), after], module=module, max_steps=10, limit_val_batches=0)
    assert counts(run) == {"skipped": 0, "clipped": 1, "rewinds": 0}
    norm = torch.cat([g.flatten() for g in after.seen[8].values()]).norm()
    assert float(norm) == pytest.approx(entries(run.logged, "spike_guard/limit")[8], rel=1e-5)
    values = run.plugins[0].state_dict()["optimizers"]["0"]["bands"]["norm"]["values"]
    assert float(values[-2]) == pytest.approx(float(norm), rel=1e-5), "the limit is in the band"


def test_a_spike_of_the_loss_is_clipped_to_the_median_norm_at_most() -> None:
    raw, after = Watches(), Watches()
    module = Spikes(lifted, {8, 9})
    callback = SpikeGuard("clip", **CALM)
    run = fit([raw, callback, after], module=module, max_steps=10, limit_val_batches=0)
    assert counts(run) == {"skipped": 0, "clipped": 2, "rewinds": 0}

    def norm(gradients: dict[str, Tensor]) -> float:
        return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())

    norms = [norm(gradients) for gradients in raw.seen]
    for step in (8, 9):
        assert norm(after.seen[step]) == pytest.approx(min(norms[step], statistics.median(norms[:step])), rel=1e-5)
    values = callback.state_dict()["optimizers"]["0"]["bands"]["norm"]["values"]
    assert values[-10:].tolist() == pytest.approx(norms, rel=1e-5), "the norm itself was usual"


def test_what_is_not_finite_is_skipped_where_others_are_clipped() -> None:
    run = fit([SpikeGuard("clip", **CALM)], module=Spikes(broken, {1, 8}), max_steps=10, limit_val_batches=0)
    assert counts(run) == {"skipped": 2, "clipped": 0, "rewinds": 0}


# ------------------------------------------------------------------ a new level


@pytest.mark.parametrize("action", ["skip", "clip"])
@pytest.mark.parametrize("change", [larger, lifted])
def test_a_new_level_is_accepted_in_the_end(action: str, change: Any) -> None:
    settings = {**CALM, "window": 8, "threshold": 60.0}
    module = Spikes(change, range(10, 1000), rates=(1e-6, 1e-6))
    run = fit([SpikeGuard(action, **settings)], module=module, max_steps=40, limit_val_batches=0)
    name = "skipped" if action == "skip" else "clipped"
    values = list(entries(run.logged, f"spike_guard/{name}").values())
    assert values[10] == 1
    assert values[-1] == 5, "more than half of a window, and then no more"


def test_a_run_that_is_never_finite_again_is_told() -> None:
    module = Spikes(broken, range(5, 1000))
    with pytest.warns(UserWarning, match=r"SpikeGuard skipped 12 updates in a row.*not finite"):
        run = fit([SpikeGuard(**CALM)], module=module, max_steps=30, limit_val_batches=0)
    assert counts(run)["skipped"] == 25


# ------------------------------------------------------------------ going back


def adam(parameters: Any) -> AdamW:
    return AdamW(parameters, lr=0.02)


class SpikesWithAdam(Spikes):
    """Keeps weights, buffers and the optimizer's state after each step."""

    def __init__(self, change: Any, at: Any) -> None:
        super().__init__(change, at)
        self.history: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Any]] = []

    def configure_optimizers(self) -> Any:
        return adam(self.parameters())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        held = {name: self.trainer.optimizers[0].state[parameter] for name, parameter in self.named_parameters()}
        self.history.append(weights(self))
        self.states.append(
            {
                "buffers": {name: value.clone() for name, value in self.named_buffers()},
                "optimizer": {name: {e: value.clone() for e, value in state.items()} for name, state in held.items()},
            }
        )


REWINDS: dict[str, Any] = {**CALM, "rewind_after": 2, "snapshot_every_n_steps": 3}


@pytest.mark.parametrize("change", [larger, broken])
@pytest.mark.parametrize("action", ["skip", "clip"])
def test_spikes_in_a_row_lead_back_to_the_snapshot(change: Any, action: str) -> None:
    module = SpikesWithAdam(change, {10, 11})
    run = fit([SpikeGuard(action, **REWINDS)], module=module, max_steps=14, limit_val_batches=0)
    found = counts(run)
    assert found["rewinds"] == 1
    assert found["skipped"] == (1 if action == "clip" and change is larger else 2)
    # Accepted updates 0 to 9; snapshots at the third, sixth and ninth, before each of them is made.
    assert_same(module.history[11], module.history[7], "weights after going back")
    assert_same(module.states[11]["optimizer"], module.states[7]["optimizer"], "optimizer's state after going back")
    kept, back = module.states[7]["buffers"], module.states[11]["buffers"]
    # Batch statistics of the ninth update were in the buffers when its snapshot was taken.
    assert not torch.equal(back["body.1.running_mean"], kept["body.1.running_mean"])
    assert_same(back, module.states[8]["buffers"], "buffers after going back")
    assert torch.isfinite(back["body.1.running_mean"]).all()


def test_without_an_earlier_snapshot_the_start_of_the_fit_is_it() -> None:
    module = SpikesWithAdam(broken, {1, 2})
    start = weights(module)
    fit([SpikeGuard(**{**REWINDS, "snapshot_every_n_steps": 50})], module=module, max_steps=5, limit_val_batches=0)
    assert_same(module.history[2], start, "the first snapshot is of the start")
    assert not any(module.states[2]["optimizer"].values()), "the optimizer had no state then"


def test_the_count_restarts_and_learning_rates_stay() -> None:
    class Decays(SpikesWithAdam):
        def configure_optimizers(self) -> Any:
            optimizer = adam(self.parameters())
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = Decays(larger, {8, 9, 10, 12})
    run = fit([SpikeGuard(**REWINDS)], module=module, max_steps=14, limit_val_batches=0)
    assert list(entries(run.logged, "spike_guard/rewinds").values()) == [0] * 9 + [1] * 5
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.9**14)


def test_a_rewind_after_resuming_is_the_one_of_the_uninterrupted_run(tmp_path: Path) -> None:
    def module() -> SpikesWithAdam:
        return SpikesWithAdam(larger, {8, 10, 11})

    straight = fit([SpikeGuard(**REWINDS)], module=module(), max_steps=14, limit_val_batches=0)
    path = tmp_path / "cut.ckpt"
    fit([SpikeGuard(**REWINDS), SaveAt(11, str(path))], module=module(), max_steps=12, limit_val_batches=0)
    resumed = fit([SpikeGuard(**REWINDS)], module=module(), max_steps=14, limit_val_batches=0, ckpt_path=str(path))
    assert counts(resumed)["rewinds"] == 1
    assert_same(resumed.snapshot(11), straight.snapshot(11), "resumed against uninterrupted")


def test_a_second_fit_goes_back_to_its_own_start() -> None:
    callback, module = SpikeGuard(**{**REWINDS, "snapshot_every_n_steps": 100}), SpikesWithAdam(broken, {2, 3})
    module.at = ()
    fit([callback], module=module, max_steps=5, limit_val_batches=0)
    start, module.at = weights(module), {2, 3}
    fit([callback], module=module, max_steps=4, limit_val_batches=0)
    assert_same(module.history[-1], start, "the snapshot of the second fit")


# ------------------------------------------------------------------ scalers, processes, company


class Scaled(Callback):
    """Spoils the gradient of some steps, as an overflow in half precision does."""

    def __init__(self, at: set[int]) -> None:
        self.at = at

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step in self.at:
            pl_module.head.weight.grad.fill_(math.inf)


def test_a_gradient_scaler_deals_with_what_is_not_finite_and_its_factor_is_not_in_the_loss() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    callback, module = SpikeGuard(**CALM), NetWith(adam)
    run = fit(
        [Scaled({5}), callback, MixedPrecision("16-mixed", "cpu", scaler)],
        module=module,
        max_steps=9,
        limit_val_batches=0,
    )
    assert counts(run)["skipped"] == 0
    assert scaler.get_scale() == 512.0
    assert_same(module.history[5], module.history[4], "the scaler skipped it")
    values = callback.state_dict()["optimizers"]["0"]["bands"]["loss"]["values"]
    logged = entries(run.logged, "train_loss")
    assert values[-8:].tolist() == pytest.approx([loss for step, loss in logged.items() if step != 5], rel=1e-3)


def test_a_scaler_and_a_spike_that_is_finite() -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    run = fit([SpikeGuard(**CALM), precision], module=Spikes(lifted, {6}), max_steps=9, limit_val_batches=0)
    assert counts(run)["skipped"] == 1
    assert_same(run.steps[6].weights, run.steps[6].before, "the skipped update")


def lifted_on_one_rank(loss: Tensor) -> Tensor:
    return loss + 1000.0 * dist.get_rank()


def two_process_job() -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    module = Spikes(lifted_on_one_rank, {8}, norm=False)
    run = fit([SpikeGuard(**CALM)], module=module, max_steps=12, limit_val_batches=0, devices=2, strategy="ddp")
    return {"counts": counts(run), "weights": weights(run.module), "state": run.plugins[0].state_dict()}


def test_processes_decide_alike(workers: Pair) -> None:
    first, second = workers.run("test_spike_guard:two_process_job")
    assert first["counts"] == {"skipped": 1, "clipped": 0, "rewinds": 0}
    assert_same(second, first, "rank 1 against rank 0")


@pytest.mark.parametrize("order", [1, -1])
def test_it_judges_gradients_that_others_have_not_changed(order: int) -> None:
    guard, spam = SpikeGuard(**CALM), StableSPAM(norm="history", reset_every_n_steps=None)
    run = fit([guard, spam][::order], module=Spikes(larger, {8}), max_steps=10, limit_val_batches=0)
    assert counts(run)["skipped"] == 1
    assert spam.state_dict()["optimizers"]["0"]["updates"] == 9, "the skipped gradient is in no statistic"


def test_two_optimizers_are_guarded_one_by_one() -> None:
    class Breaks(TwoOptimizerNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for place, optimizer in enumerate(self.optimizers()):
                loss = self.loss(batch) * (1000.0 if place and self.trainer.global_step == 19 else 1.0)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    callback = SpikeGuard(**CALM)
    run = fit([callback], module=Breaks(), max_steps=24, limit_val_batches=0)
    states = callback.state_dict()["optimizers"]
    assert [states[key]["skipped"] for key in "01"] == [0, 1]
    assert list(entries(run.logged, "spike_guard/skipped/1").values())[-3:] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"SpikeGuard\(rewind_after=2\) does not work with 2 optimizers"):
        fit([SpikeGuard(rewind_after=2)], module=TwoOptimizerNet(), max_steps=2)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "stop"}, r"action='stop' is unknown. Choose one of 'skip', 'clip'"),
        ({"watch": "all"}, r"watch='all' is unknown. Choose one of 'both', 'norm', 'loss'"),
        ({"threshold": 0}, r"threshold=0 is not a finite number above 0"),
        ({"window": 1}, r"window=1 is not a whole number of accepted updates from 2 on"),
        ({"warmup_steps": 200}, r"warmup_steps=200 is above window=128"),
        ({"rewind_after": 0}, r"rewind_after=0 is not a whole number of spikes in a row from 1 on"),
        ({"snapshot_every_n_steps": 0}, r"snapshot_every_n_steps=0 is not a whole number"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeGuard(**settings)


def test_it_says_that_it_skips_what_is_not_finite() -> None:
    assert SpikeGuard.skips_non_finite_updates is True
