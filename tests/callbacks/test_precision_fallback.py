"""PrecisionFallback in a Trainer: what switches layers, for how long, what is logged, resuming, processes, company."""

import copy
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract.fallback_checks import Converting
from gradients import entries
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_stable.callbacks.precision_fallback import PrecisionFallback
from lightning_stable.callbacks.sam import SAM
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.testing.harness import Net, SaveAt, Stream, TwoOptimizerNet, assert_same, fit
from lightning_stable.testing.workers import Pair

# Calm enough for the net of the contracts, whose loss falls and varies between batches.
CALM: dict[str, Any] = {
    "threshold": 20.0,
    "lower_threshold": 15.0,
    "window": 12,
    "warmup_steps": 4,
    "steps": 3,
    "cooldown": 2,
}


class Watched(Net):
    """Lifts the loss of some steps, logs a gauge, and notes which layers quantize in each forward pass.

    Attributes:
        enabled: For each training step the names of the layers that quantized.
        validated: For each validation step as much.
    """

    def __init__(self, lifted: dict[int, float] | None = None, gauge: dict[int, float] | None = None) -> None:
        super().__init__()
        self.lifted = lifted or {}
        self.gauge = gauge or {}
        self.scale: dict[int, float] = {}
        self.enabled: list[list[str]] = []
        self.validated: list[list[str]] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        step = self.trainer.global_step
        if not self.training:
            return super().loss(batch)
        return super().loss((self.scale.get(step, 1.0) * x, y)) + self.lifted.get(step, 0.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        self.enabled.append(self._quantizing())
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step in self.gauge:
            self.log("gauge", self.gauge[self.trainer.global_step])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated.append(self._quantizing())
        super().validation_step(batch, batch_idx)
        if self.gauge:
            self.log("val_gauge", self.gauge.get(self.trainer.global_step, 0.0))

    def _quantizing(self) -> list[str]:
        return [name for name, layer in quantized_layers(self).items() if layer.enabled]


BOTH = ["body.0", "head"]


def high_steps(module: Watched) -> list[int]:
    return [step for step, names in enumerate(module.enabled) if names != BOTH]


def run(settings: dict[str, Any], module: LightningModule, **more: Any) -> Any:
    more = {"max_steps": 20, "limit_val_batches": 0, **more}
    return fit([Converting(**{**CALM, **settings})], module=module, **more)


# ------------------------------------------------------------------ what switches, and for how long


@pytest.mark.parametrize("size", [100.0, math.nan, math.inf])
def test_a_spike_switches_all_layers_for_so_many_steps(size: float) -> None:
    module = Watched({8: size})
    done = run({}, module)
    # Judged at the end of the step after it.
    assert high_steps(module) == [10, 11, 12]
    assert module.enabled[10] == []
    assert done.plugins[0].events == [
        {"step": 10, "precision": "high", "reason": "loss"},
        {"step": 13, "precision": "low", "reason": "loss"},
    ]
    logged = entries(done.logged, "precision_fallback/high")
    assert [step for step, high in logged.items() if high] == [9, 10, 11]
    assert list(entries(done.logged, "precision_fallback/count").values()) == [0.0] * 9 + [1.0] * 11


def test_high_precision_lasts_until_all_is_calm_and_no_other_begins_in_the_cooldown() -> None:
    module = Watched({8: 100.0, 11: 100.0, 12: 100.0, 13: 100.0, 15: 100.0})
    run({"cooldown": 4}, module)
    # The values of 11 to 13 are known before steps 13 to 15; those of step 15 before step 17, in the cooldown.
    assert high_steps(module) == [10, 11, 12, 13, 14, 15]


def test_validation_sees_the_precision_of_training() -> None:
    module = Watched({8: 100.0})
    run({}, module, validation=Stream(1, seed=5), val_check_interval=1, limit_val_batches=1)
    assert [place for place, names in enumerate(module.validated) if not names] == [9, 10, 11]


def test_chosen_layers_alone() -> None:
    module = Watched({8: 100.0})
    run({"include": ["*"], "exclude": ["he*"]}, module)
    assert {tuple(module.enabled[step]) for step in high_steps(module)} == {("head",)}
    module = Watched({8: 100.0})
    run({"include": ["head", "gone"]}, module)
    assert {tuple(module.enabled[step]) for step in high_steps(module)} == {("body.0",)}


def test_the_first_steps_and_nothing_else() -> None:
    module = Watched({8: math.nan})
    done = run({"monitor": [], "first_steps_high_precision": 4}, module, max_steps=12)
    assert high_steps(module) == [0, 1, 2, 3]
    assert done.plugins[0].events == [{"step": 4, "precision": "low", "reason": "start"}]
    # A second fit of the module goes on; another module begins anew.
    module.enabled.clear()
    fit(done.plugins, module=module, max_steps=3)
    assert high_steps(module) == []
    other = Watched()
    fit(done.plugins, module=other, max_steps=6)
    assert high_steps(other) == [0, 1, 2, 3]


def test_accumulated_batches_are_one_step() -> None:
    module = Watched({6: 100.0})
    run({}, module, accumulate_grad_batches=2, max_steps=15)
    assert high_steps(module) == [16, 17, 18, 19, 20, 21], "micro-batches of the steps 8, 9 and 10"


# ------------------------------------------------------------------ signals


def test_a_logged_value_above_its_limit() -> None:
    module = Watched(gauge={3: 1.0, 6: 5.0, 8: 5.0, 12: 2.0, 14: 1.4})
    done = run({"monitor": "gauge", "limits": {"gauge": 2.0}}, module)
    # Back at 2 * 15 / 20 = 1.5 or below: what was logged at step 14 is known after step 15.
    assert high_steps(module) == list(range(8, 16))
    assert [event["reason"] for event in done.plugins[0].events] == ["gauge", "gauge"]


def test_a_logged_value_counts_once_and_learns_its_band() -> None:
    gauge = {step: 1.0 + 0.01 * step for step in range(0, 15, 3)} | {16: 9.0}
    module = Watched(gauge=gauge)
    done = run({"monitor": ["gauge"]}, module)
    band = done.plugins[0].state_dict()["decision"]["bands"]["gauge"]
    seen = band["seen"][~band["seen"].isnan()].tolist()
    assert seen == pytest.approx(list(gauge.values()))
    assert band["rejected"].tolist() == [False] * 11 + [True]
    assert high_steps(module) == [18, 19]


def test_a_validated_value_is_judged_at_the_end_of_the_validation() -> None:
    module = Watched(gauge={10: 5.0})
    settings = {"monitor": ["loss", "val_gauge"], "limits": {"val_gauge": 2.0}, "steps": 1}
    done = run(settings, module, validation=Stream(1, seed=5), val_check_interval=4, limit_val_batches=1)
    # Validated after the steps 4, 10 and 16; there is no way back before the next one is below.
    assert high_steps(module) == [10, 11, 12, 13, 14, 15]
    assert [event["step"] for event in done.plugins[0].events] == [10, 16]


class Saturating(Converting):
    quantizers = {"activations": Quantizer("e4m3"), "gradients": Quantizer("e5m2")}  # noqa: RUF012


def test_saturated_operands_switch_and_validations_do_not_count() -> None:
    module = Watched()
    module.scale = {7: 1e3}
    validation = Stream(1, seed=5)
    validation.dataset.tensors[0].mul_(1e6)
    plugin = Saturating(**{**CALM, "monitor": "saturation", "steps": 3})
    probe = Keeps()
    fit([plugin, probe], module=module, max_steps=14, validation=validation, val_check_interval=2)
    assert high_steps(module) == [9, 10, 11]
    saturated = (1e3 * Stream().batch(7 % 6)[0]).abs() > 448
    # The largest share of any operand: that of the first layer's input.
    assert probe.pending[7][0][0] == pytest.approx(float(saturated.float().mean()))
    assert all(pending[0][0] == 0 for step, pending in enumerate(probe.pending) if step != 7)
    assert not any(layer.observers for layer in quantized_layers(module).values())


class Keeps(Callback):
    """Keeps what the fallback measured of each step."""

    def __init__(self) -> None:
        self.pending: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        (plugin,) = (each for each in trainer.callbacks if isinstance(each, PrecisionFallback))
        self.pending.append(plugin.state_dict()["signals"]["pending"])


def losses(probe: Keeps) -> list[float]:
    return [value for ((value,), _) in probe.pending]


def test_the_loss_is_that_of_the_pass_that_counts() -> None:
    probe = Keeps()
    done = fit([SAM(rho=0.5), Converting(**CALM), probe], max_steps=6, limit_val_batches=0)
    assert losses(probe) == pytest.approx(list(entries(done.logged, "train_loss").values()), rel=1e-6)


def test_the_factor_of_a_gradient_scaler_is_not_in_the_loss() -> None:
    probe = Keeps()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    done = fit([Converting(**CALM), probe, precision], max_steps=4, limit_val_batches=0)
    assert losses(probe) == pytest.approx(list(entries(done.logged, "train_loss").values()), rel=1e-3)


def test_a_name_that_nobody_logs_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"PrecisionFallback\(monitor=\['sharpnes'\]\): sharpnes was not logged so far"
    ):
        run({"monitor": "sharpnes"}, Watched(), max_steps=8)


def test_steps_of_several_optimizers_count() -> None:
    class Two(TwoOptimizerNet):
        seen: list[tuple[int, bool]]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            high = not any(layer.enabled for layer in quantized_layers(self).values())
            self.seen = [*getattr(self, "seen", []), (self.trainer.global_step, high)]
            super().training_step(batch, batch_idx)

    module = Two()
    run({"monitor": [], "first_steps_high_precision": 5}, module, max_steps=12)
    assert module.seen == [(0, True), (2, True), (4, True), (6, False), (8, False), (10, False)]


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("cut", [9, 10, 12, 14])
def test_it_resumes_in_the_middle_of_a_fallback(cut: int, tmp_path: Path) -> None:
    settings = {**CALM, "monitor": ["loss", "gauge"], "first_steps_high_precision": 2}

    def module() -> Watched:
        return Watched({8: 100.0, 15: math.inf}, gauge={5: 1.0, 9: 2.0})

    straight = fit([Converting(**settings)], module=module(), max_steps=18, limit_val_batches=0)
    assert high_steps(straight.module) == [0, 1, 10, 11, 12, 17]
    path = tmp_path / "cut.ckpt"
    saver = SaveAt(cut, str(path))
    fit([Converting(**settings), saver], module=module(), max_steps=cut, limit_val_batches=0)
    resumed = fit([Converting(**settings)], module=module(), max_steps=18, limit_val_batches=0, ckpt_path=str(path))
    found, expected = resumed.snapshot(cut), straight.snapshot(cut)
    for name in ("precision_fallback/high", "precision_fallback/count", "train_loss"):
        assert entries(found["logged"], name) == entries(expected["logged"], name)
    # The host writes a gauge of an earlier step again, and not so after a resume.
    assert_same({**found, "logged": 0}, {**expected, "logged": 0}, "resumed against uninterrupted")
    assert resumed.module.enabled == straight.module.enabled[cut:]
    assert "PrecisionFallback" not in str(torch.serialization.get_safe_globals())


def test_what_does_not_go_with_the_checkpoint_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")
    run({}, Watched(), callbacks=[SaveAt(4, path)], max_steps=4)
    for settings, message in (
        ({"monitor": "gauge"}, r"PrecisionFallback has monitor=\['loss'\], and this one monitor=\['gauge'\]"),
        ({"window": 5}, r"PrecisionFallback has window=12, and this one window=5. Resume with window=12"),
    ):
        with pytest.raises(ValueError, match=message):
            run(settings, Watched(), ckpt_path=path)


def test_it_can_be_copied_and_the_copy_goes_on() -> None:
    done = run({}, Watched({8: 100.0}), max_steps=12)
    twin = copy.deepcopy(done.plugins[0])
    assert_same(twin.state_dict(), done.plugins[0].state_dict(), "a copy")
    assert twin.events == done.plugins[0].events


# ------------------------------------------------------------------ processes


class GaugeOnOne(Watched):
    """Logs a gauge that is not averaged over processes, high on one of them, and sees a loss spike on the other."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        rank, step = dist.get_rank(), self.trainer.global_step
        if rank == 0 or step == 5:  # not the same steps on both
            self.log("gauge", 8.0 if (rank, step) == (0, 5) else 1.0 + 0.1 * step)
        return loss + 200.0 if (rank, step) == (1, 13) else loss


def two_process_job() -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    settings = {**CALM, "monitor": ["loss", "gauge"], "limits": {"gauge": 4.0}}
    module = GaugeOnOne()
    done = fit([Converting(**settings)], module=module, max_steps=20, limit_val_batches=0, devices=2, strategy="ddp")
    return {"high": high_steps(module), "events": done.plugins[0].events, "weights": module.state_dict()}


def test_processes_decide_alike(workers: Pair) -> None:
    first, second = workers.run("test_precision_fallback:two_process_job")
    assert_same(second["events"], first["events"], "rank 1 against rank 0")
    # The mean of 8.0 and 1.5 is above 4.0; half of 200 is a spike.
    assert first["high"] == second["high"] == [7, 8, 9, 15, 16, 17]
    assert [event["reason"] for event in first["events"]] == ["gauge", "gauge", "loss", "loss"]


# ------------------------------------------------------------------ with the plugin itself


def test_with_simulated_precision() -> None:
    from lightning_stable.precision.simulated import SimulatedPrecision

    precision = SimulatedPrecision(weights="e4m3", activations="e4m3", gradients="e5m2", exclude=[])
    plugin = PrecisionFallback(**{**CALM, "first_steps_high_precision": 2})
    module = Watched({8: 100.0})
    fit([plugin, precision], module=module, max_steps=16, limit_val_batches=0)
    assert [step for step, names in enumerate(module.enabled[-16:]) if not names] == [0, 1, 10, 11, 12]
    assert not quantized_layers(module)


# ------------------------------------------------------------------ bad input


def test_a_module_that_is_not_quantized_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PrecisionFallback found no quantized layer in Net.*SimulatedPrecision"):
        fit([PrecisionFallback()], max_steps=2)


def test_converted_layers_without_a_format_are_refused() -> None:
    from lightning_stable.precision.simulated import SimulatedPrecision

    precision = SimulatedPrecision(weights=None, activations=None, gradients=None)
    with pytest.raises(ValueError, match=r"nothing to switch in Watched: its \d+ converted layers have no format"):
        fit([PrecisionFallback(), precision], module=Watched(), max_steps=2)


def test_patterns_that_leave_nothing_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"include=\['tail\*'\], exclude=\[\]\) leaves none of.*body\.0, head"):
        run({"include": ["tail*"]}, Watched())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0}, r"threshold=0 is not a finite number above 0"),
        ({"lower_threshold": -1}, r"lower_threshold=-1 is not a finite number above 0"),
        ({"lower_threshold": 7}, r"lower_threshold=7 is above threshold=6.0"),
        ({"limits": {"gauge": 1.0}}, r"limits has 'gauge', which is no signal of monitor=\['loss'\]"),
        ({"limits": {"loss": 0}}, r"limits\['loss'\]=0 is not a finite number above 0"),
        ({"window": 1}, r"window=1 is not a whole number of values from 2 on"),
        ({"warmup_steps": 1}, r"warmup_steps=1 is not a whole number of values from 2 on"),
        ({"warmup_steps": 200}, r"warmup_steps=200 is above window=128"),
        ({"steps": 0}, r"steps=0 is not a whole number of optimizer steps from 1 on"),
        ({"cooldown": -1}, r"cooldown=-1 is not a whole number"),
        ({"first_steps_high_precision": 1.5}, r"first_steps_high_precision=1.5 is not a whole number"),
        ({"include": "*"}, r"include='\*' is not a list of patterns"),
        ({"exclude": [1]}, r"exclude=\[1\] is not a list of patterns"),
        ({"monitor": [1]}, r"monitor=\[1\] is not a list of names"),
        ({"monitor": ["loss", "loss"]}, r"monitor=\['loss', 'loss'\] has a name twice"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionFallback(**settings)
