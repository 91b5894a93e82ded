"""The row of StabilityReport: losses, norms and rates of each step, from the steps that the module has recorded."""

import math
from typing import Any

import pytest
from oracles.replay import Replay
from oracles.report_twin import spikes

from lightning_stable.callbacks.stability_report import StabilityReport
from lightning_stable.testing.harness import Run
from lightning_stable.testing.rows import STEPS, Settings

REPORT: dict[str, Any] = {"every_n_steps": 3, "spike_threshold": 0.5, "spike_window": 4}


def stability_report(run: Run, plugin: StabilityReport) -> None:
    record, again = plugin.record(), Replay(run)
    series = record["series"]
    assert series["step"] == list(range(1, STEPS + 1))
    assert series["optimizer"] == [0] * STEPS
    assert series["lr"] == [step.rates for step in run.steps]
    assert all(later > earlier for earlier, later in zip(series["seconds"], series["seconds"][1:], strict=False))
    losses, norms = [], []
    for replayed in again:
        found = replayed.losses()
        losses.append(sum(found) / len(found))
        gradients = replayed.gradients().values()
        norms.append(math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)))
    close = {"rel": 2e-2} if again.bf16 else {"rel": 2e-4}
    assert series["loss"] == pytest.approx(losses, **close), "the losses are not those of the batches"
    assert series["gradient_norm"] == pytest.approx(norms, **close), "the norms are not those of the gradients"
    for name, gained in (("loss", 0.05), ("gradient_norm", 0.0)):
        points = list(zip(series["step"], series[name], strict=True))
        expected = spikes(points, REPORT["spike_threshold"], REPORT["spike_window"], gained)
        found = {step: limit for step, _, limit in record["spikes"][name]}
        assert found == pytest.approx(dict(expected)), f"the spikes of the {name} are not the twin's"
    name = "stability_report/gradient_norm"
    logged = {step: entry[name] for step, entry in run.logged if name in entry}
    assert logged == {step: series["gradient_norm"][step] for step in range(2, STEPS, 3)}


SETTINGS = Settings(
    make=lambda: StabilityReport(**REPORT),
    oracle=stability_report,
    identities=(lambda: StabilityReport(**REPORT),),
    observer=True,
)
