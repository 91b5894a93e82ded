"""The samples that EWC and RefreshLearning keep of a task, wherever they stand among the callbacks."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gradients import NetWith, Watches, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tasks import STEPS, SWITCHES, loader, sgd
from torch import Tensor

from lightning_stable.callbacks.ewc import EWC
from lightning_stable.callbacks.orthograd import OrthoGrad
from lightning_stable.callbacks.refresh_learning import RefreshLearning
from lightning_stable.callbacks.spike_guard import SpikeGuard
from lightning_stable.testing.harness import Net, SaveAt, assert_same, fit

Keeper = EWC | RefreshLearning
KEEPERS: dict[str, Callable[..., Any]] = {
    "ewc": lambda **settings: EWC(**{"samples": 12, "task_steps": SWITCHES, **settings}),
    "refresh_learning": lambda **settings: RefreshLearning(
        **{"samples": 12, "strength": 0.01, "task_steps": SWITCHES, **settings}
    ),
}

each = pytest.mark.parametrize("name", KEEPERS)
anywhere = pytest.mark.parametrize("first", [True, False])


def ordered(keeper: Keeper, other: Callback, first: bool) -> list[Callback]:
    """Return the callbacks in an order, the keeper first or last."""
    return [keeper, other] if first else [other, keeper]


def rows(keeper: Keeper) -> list[Tensor]:
    found: list[Tensor] = keeper.state_dict()["samples"]["samples"]["rows"]
    return found


# ------------------------------------------------------------------ the order of callbacks


@each
def test_no_callback_changes_its_place(name: str) -> None:
    callbacks = [Watches(), KEEPERS[name](), Watches()]
    run = fit(callbacks, max_steps=2)
    assert [callback for callback in run.trainer.callbacks if callback in callbacks] == callbacks


@anywhere
def test_gradients_change_in_the_order_of_callbacks(first: bool) -> None:
    """OrthoGrad takes the pull away along the weights if it comes after it, and not before it."""
    ewc = EWC(lam=50.0, samples=12, task_steps=SWITCHES)
    before, between, after = Watches(), Watches(), Watches()
    pair = ordered(ewc, OrthoGrad(), first)
    run = fit([before, pair[0], between, pair[1], after], module=NetWith(sgd, norm=False), max_steps=7)
    step = 6  # the second of the second task: the first begins where the pull is 0
    start = run.module.history[step - 1]
    pulled = {}
    for name, weight in start.items():
        pull = 100.0 * ewc.state_dict()["fisher"][name] * (weight - ewc.state_dict()["anchor"][name])
        pulled[name] = (between if first else before).seen[step][name], pull
    changed = {n: (between.seen[step][n] - before.seen[step][n]) for n in start}
    added = changed if first else {n: after.seen[step][n] - between.seen[step][n] for n in start}
    assert_same(added, {name: pull for name, (_, pull) in pulled.items()}, "what EWC added", tolerance=1e-4)
    assert max(float(value.abs().max()) for value in added.values()) > 1e-4
    along = float((after.seen[step]["head.weight"] * start["head.weight"]).sum())
    assert (abs(along) < 1e-5) == first


@anywhere
def test_spike_guard_sees_gradients_without_the_pull(first: bool) -> None:
    ewc, guard = EWC(lam=1.0, samples=12, task_steps=SWITCHES), SpikeGuard(watch="norm")
    run = fit(ordered(ewc, guard, first), max_steps=7)
    found = [callback for callback in run.trainer.callbacks if callback in (ewc, guard)]
    assert found == [guard, ewc]


# ------------------------------------------------------------------ when a batch counts


class Looks(Callback):
    """Notes what the keeper would save at the end of a batch, before or after its turn, and in the middle of one."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.ends: list[list[Tensor]] = []
        self.seen: list[int] = []
        self.within: list[int] = []

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.within.append(self.keeper.state_dict()["samples"]["seen"])

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(copy.deepcopy(rows(self.keeper)))
        self.seen.append(self.keeper.state_dict()["samples"]["seen"])


@each
@anywhere
def test_what_others_save_at_the_end_of_a_batch_has_its_samples(name: str, first: bool) -> None:
    keeper = KEEPERS[name](samples=1000)
    looks = Looks(keeper)
    fit(ordered(keeper, looks, first), module=NetWith(sgd, norm=False), train=loader(0, STEPS), max_epochs=1)
    assert looks.seen == [8 * n for n in (1, 2, 3, 4, 5, 1, 2, 3, 4, 1, 2, 3, 4, 5)]
    assert looks.within == [8 * n for n in (0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3, 4)]
    data = torch.cat([batch[0] for batch in loader(0, STEPS)])
    for step, start in ((5, 0), (7, 5), (14, 9)):
        assert torch.equal(looks.ends[step - 1][0], data[8 * start : 8 * step])


@each
@anywhere
@pytest.mark.parametrize("cut", [3, 5, 7])
def test_a_checkpoint_of_an_earlier_callback_resumes(name: str, first: bool, cut: int, tmp_path: Any) -> None:
    path = str(tmp_path / "cut.ckpt")

    def run(step: int, **settings: Any) -> tuple[Any, Keeper]:
        keeper = KEEPERS[name]()
        callbacks = ordered(keeper, SaveAt(step, path), first)
        return fit(callbacks, module=Net(norm=False), max_steps=STEPS, **settings), keeper

    straight, kept = run(cut)
    again, resumed = run(STEPS + 1, ckpt_path=path)
    assert_same(weights(again.module), weights(straight.module), "weights")
    assert_same(resumed.state_dict(), kept.state_dict(), "state")


class Leaves(Net):
    """Leaves out the third batch, in one of the ways that a module has."""

    def __init__(self, how: str) -> None:
        super().__init__(norm=False)
        self.how = how

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.how == "epoch" and batch_idx == 2 else None

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        if batch_idx == 2 and self.how == "loss":
            return None
        if batch_idx == 2 and self.how == "failure":
            raise RuntimeError("deliberate")
        loss: STEP_OUTPUT = super().training_step(batch, batch_idx)
        return loss

    def on_after_backward(self) -> None:
        if self.how == "late failure" and self.trainer.global_step == 2:
            raise RuntimeError("deliberate")


@each
@anywhere
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("how", ["loss", "epoch", "failure", "late failure"])
def test_a_batch_that_is_not_trained_on_is_not_kept(name: str, first: bool, how: str) -> None:
    keeper = KEEPERS[name](samples=1000, task_steps=None)
    looks = Looks(keeper)
    with pytest.raises(RuntimeError, match="deliberate") if "failure" in how else nullcontext():
        fit(ordered(keeper, looks, first), module=Leaves(how), train=loader(0, 4), max_epochs=1)
    data = [batch[0] for batch in loader(0, 4)]
    kept = [data[0], data[1], data[3]] if how == "loss" else data[:2]
    assert torch.equal(rows(keeper)[0], torch.cat(kept))
    assert keeper.state_dict()["samples"]["seen"] == 8 * len(kept)


class TakesOut(Net):
    """Takes its targets out of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = batch.pop("y")
        given = batch["x"].clone()
        batch["x"].zero_()
        return super().training_step((given, y), batch_idx)


class Dictionaries:
    """A task's batches as dictionaries."""

    def __iter__(self) -> Any:
        return ({"x": x.clone(), "y": y} for x, y in loader(0, 4))


def test_a_training_step_may_change_its_batch() -> None:
    keeper = KEEPERS["ewc"](samples=1000, task_steps=None)
    fit([keeper], module=TakesOut(norm=False), train=Dictionaries(), max_epochs=1)
    for found, place in zip(rows(keeper), (0, 1), strict=True):
        assert torch.equal(found, torch.cat([batch[place] for batch in loader(0, 4)]))


@each
def test_accumulated_batches_count_one_by_one(name: str) -> None:
    keeper = KEEPERS[name](samples=1000, task_steps=None)
    looks = Looks(keeper)
    fit([looks, keeper], module=Net(norm=False), train=loader(0, 6), max_epochs=1, accumulate_grad_batches=3)
    assert looks.seen == [8 * n for n in range(1, 7)]


class Asks(Callback):
    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            self.keeper.start_task(1)


@each
@anywhere
def test_a_task_that_was_asked_for_begins_with_the_next_batch(name: str, first: bool) -> None:
    keeper = KEEPERS[name](samples=1000, task_steps=None)
    fit(ordered(keeper, Asks(keeper), first), module=Net(norm=False), train=loader(0, 5), max_epochs=1)
    data = [batch[0] for batch in loader(3, 5)]
    assert torch.equal(rows(keeper)[0], torch.cat(data))
