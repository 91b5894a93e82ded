"""The samples of a task: which batches count, in whichever order the callbacks come."""

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks._task_samples import TaskSamples
from lightning_stable.testing.harness import Net, SaveAt, assert_same, fit


class Owner(Callback):
    """Keeps samples as an owner is told to."""

    def __init__(self, capacity: int = 100) -> None:
        self.samples = TaskSamples(capacity, "Owner", 0)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.samples.reset()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples.load_state_dict(state_dict)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.samples.begin(trainer, pl_module, batch)

    @override
    def on_before_backward(self, *_: Any) -> None:
        self.samples.learn()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.samples.settle()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.samples.state_dict()


class Looks(Callback):
    """Notes the owner's state at the end of each batch; may fail in a hook at a step."""

    def __init__(self, owner: Owner, fail: tuple[str, int] | None = None) -> None:
        self.owner = owner
        self.fail = fail
        self.states: list[dict[str, Any]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.states.append(copy.deepcopy(self.owner.state_dict()))
        self._maybe_fail("end", trainer)

    @override
    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        self._maybe_fail("backward", trainer)

    def _maybe_fail(self, hook: str, trainer: Trainer) -> None:
        if self.fail == (hook, trainer.global_step):
            raise RuntimeError("deliberate")


def numbered(samples: int = 24, batch: int = 4) -> DataLoader:
    """Samples that are their own number."""
    numbers = torch.arange(float(samples))[:, None]
    return DataLoader(TensorDataset(numbers.expand(-1, 6), numbers / 24), batch_size=batch)


def kept(state: dict[str, Any]) -> list[int]:
    rows = state["samples"]["rows"]
    return [int(row[0]) for row in rows[0]] if rows else []


class Calm(Net):
    """Does not learn, so that large inputs do no harm."""

    def __init__(self) -> None:
        super().__init__(rates=(0.0, 0.0))


@pytest.mark.parametrize("capacity", [100, 6])
def test_its_place_among_the_callbacks_makes_no_difference(capacity: int) -> None:
    runs = []
    for first in (True, False):
        owner = Owner(capacity)
        looks = Looks(owner)
        fit([owner, looks] if first else [looks, owner], module=Calm(), train=numbered(), max_epochs=2)
        runs.append([*looks.states, owner.state_dict()])
    assert [state["seen"] for state in runs[0]] == [*range(4, 49, 4), 48]
    assert kept(runs[0][0]) == [0, 1, 2, 3]
    assert_same(runs[1], runs[0], "before its hook against after")


def test_what_is_saved_before_its_own_hook_goes_on_as_the_run_does(tmp_path: Any) -> None:
    path, runs = str(tmp_path / "saved.ckpt"), []
    for ckpt_path in (None, path):
        owner = Owner(6)
        train = numbered() if ckpt_path is None else numbered(12)
        if ckpt_path is not None:
            train.dataset.tensors = tuple(part[12:] for part in numbered().dataset.tensors)
        fit([SaveAt(3, path), owner], module=Calm(), train=train, max_steps=6, ckpt_path=ckpt_path)
        runs.append(owner.state_dict())
    assert_same(runs[1], runs[0], "resumed against straight")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_failed_has_not_come(accumulate: int) -> None:
    owner, plain = Owner(6), Owner(6)
    looks = Looks(owner, ("backward", 2))
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([owner, looks], module=Calm(), train=numbered(), max_epochs=1, accumulate_grad_batches=accumulate)
    assert_same(owner.state_dict(), looks.states[-1], "after the failure against before the batch")
    fit([owner], module=Calm(), train=numbered(), max_steps=1)
    fit([plain], module=Calm(), train=numbered(8 * accumulate), max_epochs=1)
    fit([plain], module=Calm(), train=numbered(), max_steps=1)
    assert_same(owner.state_dict(), plain.state_dict(), "the failed batch against none")


def test_a_batch_whose_end_failed_has_come() -> None:
    owner = Owner()
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([Looks(owner, ("end", 2)), owner], module=Calm(), train=numbered(), max_epochs=1)
    assert kept(owner.state_dict()) == list(range(8))


class Skips(Calm):
    """Skips some of the batches that come."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_batch_has_not_come(first: bool) -> None:
    owner = Owner()
    looks = Looks(owner)
    fit([owner, looks] if first else [looks, owner], module=Skips(), train=numbered(), max_epochs=1)
    assert kept(owner.state_dict()) == [number for number in range(24) if number // 4 % 2 == 0]
    assert_same(looks.states[1], looks.states[0], "a skipped batch")


class Ends(Calm):
    """Ends each epoch at its fourth batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 3 else None


def test_a_batch_that_the_module_declines_has_not_come() -> None:
    owner, plain, states = Owner(6), Owner(6), []

    class AtEnd(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            states.append(copy.deepcopy(owner.state_dict()))

    fit([owner, AtEnd()], module=Ends(), train=numbered(), max_epochs=2)
    fit([plain], module=Calm(), train=numbered(12), max_epochs=2)
    assert [state["seen"] for state in states] == [12, 24]
    assert_same(owner.state_dict(), plain.state_dict(), "the declined batch against none")


class Takes(Calm):
    """Takes its batches apart, and writes into them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = batch.pop("labels")
        loss = super().training_step((batch["x"].clone(), y), batch_idx)
        batch.pop("x").zero_()
        return loss

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch[0].clone(), "labels": batch[1]}


def test_samples_are_those_that_came_whatever_the_training_step_does_to_them() -> None:
    owner = Owner()
    fit([owner], module=Takes(), train=numbered(), max_epochs=1)
    state = owner.state_dict()
    assert state["samples"]["paths"] == ["['labels']", "['x']"]
    assert state["samples"]["rows"][1][:, 0].tolist() == [float(number) for number in range(24)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_a_copy_has_what_was_settled(duplicate: Any) -> None:
    owner, copies = Owner(), []

    class Copies(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            copies.append(duplicate(owner))

    fit([owner, Copies()], module=Calm(), train=numbered(8), max_epochs=1)
    assert [kept(each.state_dict()) for each in copies] == [[], [0, 1, 2, 3]]
    assert isinstance(owner.state_dict()["samples"]["rows"][0], Tensor)
