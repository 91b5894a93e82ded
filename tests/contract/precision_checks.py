"""The row of the simulated precision, and its oracle: the products by hand, with every value looked up on its grid."""

from typing import Any

import torch
from contract.oracle_checks import _assert_gradients
from oracles.replay import Replay
from oracles.simulated_twin import linear
from torch import nn

from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import Run, fit
from lightning_stable.testing.rows import STEPS, PrecisionSettings, Settings
from lightning_stable.testing.streams import Stream

# Scales that do not depend on how samples are divided among processes, and steps so small that what rounding does to
# the last digit of a float stays small.
SIMULATED: dict[str, Any] = {
    "weights": "int8",
    "activations": "int8",
    "gradients": "int8",
    "scaling": "row",
    "exclude": (),
}


def simulated(run: Run, plugin: SimulatedPrecision) -> None:
    coarse = {**SIMULATED, "weights": "e2m1", "activations": "int4", "gradients": "e5m2", "weight_scaling": "group:4"}
    for settings, done in [(SIMULATED, run), (coarse, _again(run, SimulatedPrecision(**coarse, compute=_of(run))))]:
        scaling = settings["scaling"]
        recipes = (
            (settings["weights"], settings.get("weight_scaling", scaling)),
            (settings["activations"], scaling),
            (settings["gradients"], scaling),
        )
        replay, visible = Replay(done), 0
        layers = [part for part in replay.module.modules() if isinstance(part, nn.Linear)]
        plain = {layer: layer.forward for layer in layers}
        for replayed in replay:
            _use(plain)
            raw = replayed.gradients()
            # Statistics of batches, too, go on as with quantized products.
            _use({layer: linear(layer, recipes) for layer in layers})
            expected = replayed.gradients()
            _assert_gradients(replayed, expected, f"SimulatedPrecision with {settings}", exact=1e-4)
            visible += any(not torch.allclose(raw[name], expected[name], rtol=1e-3) for name in raw)
        assert visible == STEPS, f"SimulatedPrecision with {settings}: the twin computes as without quantization"


def _use(forwards: dict[nn.Module, Any]) -> None:
    for layer, forward in forwards.items():
        layer.forward = forward


def _of(run: Run) -> str:
    return str(run.trainer.precision)


def _again(run: Run, plugin: Any) -> Run:
    return fit(
        [plugin],
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        accumulate_grad_batches=run.trainer.accumulate_grad_batches,
        gradient_clip_val=run.trainer.gradient_clip_val,
    )


SETTINGS: dict[str, Settings] = {
    "simulated": PrecisionSettings(
        make=lambda: SimulatedPrecision(**SIMULATED),
        under=lambda compute: SimulatedPrecision(**SIMULATED, compute=compute),
        oracle=simulated,
        identities=(lambda: SimulatedPrecision(weights=None, activations=None, gradients=None, exclude=()),),
    ),
}
