"""Replay and what surrounds it: batches that are changed or declined, validation, several processes, bad settings."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from oracles.replay_twin import Labelled, SharedReplay, labelled
from replays import Calm, numbered, rows, small, weights
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stable.callbacks.replay import Replay
from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import Net, SaveAt, Stream, assert_same, fit
from lightning_stable.testing.workers import Pair

# ---------------------------------------------------------------------------------------------------- its batches


class Takes(Calm):
    """Takes its batches apart, if they have another number of samples than those that are spared."""

    spared = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = dict(batch) if len(batch["label"]) == self.spared else batch
        label = batch.pop("label")
        x, y = batch.pop("inputs")
        return super().training_step((x, y, label), batch_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"inputs": list(batch), "label": batch[0][:, 0].long() % 2}


@pytest.mark.parametrize("settings", [{}, {"policy": "class_balanced", "capacity": 24}])
@pytest.mark.parametrize("others", [[], [SAM(rho=1e-30)]], ids=["alone", "SAM"])
def test_a_training_step_may_take_its_batch_apart(settings: dict[str, Any], others: list[Any]) -> None:
    module, replay = Takes(), small(**{"capacity": 100, "batch_size": 3, **settings})
    module.spared = 4 if others else 0  # the host's own batches: SAM runs those again
    fit([*others, replay], module=module, train=numbered(), max_epochs=1)
    state = replay.state_dict()["memory"]["samples"]
    assert state["paths"] == ["['inputs'][0]", "['inputs'][1]", "['label']"]
    assert sorted(rows(state["rows"])) == [float(number) for number in range(24)]
    assert len(module.notes) == 11 * (1 + len(others))


class Ends(Calm):
    """Ends each epoch at its fourth batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 3 else None


class SaveAtEpochEnd(Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_a_batch_that_the_module_declines_is_drawn_for_in_vain(policy: str, tmp_path: Any) -> None:
    path, labels, runs = str(tmp_path / "saved.ckpt"), "2" if policy == "class_balanced" else None, []
    for ckpt_path in (None, path):
        module, replay = Ends(), small(policy=policy, labels=labels)
        train = DataLoader(TensorDataset(*labelled().dataset.tensors), batch_size=4)
        fit([replay, SaveAtEpochEnd(path)], module=module, train=train, max_epochs=3, ckpt_path=ckpt_path)
        runs.append((module.notes[-12:], replay.state_dict()))
    assert_same(runs[1], runs[0], "resumed against straight")
    plain = small(policy=policy, labels=labels)
    train = DataLoader(TensorDataset(*(part[:12] for part in labelled().dataset.tensors)), batch_size=4)
    fit([plain], module=Calm(), train=train, max_epochs=3)
    assert_same(runs[0][1], plain.state_dict(), "a declined batch against none")


class ValidatesAlike(Labelled):
    """Its validation is its training step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("others", [[], [SAM(rho=1e-30)]], ids=["alone", "SAM"])
def test_validation_by_the_training_step_has_no_replayed_samples(others: list[Any]) -> None:
    """Also where it comes within an optimizer step."""
    runs = []
    for kind in (ValidatesAlike, Labelled):
        module = kind(norm=False)
        settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 3}
        run = fit([*others, small()], module=module, validation=Stream(2, seed=5), **settings)
        runs.append((weights(run), run.plugins[-1].state_dict()))
    assert_same(runs[0], runs[1], "validation by the training step against another")


# ---------------------------------------------------------------------------------------------------- two processes


def test_two_processes_keep_classes_as_one_does(workers: Pair) -> None:
    settings = {"capacity": 12, "batch_size": 4, "weight": 0.4}
    first, second = workers.run("oracles.replay_twin:balanced_job", **settings)
    for key in ("weights", "plugins"):
        assert_same(second[key], first[key], f"{key} of rank 1 against rank 0")
    module = Labelled(norm=False)
    twin = SharedReplay(policy="class_balanced", labels="2", **settings)
    run = fit([twin], module=module, train=labelled(), max_steps=14)
    assert_same(first["plugins"], run.snapshot()["plugins"], "two processes against one")
    assert_same(first["weights"], run.snapshot()["weights"], "two processes against one", tolerance=2e-4)
    # Each takes every other one of a draw.
    drawn = [rows(batch) for batch in module.notes[2::2]]
    assert [rows(batch) for batch in first["notes"][2::2]] == [batch[::2] for batch in drawn]
    assert [rows(batch) for batch in second["notes"][2::2]] == [batch[1::2] for batch in drawn]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_processes_may_have_batches_of_different_size(batch_size: int | None, workers: Pair) -> None:
    job = {"rows": [3, 1], "capacity": 100, "batch_size": batch_size}
    first, second = workers.run("oracles.replay_twin:uneven_job", **job)
    assert_same(second["plugins"], first["plugins"], "rank 1 against rank 0")
    samples = first["plugins"][0]["memory"]["samples"]["rows"][1].flatten().tolist()
    assert samples == [0, 1, 2, 1000, 3, 4, 5, 1001, 6, 7, 8, 1002, 9, 10, 11, 1003]
    assert [len(batch[0]) for batch in first["notes"][2::2]] == [2, 2, 2]
    assert [len(batch[0]) for batch in second["notes"][2::2]] == [2, 2, 2]


def test_the_order_of_keys_makes_no_difference_to_processes(workers: Pair) -> None:
    """Two entries of one shape would be taken for each other."""
    first, second = workers.run("oracles.replay_twin:keyed_job", capacity=100)
    assert_same(second["plugins"], first["plugins"], "rank 1 against rank 0")
    samples = first["plugins"][0]["memory"]["samples"]
    assert samples["paths"] == ["['inputs']", "['labels']"]
    inputs, labels = (part[:, 0].tolist() for part in samples["rows"])
    assert labels == [value + 100 for value in inputs]
    assert sorted(inputs) == sorted([0.0, 1, 2, 3, 1000, 1001, 1002, 1003])
    for answer in (first, second):
        assert all(torch.equal(labels, inputs + 100) for inputs, labels in answer["notes"])


def test_processes_with_samples_of_different_shape_all_say_so(workers: Pair) -> None:
    for answer in workers.run("oracles.replay_twin:uneven_job", rows=[3, 3], width=9):
        assert "the processes have samples that look different" in answer.get("error", "")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"capacity": 0}, "capacity=0 "),
        ({"policy": "ring"}, "policy='ring' is unknown. Choose one of 'reservoir', 'class_balanced', 'power_law'"),
        ({"batch_size": 0}, "batch_size=0 "),
        ({"weight": 0.0}, r"weight=0.0 is not in \(0, 1\]"),
        ({"weight": 1.1}, "weight=1.1 "),
        ({"weight": float("nan")}, "weight=nan "),
        ({"weight": True}, "weight=True "),
        ({"exponent": -1.0}, "exponent=-1.0 "),
        ({"labels": "y"}, "labels='y' has no meaning for policy='reservoir'"),
        ({"seed": -1}, "seed=-1 "),
        ({"task_steps": [3, 2]}, r"Replay: task_steps=\[3, 2\]"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Replay(**settings)


def test_refuses_less_room_than_classes() -> None:
    replay = small(policy="class_balanced", labels="2", capacity=3)
    with pytest.raises(ValueError, match="Replay: capacity=3 is less than the 4 classes that came so far"):
        fit([replay], module=Labelled(), train=labelled(), max_epochs=1)
    with pytest.raises(ValueError, match="Replay: capacity=1 is less than the 2 tasks that came so far"):
        fit([small(policy="power_law", capacity=1, task_steps=[2])], max_steps=3)


def test_refuses_labels_that_are_no_classes() -> None:
    with pytest.raises(ValueError, match=r"one class for each sample, as whole numbers of shape \(8,\), and found "):
        fit([small(policy="class_balanced")], max_steps=2)
    with pytest.raises(ValueError, match="looks for the labels of the batch at labels='2'"):
        fit([small(policy="class_balanced", labels="2")], max_steps=2)


class Ragged(Calm):
    """Its batches have another width from step 3 on."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0][:, :6], batch[1]))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (torch.cat([x, x[:, :1]], 1) if self.trainer.global_step >= 3 else x), y


def test_refuses_samples_of_changing_shape() -> None:
    with pytest.raises(ValueError, match=r"Replay keeps samples .* \(6,\) float32, .*this batch of \(7,\).*Pad"):
        fit([small()], module=Ragged(), train=numbered(), max_epochs=1)


class Scalar(Calm):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0], batch[1], torch.tensor(1.0)


def test_refuses_a_batch_without_samples_to_tell_apart() -> None:
    with pytest.raises(ValueError, match="Replay takes batches apart into samples, along a first dimension"):
        fit([small()], module=Scalar(), train=numbered(), max_epochs=1)


class TakesAnIterator(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_refuses_a_training_step_that_takes_an_iterator() -> None:
    with pytest.raises(ValueError, match="Replay runs batches a second time, and TakesAnIterator"):
        fit([small()], module=TakesAnIterator(), max_steps=2)


def test_refuses_to_resume_with_other_settings(tmp_path: Any) -> None:
    path = str(tmp_path / "saved.ckpt")
    fit([small(), SaveAt(3, path)], max_steps=3)
    with pytest.raises(ValueError, match=r"The checkpoint's Replay has capacity=12 \(13 here\)"):
        fit([small(capacity=13)], max_steps=5, ckpt_path=path)
    with pytest.raises(ValueError, match=r"has policy='reservoir' \('power_law' here\)"):
        fit([small(policy="power_law")], max_steps=5, ckpt_path=path)
