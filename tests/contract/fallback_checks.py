"""The oracle of the row of PrecisionFallback: in which precision each step was, from the losses, and its gradients."""

from typing import Any, ClassVar

import torch
from contract.oracle_checks import _assert_gradients, _differs
from lightning.pytorch import LightningModule, Trainer
from oracles.fallback_twin import FallbackTwin
from oracles.replay import Replay

from lightning_stable.callbacks.precision_fallback import PrecisionFallback
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import convert, quantized_layers, restore
from lightning_stable.testing.harness import Run, fit
from lightning_stable.testing.rows import STEPS, Settings
from lightning_stable.testing.streams import Stream

# Coarse enough to show in every gradient. Of the weights alone: what a scale or a rounding makes of activations hangs
# on which samples a process has.
COARSE = Quantizer("e2m1", scaling="channel")


class Converting(PrecisionFallback):
    """Converts the layers of the module itself, as SimulatedPrecision would, so that a row needs no second plugin."""

    quantizers: ClassVar[dict[str, Quantizer]] = {"weights": COARSE}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            convert(pl_module, **self.quantizers)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        restore(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        restore(pl_module)


# So low a threshold that the ordinary ups and downs of the loss are spikes.
FALLBACK: dict[str, Any] = {
    "threshold": 0.1,
    "lower_threshold": 0.1,
    "window": 6,
    "warmup_steps": 2,
    "steps": 2,
    "cooldown": 1,
}


def precision_fallback(run: Run, plugin: PrecisionFallback) -> None:
    logged_loss: dict[str, Any] = {**FALLBACK, "monitor": ["val_loss"], "limits": {"val_loss": 0.05}}
    first: dict[str, Any] = {**FALLBACK, "monitor": [], "first_steps_high_precision": 5}
    part: dict[str, Any] = {**FALLBACK, "include": ["body*"], "first_steps_high_precision": 1}
    runs = [(FALLBACK, run), *((settings, _again(run, settings)) for settings in (logged_loss, first, part))]
    for settings, done in runs:
        _assert_precisions(settings, done)


def _again(run: Run, settings: dict[str, Any]) -> Run:
    """Fit once more under the accumulation, the clipping and the precision of a run."""
    return fit(
        [Converting(**settings)],
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        accumulate_grad_batches=run.trainer.accumulate_grad_batches,
        gradient_clip_val=run.trainer.gradient_clip_val,
        precision=run.trainer.precision,
    )


def _assert_precisions(settings: dict[str, Any], run: Run) -> None:
    """Fail unless each step has the gradients of the precision that the twin says, and both occur."""
    twin = FallbackTwin(
        settings["threshold"],
        settings["lower_threshold"],
        settings["steps"],
        settings["cooldown"],
        settings["window"],
        settings["warmup_steps"],
        settings.get("limits"),
        settings.get("first_steps_high_precision", 0),
    )
    validated = {step: entry["val_loss"] for step, entry in run.logged if "val_loss" in entry}
    switched = "body" if "include" in settings else ""
    watches_loss = settings.get("monitor", "loss") == "loss"
    replay, pending, found, logged, visible = Replay(run), {}, [], [], 0
    convert(replay.module, weights=COARSE)
    other = Replay(run)  # which computes in the other precision
    convert(other.module, weights=COARSE)
    for replayed, opposite in zip(replay, other, strict=True):
        for module, high in ((replay.module, twin.high), (other.module, not twin.high)):
            for name, layer in quantized_layers(module).items():
                layer.enabled = not high or not name.startswith(switched)
        expected = replayed.gradients()
        _assert_gradients(replayed, expected, f"PrecisionFallback with {settings}")
        visible += _differs(replayed, opposite.gradients())
        found.append(twin.high)
        # Read at the end of the step after it.
        measured = {"loss": sum(replayed.losses()) / replay.accumulate} if watches_loss else {}
        logged.append(float(twin.step(pending)))
        pending = measured
        if not watches_loss and "val_loss" in settings.get("monitor", []) and replayed.number in validated:
            twin.step({"val_loss": validated[replayed.number]}, passed=0)
    assert visible >= STEPS // 2, f"PrecisionFallback with {settings}: the precision hardly shows"
    assert True in found, f"PrecisionFallback with {settings}: the twin sees no reason"
    assert False in found, f"PrecisionFallback with {settings}: the twin sees no way back"
    assert len(found) == STEPS
    highs = [entry["precision_fallback/high"] for _, entry in run.logged if "precision_fallback/high" in entry]
    assert highs == logged, "what is logged is not what was decided"
    assert not quantized_layers(run.module), "the layers are still converted"
    assert torch.is_grad_enabled()


SETTINGS = Settings(
    make=lambda: Converting(**FALLBACK),
    oracle=precision_fallback,
    # Converted layers that compute in high precision throughout are what they were before.
    identities=(lambda: Converting(first_steps_high_precision=10 * STEPS),),
)
