"""The oracles of the metrics: the brute-force twins, over scores that are computed again from the recorded steps."""

import math
from typing import Any

import pytest
from oracles import continual_twin
from oracles.replay import Replay

from lightning_stable.metrics import ContinualMetrics
from lightning_stable.testing.feeding import Feeder, scores
from lightning_stable.testing.harness import Run, fit
from lightning_stable.testing.rows import STEPS
from lightning_stable.testing.streams import Stream

# Windows that are shorter than the run, and shares of a fall that it makes up for.
CONTINUAL: dict[str, Any] = {"windows": (2, 5), "curve_steps": 3, "recovery_share": 0.25}


def continual(run: Run, metric: ContinualMetrics) -> None:
    lower = {**CONTINUAL, "windows": (3,), "higher_is_better": False, "baseline": 2.0}
    runs = [(CONTINUAL, run), (lower, _again(run, lower)), (CONTINUAL, _again(run, CONTINUAL, bf16=True))]
    for settings, done in runs:
        feeder = _feeder(done)
        if done.trainer.precision != "bf16-true":
            _assert_scores(done, feeder)
        assert sorted(feeder.said) == list(range(1, STEPS + 1)), "the metric was not asked after each step"
        for step, said in feeder.said.items():
            expected = continual_twin.continual(_told_until(feeder, step), **settings)
            assert said == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), f"after step {step} of {settings}"
        assert not any(math.isnan(value) for value in feeder.said[STEPS].values()), "a value was never defined"
        logged = {step: entry for step, entry in done.logged if any(name.startswith("continual/") for name in entry)}
        found = [value for name, value in logged[STEPS - 1].items() if name.startswith("continual/")]
        assert found == pytest.approx([*feeder.said[STEPS].values()]), "it logged something else than it said"


def _again(run: Run, settings: dict[str, Any], bf16: bool = False) -> Run:
    """Fit once more with a metric under the accumulation, the clipping and the precision of a run."""
    return fit(
        [ContinualMetrics(**settings)],
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        accumulate_grad_batches=run.trainer.accumulate_grad_batches,
        gradient_clip_val=run.trainer.gradient_clip_val,
        precision="bf16-true" if bf16 else run.trainer.precision,
    )


def _feeder(run: Run) -> Feeder:
    (feeder,) = [callback for callback in run.trainer.callbacks if isinstance(callback, Feeder)]
    return feeder


def _told_until(feeder: Feeder, step: int) -> list[tuple[Any, ...]]:
    """Return the history up to the last evaluation after this optimizer step."""
    last = max(n for n, event in enumerate(feeder.events) if event[0] == "scores" and event[-1] <= step)
    return feeder.events[: last + 1]


def _assert_scores(run: Run, feeder: Feeder) -> None:
    """Fail unless what the metric was told are the scores of the recorded weights."""
    told = [event for event in feeder.events if event[0] == "scores"]
    tolerance = 2e-2 if run.trainer.precision == "bf16-mixed" else 1e-4
    for replayed in Replay(run):
        replayed.pass_on()
        buffers = {name: buffer.clone() for name, buffer in replayed.module.named_buffers()}
        replayed.module.load_state_dict({**replayed.step.weights, **buffers})
        for _, found, _, _ in [event for event in told if event[-1] == replayed.number + 1]:
            expected = scores(replayed.module, range(3), replayed.number + 1)
            for task, score in found.items():
                assert score == pytest.approx(expected[task], rel=tolerance), f"task {task}, step {replayed.number}"
