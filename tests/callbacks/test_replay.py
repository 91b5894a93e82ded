"""Replay: what is kept and replayed when, and what the second pass is to others; the contracts compare gradients."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from oracles.replay_twin import Labelled, labelled
from replays import Calm, kept, numbered, rows, small, weights
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.sam import SAM
from lightning_stable.functional.replay import draw_evenly, reservoir_places
from lightning_stable.testing.harness import DictNet, Net, SaveAt, Stream, assert_same, fit
from lightning_stable.testing.streams import BATCH_SIZE

# ---------------------------------------------------------------------------------------------------- what and when


def test_what_is_kept_and_replayed_is_what_the_policy_says() -> None:
    replay, module = small(), Calm()
    fit([replay], module=module, train=numbered(), max_epochs=2)
    chance, memory, expected, seen = torch.Generator().manual_seed(0), {}, [], 0
    for start in [4 * (batch % 6) for batch in range(12)]:
        expected.append([float(number) for number in range(start, start + 4)])
        if memory:
            expected.append([memory[place] for place in draw_evenly(len(memory), 4, chance)])
        for source, place in zip(*reservoir_places(seen, 4, 12, chance), strict=True):
            memory[place] = float(start + source)
        seen += 4
    assert [rows(batch) for batch in module.notes] == expected
    assert kept(replay) == [memory[place] for place in range(12)]


def test_a_batch_is_not_replayed_beside_itself() -> None:
    module = Calm()
    fit([small(batch_size=None)], module=module, train=numbered(), max_epochs=1)
    new, old = [rows(module.notes[0]), *map(rows, module.notes[1::2])], list(map(rows, module.notes[2::2]))
    assert len(new) == 6
    for number, replayed in enumerate(old, start=1):
        assert len(replayed) == 4
        assert set(replayed) <= {sample for batch in new[:number] for sample in batch}


def test_with_accumulation_each_batch_has_samples_of_its_own() -> None:
    module = Calm()
    fit([small()], module=module, train=numbered(), max_epochs=1, accumulate_grad_batches=3)
    assert [len(batch[0]) for batch in module.notes] == [4] * 11
    assert rows(module.notes[2]) != rows(module.notes[4])


def test_power_law_replays_past_tasks_alone() -> None:
    replay, module = small(policy="power_law", task_steps=[2, 4], batch_size=40, capacity=9), Calm()
    fit([replay], module=module, train=numbered(), max_epochs=1)
    new = [rows(batch) for batch in module.notes if len(batch[0]) == 4]
    old = [set(rows(batch)) for batch in module.notes if len(batch[0]) == 40]
    first, second = ({sample for batch in new[start : start + 2] for sample in batch} for start in (0, 2))
    assert [len(batch) for batch in new] == [4] * 6
    assert len(old) == 4
    assert old[0] <= first
    assert old[1] <= first
    for replayed in old[2:]:
        assert replayed <= first | second
        assert replayed & first
        assert replayed & second
    assert replay.state_dict()["memory"]["groups"].bincount().tolist() == [3, 3, 3]


def test_tasks_are_asked_for_and_follow_from_fits() -> None:
    replay, module = small(policy="power_law"), Calm()
    fit([replay], module=module, train=numbered(), max_epochs=1)
    assert len(module.notes) == 6
    fit([replay], module=module, train=numbered(), max_epochs=1)
    assert len(module.notes) == 18
    replay.start_task(7)
    fit([replay], module=module, train=numbered(), max_epochs=1)
    assert replay.task_clock.task == 7
    assert sorted(replay.state_dict()["memory"]["seen_of_group"]) == [0, 1, 7]


def test_class_balanced_keeps_and_replays_classes_equally() -> None:
    replay, module = small(policy="class_balanced", labels="2", batch_size=64), Labelled()
    fit([replay], module=module, train=labelled(), max_epochs=2)
    classes = replay.state_dict()["memory"]["samples"]["rows"][2]
    assert classes.bincount().tolist() == [3, 3, 3, 3]
    assert torch.equal(classes, replay.state_dict()["memory"]["groups"])
    replayed = torch.cat([batch[2] for batch in module.notes[8:] if len(batch[0]) == 64])
    assert all(abs(share - 0.25) < 0.08 for share in (replayed.bincount() / len(replayed)).tolist())


def test_the_weight_one_keeps_nothing() -> None:
    replay, module = small(weight=1), Calm()
    fit([replay], module=module, train=numbered(), max_epochs=1)
    assert len(module.notes) == 6
    assert replay.state_dict()["memory"]["samples"] == {"rows": [], "paths": []}


class Skips(Calm):
    """Skips some of the batches that come."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 2 else loss


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_skipped_batch_is_not_kept() -> None:
    replay = small(capacity=100)
    fit([replay], module=Skips(), train=numbered(), max_epochs=1)
    assert kept(replay) == [float(number) for number in range(24) if number // 4 % 2 == 0]


def test_a_batch_that_failed_is_not_kept() -> None:
    class Fails(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("deliberate")

    replay = small(capacity=100)
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([replay, Fails()], module=Calm(), train=numbered(), max_epochs=1)
    assert kept(replay) == [float(number) for number in range(8)]


def test_a_batch_that_failed_is_drawn_for_again() -> None:
    """What is saved after a failure goes on from before the draw: the batch that failed comes again."""
    states: list[dict[str, Any]] = []

    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(copy.deepcopy(replay.state_dict()))

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("deliberate")

    replay = small(capacity=6)
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([replay, Fails()], module=Calm(), train=numbered(), max_epochs=1)
    assert_same(replay.state_dict(), states[-1], "the state after the failure against that before the batch")


def test_another_module_begins_with_an_empty_memory_and_a_second_fit_does_not() -> None:
    replay, module = small(capacity=100), Calm()
    fit([replay], module=module, train=numbered(8), max_epochs=1)
    fit([replay], module=module, train=numbered(8), max_epochs=1)
    assert kept(replay) == [*map(float, range(8))] * 2
    fit([replay], module=Calm(), train=numbered(8), max_epochs=1)
    assert kept(replay) == [*map(float, range(8))]


def test_saving_before_its_own_hook_is_in_time(tmp_path: Any) -> None:
    """It runs before the callbacks that are given before it, so that what they save has the batch."""
    path, replay = str(tmp_path / "early.ckpt"), small(capacity=100)
    fit([SaveAt(3, path), replay], module=Calm(), train=numbered(), max_steps=3)
    saved = torch.load(path, weights_only=True)["callbacks"]["Replay"]["memory"]["samples"]["rows"][0]
    assert len(saved) == 12


# ---------------------------------------------------------------------------------------------------- the second pass


class Curious(Labelled):
    """Has dropout, batch statistics and a metric."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.mean = MeanMetric()
        self.logs = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


def test_the_second_pass_is_trained_on_but_not_reported() -> None:
    counts: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(pl_module.mean.update_count)

    torch.manual_seed(3)
    module = Curious()
    run = fit([small(), Counts()], module=module, max_steps=5)
    assert counts == [1, 2, 3, 4, 5]
    assert len(module.notes) == 9
    assert int(module.body[1].num_batches_tracked) == 9, "batch statistics did not move"
    steps = [entry for _, entry in run.logged if "train_loss" in entry]
    assert ["replay_loss" in entry for entry in steps] == [False] + [True] * 4
    torch.manual_seed(3)
    plain = fit([], module=Curious(), max_steps=5)
    assert run.logged[0][1]["train_loss"] == plain.logged[0][1]["train_loss"]
    assert run.logged[1][1]["train_loss"] == plain.logged[1][1]["train_loss"], "the first step is without replay"


def test_the_loss_by_hand() -> None:
    module = Labelled(norm=False)
    run = fit([small()], module=module, max_steps=2)
    after = Net(norm=False)
    after.load_state_dict({**run.steps[0].weights})
    new, old = after.loss(module.notes[1]), after.loss(module.notes[2])
    assert run.logged[1][1]["train_loss"] == pytest.approx(float(new.detach()), rel=1e-5)
    assert run.logged[1][1]["replay_loss"] == pytest.approx(0.6 * float(old.detach()), rel=1e-5)
    gradients = torch.autograd.grad(0.4 * new + 0.6 * old, list(after.parameters()))
    names = [name for name, _ in after.named_parameters()]
    assert_same(run.steps[1].gradients, dict(zip(names, gradients, strict=True)), "gradients", tolerance=1e-5)


def test_what_a_dictionary_holds_beside_the_loss_stays() -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((outputs["extra"], batch[0].mean()))

    of_dict = fit([small(), Looks()], module=DictNet(), max_steps=4)
    assert all(torch.equal(extra, expected) for extra, expected in seen)
    assert_same(of_dict.module.state_dict(), fit([small()], max_steps=4).module.state_dict(), "dictionary or tensor")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sam_repeats_each_batch_with_the_same_samples(accumulate: int) -> None:
    module = Labelled()
    fit([SAM(rho=0.05), small()], module=module, max_steps=4, accumulate_grad_batches=accumulate)
    passes, place = [*map(rows, module.notes)], 0
    for step in range(4):
        once = 2 * accumulate - (step == 0)
        assert passes[place + once : place + 2 * once] == passes[place : place + once], f"step {step}"
        place += 2 * once
    assert place == len(passes)


def test_sam_with_a_small_radius_is_training_without_it() -> None:
    expected = fit([small()], max_steps=8, accumulate_grad_batches=2)
    for callbacks in ([SAM(rho=1e-30), small()], [small(), SAM(rho=1e-30)]):
        found = fit(callbacks, max_steps=8, accumulate_grad_batches=2)
        assert_same(weights(found), weights(expected), "weights", tolerance=1e-5)


def mesa() -> MESA:
    return MESA(lam=2.0, temperature=2.0, start_epoch=0, decay=0.5)


class Totals(Labelled):
    """Notes the loss that is gone backward from."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.totals: list[float] = []

    def on_before_backward(self, loss: Tensor) -> None:
        self.totals.append(float(loss.detach()))


def test_terms_of_others_are_of_the_new_batch_and_keep_their_weight() -> None:
    runs = [fit(callbacks, max_steps=8) for callbacks in ([small(), mesa()], [mesa(), small()])]
    assert_same(weights(runs[1]), weights(runs[0]), "the order of the callbacks")
    module = Totals(norm=False)
    run = fit([mesa(), small()], module=module, max_steps=4)
    assert [len(batch[0]) for batch in module.notes] == [8, 8] + [8, 8, 4] * 3, "a reference with a replayed batch"
    for total, (_, entry) in list(zip(module.totals, run.logged, strict=True))[1:]:
        expected = 0.4 * entry["train_loss"] + entry["replay_loss"] + entry["mesa_loss"]
        assert total == pytest.approx(expected, rel=1e-5)


def test_terms_are_repeated_for_the_new_batch_alone() -> None:
    expected = fit([small(), mesa()], max_steps=6, accumulate_grad_batches=2)
    found = fit([SAM(rho=1e-30), small(), mesa()], max_steps=6, accumulate_grad_batches=2)
    assert_same(weights(found), weights(expected), "weights", tolerance=1e-5)


class Searching(Labelled):
    """Trains with an optimizer that runs each batch several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


def test_an_optimizer_that_evaluates_several_times_sees_one_loss() -> None:
    module = Searching()
    fit([small()], module=module, max_steps=3)
    second = [*map(rows, module.notes)][3:9]
    assert second == second[:2] * 3


# ---------------------------------------------------------------------------------------------------- the object


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda replay: pickle.loads(pickle.dumps(replay))])
def test_a_copy_goes_on_as_the_object_does(duplicate: Any) -> None:
    replay, train = small(), numbered()
    fit([replay], module=Calm(), train=train, max_epochs=1)
    runs = []
    for each in (duplicate(replay), replay):
        # Of the same class and name, but another module: its memory is kept by hand.
        saved, module = each.state_dict(), Calm()
        each._module = weakref.ref(module)
        assert_same(each.state_dict(), saved, "what is kept")
        fit([each], module=module, train=train, max_epochs=1)
        runs.append((module.notes, each.state_dict()))
    assert_same(runs[0], runs[1], "a copy against the object")


def test_a_checkpoint_read_for_validation_leaves_the_memory_alone(tmp_path: Any) -> None:
    path, replay, module = str(tmp_path / "saved.ckpt"), small(capacity=100), Labelled()
    run = fit([replay, SaveAt(2, path)], module=module, validation=Stream(2, seed=5), max_steps=4)
    before = replay.state_dict()
    run.trainer.validate(module, Stream(2, seed=5), ckpt_path=path, verbose=False)
    assert_same(replay.state_dict(), before, "the memory")
    fit([replay], module=module, max_steps=1)
    assert len(kept(replay)) == 5 * BATCH_SIZE
