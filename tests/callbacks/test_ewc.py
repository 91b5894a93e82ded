"""EWC against a loop by hand, over tasks, fits and processes; and its samples."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import NetWith, entries, weights
from oracles.shared_twin import SharedEWC
from tasks import (
    ELASTIC,
    HOWS,
    STEPS,
    SWITCHES,
    ByHand,
    a_fit_for_each_task,
    fit_tasks,
    loader,
    one_fit,
    resumed,
    sgd,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stable.callbacks.ewc import EWC
from lightning_stable.callbacks.mesa import MESA
from lightning_stable.testing.harness import ManualNet, Net, PlainBoring, SaveAt, Stream, assert_same, fit
from lightning_stable.testing.workers import Pair

LAM, DECAY = 2.0, 0.9


class EWCByHand(ByHand):
    """Its Fisher information is that of every sample of the task that ended."""

    def __init__(self, module: Net | None = None) -> None:
        self.anchor: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        super().__init__(self.penalty, self.consolidate, module)

    def consolidate(self, module: Any, task: list[Any]) -> None:
        self.anchor = weights(module)
        module.eval()
        found = {name: torch.zeros_like(value) for name, value in self.anchor.items()}
        count = 0
        for x, y in task:
            for place in range(len(x)):
                module.zero_grad()
                module.loss((x[place : place + 1], y[place : place + 1])).backward()
                count += 1
                for name, value in module.named_parameters():
                    found[name] += value.grad.square()
        for name, value in found.items():
            self.fisher[name] = DECAY * self.fisher.get(name, 0.0) + value / count
        module.train()

    def penalty(self, module: nn.Module, batch: Any) -> Tensor | float:
        live = dict(module.named_parameters())
        return LAM * sum((self.fisher[n] * (live[n] - anchor).square()).sum() for n, anchor in self.anchor.items())


def ewc(**settings: Any) -> EWC:
    return EWC(
        **{"lam": LAM, "decay": DECAY, "samples": 1000, "log_every_n_steps": 1, "task_steps": SWITCHES, **settings}
    )


@pytest.mark.parametrize("how", HOWS)
def test_it_is_a_loop_with_the_penalty_in_the_loss(how: str) -> None:
    hand = EWCByHand()
    expected = hand.run(**HOWS[how])
    run = fit_tasks([ewc()], **HOWS[how])
    state = run.plugins[0].state_dict()
    assert_same(state["fisher"], hand.fisher, "Fisher information", tolerance=1e-6)
    assert_same(state["anchor"], hand.anchor, "anchor", tolerance=1e-6)
    assert_same(weights(run.module), expected, "against the loop", tolerance=1e-6)
    plain = fit_tasks([], **HOWS[how])
    assert not torch.allclose(plain.module.head.weight, run.module.head.weight, atol=1e-4)


def test_it_logs_the_penalty_from_the_first_switch_on() -> None:
    run = fit_tasks([ewc()])
    logged = entries(run.logged, "ewc/penalty")
    assert list(logged) == list(range(5, STEPS))
    assert logged[5] == logged[9] == 0.0
    assert logged[8] > 0


def kept_samples(plugin: EWC) -> dict[int, Tensor]:
    """Return what is kept after each step."""
    kept = {}

    class Looks(NetWith):
        def on_train_batch_end(self, *args: Any) -> None:
            kept[self.trainer.global_step] = plugin.state_dict()["samples"]["samples"]["rows"][0]

    fit([plugin], module=Looks(sgd, norm=False), train=loader(0, STEPS), max_epochs=1)
    return kept


def test_samples_are_of_the_task_seeded_and_dropped_with_it() -> None:
    data = Stream(STEPS).dataset.tensors[0]
    runs = [kept_samples(ewc(samples=6, seed=seed)) for seed in (0, 0, 1)]
    assert_same(runs[1], runs[0], "the same seed")
    assert not torch.equal(runs[0][5], runs[2][5])
    for first, last in ((0, 5), (5, 9), (9, 14)):
        for step in range(first + 1, last + 1):
            rows = runs[0][step]
            assert len(rows) == 6
            found = [(data == row).all(1).nonzero().item() for row in rows]
            assert len(set(found)) == 6
            assert set(found) <= set(range(8 * first, 8 * step))


def test_the_reservoir_is_that_of_the_state_in_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    fit_tasks([ewc(samples=6), SaveAt(7, str(path))])
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if "EWC" in key]
    assert [len(rows) for rows in state["samples"]["samples"]["rows"]] == [6, 6]
    assert state["samples"]["seen"] == 16


@pytest.mark.parametrize("cut", [3, 5, 7, 9])
def test_it_resumes_before_at_and_after_a_switch(cut: int, tmp_path: Path) -> None:
    straight, again = resumed(lambda: ewc(samples=6), cut, Net, str(tmp_path / "cut.ckpt"))
    assert_same(weights(again.module), weights(straight.module), "weights")
    assert_same(again.plugins[0].state_dict(), straight.plugins[0].state_dict(), "state")


def test_one_fit_for_each_task_is_one_fit_with_steps() -> None:
    single, several = ewc(samples=6), ewc(samples=6, task_steps=None)
    expected, found = one_fit(single), a_fit_for_each_task(several)
    assert_same(weights(found.module), weights(expected.module), "weights")
    for key in ("anchor", "fisher", "samples"):
        assert_same(several.state_dict()[key], single.state_dict()[key], key)


def test_two_processes_are_one(workers: Pair) -> None:
    first, second = workers.run("tasks:shared_job", name="ewc")
    assert_same([second["weights"], second["state"]], [first["weights"], first["state"]], "rank 1 against rank 0")
    single = fit_tasks([SharedEWC(**ELASTIC)])
    assert_same(first["weights"], weights(single.module), "two processes against one", tolerance=1e-5)
    assert_same(first["state"], single.plugins[0].state_dict(), "state", tolerance=1e-5)
    assert first["state"]["samples"]["samples"]["rows"][0].shape[0] == 12


def test_two_processes_with_batch_statistics_end_equal(workers: Pair) -> None:
    first, second = workers.run("tasks:shared_job", name="ewc", norm=True)
    assert_same([second["weights"], second["state"]], [first["weights"], first["state"]], "rank 1 against rank 0")


def test_batch_statistics_and_random_numbers_are_left_alone() -> None:
    runs = []
    for plugins in ([], [ewc(lam=1e-30)]):
        torch.manual_seed(3)
        run = fit_tasks(plugins, module=Net(dropout=0.5))
        logged = [(step, entry) for step, entry in run.logged if "ewc/penalty" not in entry]
        runs.append([run.module.state_dict(), logged, torch.rand(3)])
    assert_same(runs[1], runs[0], "with a weight of nearly nothing against without")


def test_patterns_choose_what_is_held() -> None:
    run = fit_tasks([ewc(parameters=["head.*"])])
    state = run.plugins[0].state_dict()
    assert state["anchor"].keys() == state["fisher"].keys() == {"head.weight", "head.bias"}


def test_frozen_weights_keep_what_was_known_of_them() -> None:
    held, module = ewc(task_steps=None), NetWith(sgd, norm=False)
    known = []
    for first, last in ((0, 5), (5, 9), (9, 14)):
        module.body.requires_grad_(len(known) < 2)
        fit([held], module=module, train=loader(first, last), max_epochs=1)
        known.append(copy.deepcopy(held.state_dict()["fisher"]))
    assert known[1]["body.0.weight"].any()
    assert_same(known[2]["body.0.weight"], DECAY * known[1]["body.0.weight"], "decayed only", tolerance=1e-6)
    assert bool((known[2]["head.weight"] > DECAY * known[1]["head.weight"]).any())


def test_a_weight_of_zero_keeps_nothing_and_another_module_starts_anew() -> None:
    off = ewc(lam=0.0)
    fit_tasks([off])
    state = off.state_dict()
    kept = state["samples"]
    assert (state["anchor"], state["fisher"], kept["samples"]["rows"], kept["seen"]) == ({}, {}, [], 0)
    held = ewc(samples=6)
    first = fit_tasks([held])
    again = fit_tasks([held])
    assert_same(weights(again.module), weights(first.module), "another module")
    copy.deepcopy(pickle.loads(pickle.dumps(held)))


def test_beside_a_term_of_the_loss() -> None:
    """The Fisher information is that of the module's own loss, at the weights that the term has moved."""
    run = fit_tasks([MESA(logits="head", lam=1.0, start_epoch=0, decay=0.5), ewc(task_steps=[5])])
    hand = EWCByHand()
    hand.module.load_state_dict({**hand.module.state_dict(), **run.steps[5].before})
    hand.consolidate(hand.module, [Stream().batch(index) for index in range(5)])
    assert_same(run.plugins[1].state_dict()["fisher"], hand.fisher, "Fisher information", tolerance=1e-6)


class Boom(Net):
    """Has a loss that is infinite for one sample alone."""

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        return loss / 0 if len(batch[0]) == 1 else loss


def test_refuses_fisher_information_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="EWC: the Fisher information of task 0 is not finite"):
        fit_tasks([ewc()], module=Boom(norm=False))


def test_refuses_manual_optimisation_and_batches_that_cannot_be_taken_apart() -> None:
    with pytest.raises(ValueError, match="EWC does not work with manual optimisation"):
        fit([ewc()], module=ManualNet(), max_steps=1)

    class Odd(PlainBoring):
        def train_dataloader(self) -> DataLoader:
            return DataLoader([torch.ones(32)] * 4, collate_fn=lambda rows: {"x": torch.stack(rows), "name": "a"})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["x"], batch_idx)

    with pytest.raises(ValueError, match="EWC takes batches apart into samples, and this one holds a str"):
        fit([ewc()], module=Odd(), own_loaders=True, max_steps=1)


@pytest.mark.parametrize(
    "settings",
    [{"lam": -1.0}, {"decay": 1.5}, {"samples": 0}, {"parameters": "x"}, {"seed": -1}, {"log_every_n_steps": 0}],
)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        EWC(**settings)
