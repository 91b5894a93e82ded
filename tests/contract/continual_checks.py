"""The oracles of the rows of continual learning: what each method should have done when the task changed in a run.

Three tasks in one stream, whose samples are the same: what matters here is what a plugin does at a switch and after it.
What watches and changes nothing is in ``gap_checks.py``.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract.oracle_checks import _again, _assert_gradients, _assert_term_is_logged, _differs, _logged
from oracles.anchor_twin import AnchorTwin, LwFTwin, fisher
from oracles.lae_twin import LAETwin
from oracles.refresh_twin import accumulated, ascended, refreshed
from oracles.rehearsal_twin import NotingNet, Past, same, samples
from oracles.replay import Replay as Again
from oracles.replay import ReplayedStep
from torch import Tensor

from lightning_stable.callbacks import EWC, LAE, L2Anchor, LwF, RefreshLearning, Replay
from lightning_stable.testing.harness import Net, Run, assert_same
from lightning_stable.testing.rows import STEPS
from lightning_stable.testing.streams import BATCH_SIZE, BATCHES, FEATURES, Stream

Named = dict[str, Tensor]
Batch = tuple[Tensor, ...]

# The steps after which tasks 1 and 2 begin: the checkpoints of the resume contract lie between them and after both.
TASK_STEPS = [5, 9]
SWITCHES = [0, *TASK_STEPS]
# After the end of every run: tasks that never come.
NEVER = [10 * STEPS]


def task_of(step: int) -> int:
    return sum(step >= first for first in TASK_STEPS)


def _buffers(replayed: ReplayedStep) -> Named:
    """Return the module's buffers; asked first, those that the step found."""
    return {name: buffer.clone() for name, buffer in replayed.module.named_buffers()}


def joined(batches: list[Batch]) -> Batch:
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


# ---------------------------------------------------------------------------------------------------- near the last end

# Weights large enough to be seen within a few steps, small enough for SGD with momentum to stay calm.
L2: dict[str, Any] = {"lam": 5.0, "task_steps": TASK_STEPS}
ELASTIC: dict[str, Any] = {"lam": 2.0, "decay": 0.5, "task_steps": TASK_STEPS}


def l2_anchor(run: Run, plugin: L2Anchor) -> None:
    done = _again(run, L2Anchor(**L2, log_every_n_steps=1))
    assert_same(done.module.state_dict(), run.module.state_dict(), "logged at every step against hardly ever")
    twin, penalties, visible = AnchorTwin(L2["lam"]), {}, 0
    for replayed in Again(done):
        if replayed.number in TASK_STEPS:
            twin.end_task(replayed.step.before)
        penalties[replayed.number] = twin.penalty(replayed.step.before)
        expected = twin.gradient(replayed.gradients(), replayed.step.before)
        visible += _differs(replayed, expected)
        _assert_gradients(replayed, expected, "L2Anchor")
    _assert_penalties(done, "l2_anchor/penalty", penalties)
    assert visible >= 3, "the twin hardly differs from plain training"


def ewc(run: Run, plugin: EWC) -> None:
    # The other one pulls harder than every module of the contracts can stand.
    strong = {**ELASTIC, "lam": 20.0, "decay": 1.0, "log_every_n_steps": 1}
    visible = 0
    for settings, done in [(ELASTIC, run), (strong, _again(run, EWC(**strong)))]:
        twin, seen, penalties = AnchorTwin(settings["lam"], settings["decay"]), [], {}
        for replayed in Again(done):
            if replayed.number in TASK_STEPS:
                # Every sample of the task fits: whatever is drawn, it is all of them.
                importance = fisher(replayed.step.before, _buffers(replayed), joined(seen))
                twin.end_task(replayed.step.before, importance)
                seen = []
            penalties[replayed.number] = twin.penalty(replayed.step.before)
            expected = twin.gradient(replayed.gradients(), replayed.step.before)
            visible += _differs(replayed, expected)
            _assert_gradients(replayed, expected, f"EWC with {settings}", exact=5e-5)
            seen += replayed.batches
    _assert_penalties(done, "ewc/penalty", penalties)
    assert visible >= 3, "the twin hardly differs from plain training"


def _assert_penalties(run: Run, name: str, penalties: dict[int, float]) -> None:
    """Fail unless the penalty of each step is logged from the first switch on."""
    found = {step: entry[name] for step, entry in run.logged if name in entry}
    assert set(range(TASK_STEPS[0], STEPS)) <= found.keys(), f"{name} was logged at {sorted(found)}"
    tolerance = 2e-2 if run.trainer.precision == "bf16-mixed" else 1e-4
    assert found == pytest.approx({step: penalties[step] for step in found}, rel=tolerance, abs=1e-7), name


DISTILLED: dict[str, Any] = {"lam": 20.0, "temperature": 2.0, "task_steps": TASK_STEPS}


def lwf(run: Run, plugin: LwF) -> None:
    other = {**DISTILLED, "temperature": 1.0, "logits": "head"}
    for settings, done in [(DISTILLED, run), (other, _again(run, LwF(**other)))]:
        twin, terms, visible = LwFTwin(settings["lam"], settings["temperature"]), {}, 0

        def term(replayed: ReplayedStep, index: int, twin: LwFTwin = twin, terms: dict[int, float] = terms) -> Tensor:
            found = twin.term(replayed.module, replayed.replay.stream.batch(index)[0])
            terms[replayed.number] = float(found.detach())
            return found

        for replayed in Again(done):
            if replayed.number in TASK_STEPS:
                twin.end_task(replayed.step.before, _buffers(replayed))
            expected = replayed.gradients(term=term)
            visible += _differs(replayed, expected)
            _assert_gradients(replayed, expected, f"LwF with {settings}", exact=5e-5)
        _assert_term_is_logged(done, "lwf_loss", terms)
        assert visible >= 2, f"{settings}: the twin hardly differs from plain training"


# ---------------------------------------------------------------------------------------------------- rehearsal

REHEARSED: dict[str, Any] = {
    "policy": "reservoir",
    "capacity": 12,
    "batch_size": 4,
    "weight": 0.4,
    "task_steps": TASK_STEPS,
}


def replay(run: Run, plugin: Replay) -> None:
    power = {**REHEARSED, "policy": "power_law", "exponent": 0.5}
    for settings, plain in [(REHEARSED, run), (power, _again(run, Replay(**power)))]:
        done = _again(run, Replay(**settings), NotingNet())
        assert_same(done.module.state_dict(), plain.module.state_dict(), "a module that notes its batches")
        _assert_rehearses(done, settings)


def _assert_rehearses(run: Run, settings: dict[str, Any]) -> None:
    """Fail unless each step's gradient is that of the new and of past samples, as they were given to the module."""
    past, visible, drawn = Past(), 0, []
    first_task = 1 if settings["policy"] == "power_law" else 0
    for step in Again(run):
        given, task = run.module.given(step.number), task_of(step.number)
        expected: Named = {}
        for batch in step.batches:
            # A small batch is one from the memory, which may come before or after the new one that it goes with.
            old = _take(given, settings["batch_size"]) if past.tasks and task >= first_task else None
            assert same(_take(given, BATCH_SIZE), batch), "the new batch is another one"
            if old is not None:
                earlier = [past.tasks.get(sample, {STEPS}) for sample in samples(old)]
                assert all(min(tasks) <= task - first_task for tasks in earlier), "what is replayed is not of the past"
                drawn += samples(old)
            share, w = 1 / step.replay.accumulate, settings["weight"]
            parts = [(share, batch)] if old is None else [(w * share, batch), ((1 - w) * share, old)]
            for name, value in _gradient(step, step.step.before, parts).items():
                expected[name] = expected.get(name, 0.0) + value
            past.add(batch, task)
        assert not given, f"{len(given)} further passes were made in step {step.number}"
        visible += _differs(step, expected)
        _assert_gradients(step, expected, f"Replay with {settings}", exact=5e-5)
    assert visible >= 3, f"{settings}: the twin hardly differs from plain training"
    assert len(set(drawn)) > settings["batch_size"], "always the same samples"
    _assert_keeps(run.plugins[0], past, settings["capacity"])


def _take(given: list[Batch], size: int) -> Batch:
    """Take out the first batch of a size."""
    found = [place for place, batch in enumerate(given) if len(batch[0]) == size]
    assert found, f"no batch of {size} samples was given"
    return given.pop(found[0])


def _assert_keeps(plugin: Replay, past: Past, capacity: int) -> None:
    """Fail unless what the plugin saves is as many whole samples of the past as fit."""
    found = list(_tensors(plugin.state_dict()))
    inputs = [tensor for tensor in found if tensor.shape[1:] == (FEATURES,)]
    targets = [tensor for tensor in found if tensor.shape[1:] == (1,)]
    assert [len(tensor) for tensor in inputs] == [len(tensor) for tensor in targets] == [capacity]
    assert all(sample in past.tasks for sample in samples((inputs[0], targets[0]))), "what is kept was never trained on"


def _tensors(state: Any) -> Iterator[Tensor]:
    """Yield every tensor with several dimensions within a state."""
    if isinstance(state, Tensor) and state.ndim > 1:
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def _gradient(step: ReplayedStep, weights: Named, parts: list[tuple[float, Batch]]) -> Named:
    """Return the gradient of a weighted sum of batches' losses in training mode, under the run's precision."""
    module = Net()
    module.load_state_dict({**module.state_dict(), **weights})
    with step.replay.precision():
        loss = sum(weight * module.loss(batch) for weight, batch in parts)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# -------------------------------------------------------------------------------------------------- two sets of weights

ACCUMULATED: dict[str, Any] = {
    # The body of one module, the layer of another.
    "parameters": ["*y*"],
    "decay": 0.7,
    "calibration_steps": 2,
    "task_steps": TASK_STEPS,
}


def lae(run: Run, plugin: LAE) -> None:
    twin, again, losses = LAETwin(ACCUMULATED["decay"], prefix="body."), Again(run), []
    epoch = -(-BATCHES // again.accumulate)
    held_out = Stream(2, seed=5)
    for replayed in again:
        step = replayed.step
        if replayed.number and replayed.number % epoch == 0:
            losses.append(_mean_loss(twin, step.before, _buffers(replayed), held_out))
        if replayed.number in TASK_STEPS:
            twin.end_task(step.before)
        still = any(0 <= replayed.number - first < ACCUMULATED["calibration_steps"] for first in TASK_STEPS)
        expected = {
            name: value for name, value in replayed.gradients().items() if not (still and name.startswith("body."))
        }
        _assert_gradients(replayed, expected, "LAE")
        for name, value in step.before.items():
            # A bias in front of batch norm has no gradient but rounding.
            moved = not torch.equal(value, step.weights[name])
            assert moved is (name in expected) or name == "body.0.bias", (
                f"step {replayed.number}: {name} moved: {moved}"
            )
        twin.update(step.weights)
    if STEPS % epoch == 0:
        losses.append(_mean_loss(twin, run.steps[-1].weights, dict(again.module.named_buffers()), held_out))
    assert _logged(run, "val_loss") == pytest.approx(losses, rel=2e-2 if again.bf16 else 1e-4)
    assert_same({n: v.double() for n, v in plugin.offline.items()}, twin.offline, "the offline copy", tolerance=1e-5)


def _mean_loss(twin: LAETwin, weights: Named, buffers: Named, stream: Stream) -> float:
    return sum(twin.loss(weights, buffers, stream.batch(number)) for number in range(2)) / 2


# ---------------------------------------------------------------------------------------------------- unlearning

# No noise, whose draws are the plugin's own: steps without it are the twin's to the last digits.
REFRESHED: dict[str, Any] = {
    "strength": 0.05,
    "noise": 0.0,
    "damping": 20.0,
    "decay": 0.5,
    "task_steps": TASK_STEPS,
}


def refresh_learning(run: Run, plugin: RefreshLearning) -> None:
    twice = {**REFRESHED, "unlearn_steps": 2, "learning_rate": 0.1}
    noisy = {**REFRESHED, "noise": 0.3, "damping": 0.0}
    for settings, done in [(REFRESHED, run), *((one, _again(run, RefreshLearning(**one))) for one in (twice, noisy))]:
        weights = {name: parameter.detach() for name, parameter in Net().named_parameters()}
        importance, seen, noise = None, [], []
        ascent = (settings.get("unlearn_steps", 1), settings.get("learning_rate", 0.01))
        for replayed in Again(done):
            if replayed.number in TASK_STEPS:
                of_task = fisher(weights, _buffers(replayed), joined(seen), weighted=True)
                importance, seen = accumulated(importance, of_task, settings["decay"]), []

            def gradient_at(there: Named, replayed: ReplayedStep = replayed) -> Named:
                return _gradient(replayed, there, [(1.0, replayed.batches[0])])

            walked = ascended(weights, gradient_at, *ascent)
            expected = refreshed(weights, walked, settings["strength"], settings["damping"], importance)
            away = {name: replayed.step.before[name].double() - value for name, value in expected.items()}
            # A bias in front of batch norm has no gradient but rounding: where that points to is anybody's guess.
            del away["body.0.bias"]
            if settings["noise"]:
                noise += [value.flatten() / settings["strength"] / settings["noise"] for value in away.values()]
            else:
                for name, value in away.items():
                    moved = float((expected[name] - weights[name]).norm())
                    allowed = (2e-2 if replayed.replay.bf16 else 2e-4) * moved
                    assert float(value.norm()) <= allowed, f"{settings}, step {replayed.number}: {name} is elsewhere"
            # Then the step is taken where the weights are now.
            _assert_gradients(replayed, replayed.gradients(), f"RefreshLearning with {settings}")
            weights, seen = replayed.step.weights, [*seen, *replayed.batches]
        if noise:
            drawn = torch.cat(noise)
            assert abs(float(drawn.mean())) < 4 / len(drawn) ** 0.5
            assert float(drawn.std()) == pytest.approx(1.0, abs=4 / len(drawn) ** 0.5)
            assert len(drawn.unique()) > 0.9 * len(drawn), "the same noise again and again"
