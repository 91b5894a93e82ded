"""What callbacks tell a strategy whose workers train apart: what differs between them, and what becomes of it."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_in_pairs import ROWS, TEACHER_STEPS
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_stable.callbacks import (
    EMA,
    EWC,
    LAE,
    MESA,
    SAF,
    SAM,
    BalancedEMA,
    L2Anchor,
    LwF,
    OrthoGrad,
    RefreshLearning,
    Replay,
    SoftmaxCollapseMonitor,
    SpikeGuard,
    StabilityGap,
    StableSPAM,
    WarmupStableDecay,
)
from lightning_stable.callbacks._worker_state import mean_over_processes, trains_apart
from lightning_stable.testing.harness import AdamNet, AskAt, Net, Run, Stream, assert_same, fit
from lightning_stable.testing.rows import resolve
from lightning_stable.testing.workers import Pair

STEPS = 8
GUARD: dict[str, Any] = {"watch": "norm", "threshold": 0.5, "window": 6, "warmup_steps": 3}


def run(callback: Callback, seed: int = 0, *others: Callback, **settings: Any) -> Run:
    """Train the same weights on other data."""
    return fit([callback, *others], module=Net(norm=False), train=Stream(seed=seed), max_steps=STEPS, **settings)


def mean(pair: list[Tensor]) -> Tensor:
    return (pair[0].double() + pair[1].double()) / 2


# ---------------------------------------------------------------------------------------------------- averages


LINEAR: dict[str, tuple[Callable[[], Any], float, int]] = {
    # The callback, the share of the old value that it keeps at each step, and the step at which it begins.
    "ema": (lambda: EMA(decay=0.8, finish_with="live"), 0.8, 0),
    "mesa": (lambda: MESA(lam=1e-9, start_epoch=0, decay=0.7), 0.7, 0),
    "lae": (lambda: LAE(["body*", "head*"], decay=0.6, task_steps=[3]), 0.6, 3),
    "l2_anchor": (lambda: L2Anchor(lam=1e-9, task_steps=[5]), 1.0, 5),
    "ewc": (lambda: EWC(lam=1e-9, samples=2, task_steps=[5]), 1.0, 5),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_of_what_workers_keep_is_what_follows_from_their_mean_weights(name: str) -> None:
    make, kept, begin = LINEAR[name]
    workers = [(callback := make(), run(callback, seed)) for seed in (0, 1)]
    found = [mean(list(pair)) for pair in zip(*(callback.worker_tensors() for callback, _ in workers), strict=True)]

    runs = [done.steps for _, done in workers]
    names = list(runs[0][0].before)
    expected = [mean([steps[begin].before[each] for steps in runs]) for each in names]
    for number in range(begin, STEPS):
        now = [mean([steps[number].weights[each] for steps in runs]) for each in names]
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, now, strict=True)]
    assert_same(found, expected, f"the mean of what {name} keeps", 1e-6)
    assert float((workers[0][0].worker_tensors()[0] - workers[1][0].worker_tensors()[0]).abs().max()) > 1e-4


@pytest.mark.parametrize("callback", [EMA(buffers="average"), BalancedEMA(), MESA(start_epoch=0)])
def test_what_is_put_into_the_tensors_is_what_the_callback_goes_on_with(callback: Any) -> None:
    seen: list[Any] = []

    def put(plugin: Any) -> None:
        for tensor in plugin.worker_tensors():
            assert tensor.is_floating_point()
            tensor.fill_(0.125)
        seen.append(copy.deepcopy(plugin.state_dict()))

    run(callback, 0, AskAt(5, callback, put))
    values = [value for value in _tensors(seen[0]) if value.is_floating_point()]
    assert callback.worker_tensors()
    assert sum(bool((value == 0.125).all()) for value in values) == len(callback.worker_tensors())


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [found for part in parts for found in _tensors(part)]


def test_a_balanced_average_takes_the_gradients_along_that_its_next_coefficients_come_from() -> None:
    callback = BalancedEMA()
    done = run(callback)
    shadow, gradients = len(callback.averaged()), len(list(done.module.parameters()))
    assert len(callback.worker_tensors()) == shadow + gradients


def test_nothing_is_shared_before_there_is_anything() -> None:
    for callback in (EMA(), BalancedEMA(), MESA(), LAE(["*"]), L2Anchor(), EWC(), StableSPAM()):
        assert callback.worker_tensors() == []


class _Asks(Callback):
    """Notes at each of these hooks whether the live weights are elsewhere."""

    def __init__(self, average: EMA) -> None:
        self.average = average
        self.found: dict[str, bool] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        self.found["training"] = self.average.holds_live_weights

    def on_validation_batch_start(self, *args: Any) -> None:
        self.found["validation"] = self.average.holds_live_weights

    def on_validation_end(self, *args: Any) -> None:
        self.found["end of validation"] = self.average.holds_live_weights

    def on_train_end(self, *args: Any) -> None:
        self.found["end of training"] = self.average.holds_live_weights


def test_an_average_says_when_the_module_runs_with_it() -> None:
    average = EMA(decay=0.5)
    asks = _Asks(average)
    run(average, 0, asks, validation=Stream(2, seed=5))
    expected = {"training": False, "validation": True, "end of validation": False, "end of training": True}
    assert asks.found == expected


# ---------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpikeGuard(**GUARD),
        lambda: StableSPAM(reset_every_n_steps=3),
        lambda: SAM(variant="looksam", interval=3),
    ],
)
def test_a_state_that_is_loaded_in_the_middle_of_a_fit_holds_at_once(make: Callable[[], Any]) -> None:
    other, callback = make(), make()
    run(other, 1)
    other_state = other.state_dict()
    seen: list[dict[str, Any]] = []

    def load(plugin: Any) -> None:
        assert plugin.state_dict() is not other_state
        plugin.load_state_dict(other_state)
        seen.append(copy.deepcopy(plugin.state_dict()))

    assert callback.takes_state_of_rank_zero
    run(callback, 0, AskAt(5, callback, load))
    assert_same(seen[0], other_state, "the state after it was loaded")


@pytest.mark.parametrize("fails", [False, True])
def test_a_state_that_is_loaded_after_a_fit_waits_for_the_next(fails: bool) -> None:
    callback, other = SpikeGuard(**GUARD), SpikeGuard(**GUARD)
    module = Net()
    if fails:
        module.fail_at = ("train", 3)
        with pytest.raises(RuntimeError, match="deliberate"):
            fit([callback], module=module, max_steps=STEPS)
    else:
        fit([callback], module=module, max_steps=STEPS)
    run(other, 1)
    before = callback.state_dict()
    callback.load_state_dict(other.state_dict())
    assert_same(callback.state_dict(), before, "the state between two fits")


def test_the_averages_of_stable_spam_are_shared_and_its_counts_are_those_of_rank_zero() -> None:
    callback = StableSPAM(reset_every_n_steps=None)
    fit([callback], module=AdamNet(), max_steps=3)
    (saved,) = callback.state_dict()["optimizers"].values()
    floating = [value for value in saved.values() if isinstance(value, Tensor) and value.is_floating_point()]
    assert [id(tensor) for tensor in callback.worker_tensors()] == [id(value) for value in floating]
    assert len(floating) == 3


@pytest.mark.parametrize(
    "callback", [SAF, OrthoGrad, SoftmaxCollapseMonitor, WarmupStableDecay, StabilityGap, Replay, LwF, RefreshLearning]
)
def test_callbacks_that_are_alike_in_all_processes_say_nothing(callback: type) -> None:
    assert not hasattr(callback, "worker_tensors")
    assert not hasattr(callback, "takes_state_of_rank_zero")
    assert not hasattr(callback, "holds_live_weights")


# ---------------------------------------------------------------------------------------------------- two processes


class _Alone(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = [torch.ones(2)]
        assert mean_over_processes(trainer, values)[0] is values[0]
        assert not trains_apart(trainer)


def test_one_process_exchanges_nothing() -> None:
    run(_Alone())


@pytest.mark.parametrize("setting", ROWS)
def test_further_settings_resume_exactly(setting: str, workers: Pair, tmp_path: Path) -> None:
    workers.run(
        "lightning_stable.testing.strategy_checks:job",
        check="check_company",
        find=partial(resolve, "contract.settings:BY_NAME[local_sgd]"),
        folder=str(tmp_path),
        arguments={"other": partial(resolve, f"callbacks_in_pairs:ROWS[{setting}]")},
    )


def test_a_teacher_is_the_mean_of_the_workers_models(workers: Pair) -> None:
    for found in workers.run("callbacks_in_pairs:teach"):
        assert_same(found["teacher"], found["mean"], f"the teacher after {TEACHER_STEPS} steps", 1e-6)
        assert_same(found["teacher"], found["teacher of rank 0"], "the teacher of a rank")
        assert found["apart"] > 1e-4


@pytest.mark.parametrize(
    ("job", "names"),
    [
        ("rewind", ("SpikeGuard", "LocalSGDStrategy")),
        ("reset", ("StableSPAM", "OneBitAdamStrategy")),
        ("average", ("BalancedEMA", "OneBitAdamStrategy")),
    ],
)
def test_what_cannot_be_is_said_with_both_names(job: str, names: tuple[str, str], workers: Pair) -> None:
    for message in workers.run(f"callbacks_in_pairs:{job}"):
        assert all(name in message for name in names), message
