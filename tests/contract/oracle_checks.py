"""What each method should have done, recomputed from the recorded steps by the twins: the oracles of the rows.

An oracle is given a run under the row's own settings; where a method has variants it makes further runs under the same
accumulation, clipping and precision.
"""

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from oracles.averaging_twin import BalancedAverage, ema
from oracles.replay import Replay, ReplayedStep
from oracles.sam_twin import SAMTwin
from oracles.spike_twin import SpikeTwin
from oracles.stable_spam_twin import Adam, Momentum, StableSPAMTwin, resets_before, shrunk
from oracles.trajectory_twin import MESATwin, SAFTwin
from oracles.wsd_twin import curve
from torch import Tensor

from lightning_stable.callbacks import (
    EMA,
    MESA,
    SAF,
    SAM,
    BalancedEMA,
    OrthoGrad,
    SoftmaxCollapseMonitor,
    SpikeGuard,
    StableSPAM,
    WarmupStableDecay,
)
from lightning_stable.testing.harness import AdamNet, Net, Run, assert_same, fit
from lightning_stable.testing.rows import STEPS
from lightning_stable.testing.streams import BATCH_SIZE, Stream

Named = dict[str, Tensor]


def _flat(weights: Named) -> list[list[float]]:
    return [value.double().flatten().tolist() for value in weights.values()]


def _again(run: Run, plugin: Any, module: LightningModule | None = None) -> Run:
    """Fit once more under the accumulation, the clipping and the precision of a run."""
    return fit(
        [plugin],
        module=module,
        validation=Stream(2, seed=5),
        max_steps=STEPS,
        accumulate_grad_batches=run.trainer.accumulate_grad_batches,
        gradient_clip_val=run.trainer.gradient_clip_val,
        precision=run.trainer.precision,
    )


def _logged(run: Run, name: str) -> list[float]:
    return [entry[name] for _, entry in run.logged if name in entry]


# ---------------------------------------------------------------------------------------------------- weights and rates


def _assert_module_is(run: Run, expected: list[list[float]], what: str) -> None:
    for (name, value), twin in zip(run.module.named_parameters(), expected, strict=True):
        found = value.detach().double().flatten().tolist()
        assert found == pytest.approx(twin, rel=1e-4, abs=1e-6), f"{what}: {name} is not what the twin says"


WSD: dict[str, Any] = {"warmup": 2, "decay": 3, "shape": "inverse", "min_ratio": 0.1, "budgets": [6, 10]}


def wsd(run: Run, plugin: WarmupStableDecay) -> None:
    factors = curve(STEPS, STEPS, WSD["warmup"], WSD["decay"], WSD["shape"], WSD["min_ratio"], WSD["budgets"])
    for step, factor in zip(run.steps, factors, strict=True):
        assert step.rates == pytest.approx([peak * factor for peak in run.module.rates], rel=1e-9)


def averaged(run: Run, plugin: EMA) -> None:
    # Begins after step 3, then every second step; the module ends on the average.
    history = [run.steps[2].weights, *(run.steps[step - 1].weights for step in range(4, STEPS + 1, 2))]
    _assert_module_is(run, ema([_flat(weights) for weights in history], 0.8, "power"), "EMA")
    assert plugin.updates == len(history) - 1


def balanced(run: Run, plugin: BalancedEMA) -> None:
    twin = BalancedAverage(_flat(run.steps[0].before), form="derived", fallback=0.7)
    for step in run.steps:
        twin.update(_flat(step.weights), _flat(step.before), _flat(step.gradients))
    _assert_module_is(run, twin.shadow, "BalancedEMA")


# ---------------------------------------------------------------------------------------------------- gradients


def _assert_gradients(replayed: ReplayedStep, expected: Named, what: str, exact: float = 1e-5) -> None:
    """Compare what the optimizer was about to see with the twin's gradients, relative to the norm of each tensor."""
    found = replayed.step.gradients
    assert found.keys() == expected.keys(), f"{what}, step {replayed.number}: gradients of {sorted(found)}"
    whole = math.sqrt(sum(float(value.double().square().sum()) for value in expected.values()))
    tolerance = max(exact, 5e-3) if replayed.replay.bf16 else exact
    for name, value in expected.items():
        distance = float((found[name].double() - value.double()).norm())
        # A share of the whole gradient, too: what is zero but for rounding has no digits to compare.
        allowed = tolerance * (float(value.double().norm()) + 0.1 * whole)
        assert distance <= allowed, f"{what}, step {replayed.number}: {name} is off by {distance:.3g} of {whole:.3g}"


def _differs(replayed: ReplayedStep, gradients: Named) -> bool:
    """Tell whether these gradients are visibly others than the raw ones."""
    raw = replayed.gradients()
    whole = math.sqrt(sum(float(value.double().square().sum()) for value in raw.values()))
    away = math.sqrt(sum(float((raw[name] - value).double().square().sum()) for name, value in gradients.items()))
    return away > 0.05 * whole


SHARP: dict[str, Any] = {"rho": 0.3, "interval": 2, "start_step": 1}


def sam(run: Run, plugin: SAM) -> None:
    others: list[dict[str, Any]] = [
        {"rho": 1.0, "adaptive": True},
        {"rho": 0.3, "variant": "gsam", "alpha": 0.5},
        {"rho": 0.3, "variant": "looksam", "interval": 3, "alpha": 0.6, "start_step": 1},
    ]
    for settings, done in [(SHARP, run), *((settings, _again(run, SAM(**settings))) for settings in others)]:
        twin, visible = SAMTwin(**settings), 0
        for replayed in Replay(done):
            expected = twin.gradient(replayed.number, replayed.step.before, replayed.gradients)
            visible += _differs(replayed, expected)
            _assert_gradients(replayed, expected, f"SAM with {settings}", exact=5e-5)
        assert visible >= 5, f"SAM with {settings}: the twin hardly differs from plain training"


# A large weight, since predictions hardly change over these few steps.
TRAJECTORY: dict[str, Any] = {"lam": 50.0, "temperature": 2.0, "start_epoch": 1}
SAF_SETTINGS: dict[str, Any] = {**TRAJECTORY, "lag_epochs": 1, "store_dtype": "float32"}
# From the first epoch on, since a stream without a length is one epoch.
MESA_SETTINGS: dict[str, Any] = {**TRAJECTORY, "lam": 5.0, "start_epoch": 0, "decay": 0.5}


def saf(run: Run, plugin: SAF) -> None:
    others: list[dict[str, Any]] = [
        {**SAF_SETTINGS, "start_epoch": 2, "lag_epochs": 2},
        {**SAF_SETTINGS, "start_epoch": 2, "logits": "head", "top_k": 1},
        {**SAF_SETTINGS, "store_dtype": "float16"},
    ]
    for settings, done in [(SAF_SETTINGS, run), *((settings, _again(run, SAF(**settings))) for settings in others)]:
        own = {name: value for name, value in settings.items() if name not in ("store_dtype", "logits")}
        twin, terms = SAFTwin(**own), {}
        visible, half = 0, settings["store_dtype"] == "float16"

        def term(replayed: ReplayedStep, index: int, twin: SAFTwin = twin, terms: dict[int, float] = terms) -> Tensor:
            samples = list(range(BATCH_SIZE * index, BATCH_SIZE * (index + 1)))
            found = twin.term(replayed.module.logits, samples, replayed.epoch)
            twin.record(replayed.module.logits, samples, replayed.epoch)
            terms[replayed.number] = float(found.detach())
            return found

        for replayed in Replay(done):
            expected = replayed.gradients(term=term)
            visible += _differs(replayed, expected)
            _assert_gradients(replayed, expected, f"SAF with {settings}", exact=5e-2 if half else 5e-5)
        _assert_term_is_logged(done, "saf_loss", terms, rough=half)
        assert visible >= 2, f"{settings}: the twin hardly differs from plain training"


def mesa(run: Run, plugin: MESA) -> None:
    other = {**MESA_SETTINGS, "start_epoch": 1, "decay": 0.9, "logits": "head"}
    for settings, done in [(MESA_SETTINGS, run), (other, _again(run, MESA(**other)))]:
        own = {name: value for name, value in settings.items() if name != "logits"}
        twin, terms, visible = MESATwin(done.steps[0].before, **own), {}, 0

        def term(replayed: ReplayedStep, index: int, twin: MESATwin = twin, terms: dict[int, float] = terms) -> Tensor:
            found = twin.term(replayed.module, replayed.replay.stream.batch(index)[0], replayed.epoch)
            terms[replayed.number] = float(found.detach())
            return found

        for replayed in Replay(done):
            expected = replayed.gradients(term=term)
            visible += _differs(replayed, expected)
            _assert_gradients(replayed, expected, f"MESA with {settings}", exact=5e-5)
            twin.update(replayed.step.weights)
        _assert_term_is_logged(done, "mesa_loss", terms)
        assert visible >= 2, f"{settings}: the twin hardly differs from plain training"


def _assert_term_is_logged(run: Run, name: str, terms: dict[int, float], rough: bool = False) -> None:
    """Fail unless the term's weighted value of the last micro-batch is logged for each step that has one."""
    found = {step: entry[name] for step, entry in run.logged if name in entry}
    expected = {step: value for step, value in terms.items() if step in found or value > 0}
    tolerance = 5e-2 if rough or run.trainer.precision == "bf16-mixed" else 2e-3
    # What is left of float32 when two nearly equal distributions are compared, times the weight.
    assert found == pytest.approx(expected, rel=tolerance, abs=5e-5), f"{name} is not what the twin says"


STABLE_SPAM: dict[str, Any] = {"gamma3": 0.9, "reset_every_n_steps": 5, "log_every_n_steps": 1}


def stable_spam(run: Run, plugin: StableSPAM) -> None:
    history: dict[str, Any] = {**STABLE_SPAM, "norm": "history", "gamma1": 0.5}
    shrinking: dict[str, Any] = {**STABLE_SPAM, "total_steps": 10, "final_scale": 0.25}
    runs = [
        (STABLE_SPAM, run),
        (history, _again(run, StableSPAM(**history))),
        ({**STABLE_SPAM, "norm": None}, _again(run, StableSPAM(**{**STABLE_SPAM, "norm": None}))),
        (shrinking, _again(run, StableSPAM(**shrinking), AdamNet())),
    ]
    for settings, done in runs:
        own = {name: value for name, value in settings.items() if name in ("gamma1", "gamma3", "norm")}
        twin = StableSPAMTwin(len(done.steps[0].before), **own)
        descent = _descent(done)
        for replayed in Replay(done):
            scale = shrunk(replayed.number, settings.get("total_steps"), settings.get("final_scale"))
            raw = replayed.gradients()
            changed = twin.transform(_flat(raw), gamma1=settings.get("gamma1", 0.7) * scale)
            expected = {
                name: torch.tensor(values, dtype=torch.float64).reshape(raw[name].shape)
                for name, values in zip(raw, changed, strict=True)
            }
            _assert_gradients(replayed, expected, f"StableSPAM with {settings}")
            if resets_before(replayed.number + 1, settings["reset_every_n_steps"]):
                descent.reset()
            if isinstance(descent, Adam):
                descent.betas = (0.9 * scale, 0.999)
            _assert_step(replayed, descent)


def _descent(run: Run) -> Adam | Momentum:
    """Return a twin of the run's optimizer."""
    weights = run.steps[0].before
    if isinstance(run.module, AdamNet):
        return Adam(_flat(weights), lr=0.01)
    return Momentum(_flat(weights), [run.module.rates[0 if name.startswith("body") else 1] for name in weights])


def _assert_step(replayed: ReplayedStep, descent: Adam | Momentum) -> None:
    """Fail unless the optimizer did with the gradients it was given, clipped, what a twin of it does."""
    given = _flat(replayed.step.gradients)
    limit = replayed.replay.run.trainer.gradient_clip_val
    if limit is not None:
        whole = math.sqrt(sum(value * value for tensor in given for value in tensor))
        given = [[value * min(1.0, limit / (whole + 1e-6)) for value in tensor] for tensor in given]
    descent.weights = _flat(replayed.step.before)
    descent.step(given)
    for (name, value), twin in zip(replayed.step.weights.items(), descent.weights, strict=True):
        found = value.double().flatten().tolist()
        assert found == pytest.approx(twin, rel=1e-5, abs=1e-6), f"step {replayed.number}: {name} moved otherwise"


def orthograd(run: Run, plugin: OrthoGrad) -> None:
    for replayed in Replay(run):
        expected = {}
        for name, gradient in replayed.gradients().items():
            g, w = gradient.double().flatten(), replayed.step.before[name].double().flatten()
            along = (w @ g) / (w @ w) * w if w.any() else torch.zeros_like(w)
            across = g - along
            expected[name] = (across * g.norm() / (across.norm() + 1e-30)).reshape(gradient.shape)
        _assert_gradients(replayed, expected, "OrthoGrad")


# ---------------------------------------------------------------------------------------------------- watching

GUARD: dict[str, Any] = {"watch": "norm", "threshold": 0.5, "window": 6, "warmup_steps": 3}


def spike_guard(run: Run, plugin: SpikeGuard) -> None:
    others: list[dict[str, Any]] = [{**GUARD, "action": "clip"}, {**GUARD, "watch": "loss"}, {**GUARD, "watch": "both"}]
    for settings, done in [(GUARD, run), *((settings, _again(run, SpikeGuard(**settings))) for settings in others)]:
        watched = ("norm", "loss") if settings["watch"] == "both" else (settings["watch"],)
        bands = {
            name: SpikeTwin(settings["threshold"], settings["window"], settings["warmup_steps"]) for name in watched
        }
        descent, spikes = _descent(done), 0
        for replayed in Replay(done):
            raw, losses = replayed.gradients(), replayed.losses()
            norm = math.sqrt(sum(float(value.double().square().sum()) for value in raw.values()))
            values = {"norm": norm, "loss": sum(losses) / replayed.replay.accumulate}
            if not any(bands[name].is_spike(values[name]) for name in watched):
                for name in watched:
                    bands[name].accept(values[name])
                _assert_gradients(replayed, raw, f"SpikeGuard with {settings}")
                _assert_step(replayed, descent)
                continue
            spikes += 1
            if settings.get("action") == "clip":
                limit = bands["norm"].limit()
                bands["norm"].reject(norm, instead=limit)
                smaller = {name: value * (limit / norm) for name, value in raw.items()}
                _assert_gradients(replayed, smaller, f"SpikeGuard with {settings}")
                _assert_step(replayed, descent)
                continue
            for name in watched:
                # A value that is usual itself is left out with its step, and says nothing of another level.
                if bands[name].is_spike(values[name]):
                    bands[name].reject(values[name])
            assert_same(replayed.step.weights, replayed.step.before, f"weights after skipped step {replayed.number}")
        assert spikes, f"SpikeGuard with {settings}: the twin sees no spike"


class SharpNet(Net):
    """Its logits lie so far apart that some samples collapse, and it hardly moves."""

    def __init__(self) -> None:
        super().__init__(rates=(1e-9, 1e-9))
        with torch.no_grad():
            self.head.weight.mul_(50)


MONITOR: dict[str, Any] = {"log_every_n_steps": 2}


def softmax_collapse(run: Run, plugin: SoftmaxCollapseMonitor) -> None:
    for done in (run, _again(run, SoftmaxCollapseMonitor(**MONITOR), SharpNet())):
        shares = []
        for replayed in Replay(done):
            collapsed = [_collapsed(row) for logits in replayed.logits() for row in logits.float()]
            shares.append(sum(collapsed) / len(collapsed))
        assert any(0 < share < 1 for share in shares) or not isinstance(done.module, SharpNet)
        found = {step: entry["softmax_collapse"] for step, entry in done.logged if "softmax_collapse" in entry}
        assert found == pytest.approx({step: shares[step] for step in found}), "the shares are not the twin's"
        assert len(found) == STEPS // 2
    assert all(step.weights.keys() == step.gradients.keys() for step in run.steps)


def _collapsed(logits: Tensor) -> bool:
    largest, total = max(logits.tolist()), torch.zeros(())
    for value in logits:
        total = total + (value - largest).exp()
    return bool(total == 1)
