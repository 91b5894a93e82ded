"""L2Anchor against a loop by hand, over tasks, fits and processes."""

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import NetWith, entries, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from tasks import HOWS, SHARED, STEPS, SWITCHES, ByHand, a_fit_for_each_task, fit_tasks, one_fit, resumed, sgd
from torch import Tensor, nn

from lightning_stable.callbacks.l2_anchor import L2Anchor
from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import ManualNet, Net, TwoOptimizerNet, assert_same, fit
from lightning_stable.testing.workers import Pair

LAM = 2.0


class AnchorByHand(ByHand):
    def __init__(self, names: tuple[str, ...] = ("",), **settings: Any) -> None:
        self.anchor: dict[str, Tensor] = {}
        self.names = names
        super().__init__(self.penalty, self.hold, **settings)

    def hold(self, module: nn.Module, task: list[Any]) -> None:
        self.anchor = {name: value for name, value in weights(module).items() if name.startswith(self.names)}

    def penalty(self, module: nn.Module, batch: Any) -> Tensor | float:
        live = dict(module.named_parameters())
        return LAM * sum((live[name] - anchor).square().sum() for name, anchor in self.anchor.items())


def anchor(**settings: Any) -> L2Anchor:
    return L2Anchor(**{"lam": LAM, "log_every_n_steps": 1, "task_steps": SWITCHES, **settings})


@pytest.mark.parametrize("how", HOWS)
def test_it_is_a_loop_with_the_penalty_in_the_loss(how: str) -> None:
    run = fit_tasks([anchor()], **HOWS[how])
    assert_same(weights(run.module), AnchorByHand().run(**HOWS[how]), "against the loop", tolerance=1e-6)
    plain = fit_tasks([], **HOWS[how])
    assert not torch.allclose(plain.module.head.weight, run.module.head.weight, atol=1e-4)


def test_patterns_choose_what_is_held() -> None:
    run = fit_tasks([anchor(parameters=["bo?y.*"])])
    assert run.plugins[0].state_dict()["anchor"].keys() == {"body.0.weight", "body.0.bias"}
    assert_same(weights(run.module), AnchorByHand(("body.",)).run(), "against the loop", tolerance=1e-6)


def test_it_logs_the_penalty_from_the_first_switch_on() -> None:
    run = fit_tasks([anchor()])
    logged = entries(run.logged, "l2_anchor/penalty")
    assert list(logged) == list(range(5, STEPS))
    assert logged[5] == logged[9] == 0.0, "right after a switch the weights are the anchor"
    before, now = run.steps[8].before, run.steps[5].before
    expected = LAM * sum(float((before[name] - now[name]).square().sum()) for name in now)
    assert logged[8] == pytest.approx(expected, rel=1e-4)
    assert list(entries(fit_tasks([anchor(log_every_n_steps=4)]).logged, "l2_anchor/penalty")) == [7, 11]


def test_one_fit_for_each_task_is_one_fit_with_steps() -> None:
    single, several = anchor(), anchor(task_steps=None)
    expected, found = one_fit(single), a_fit_for_each_task(several)
    assert_same(weights(found.module), weights(expected.module), "weights")
    assert_same(several.state_dict()["anchor"], single.state_dict()["anchor"], "anchors")
    free = one_fit(anchor(lam=0.0))
    assert not torch.allclose(free.module.head.weight, found.module.head.weight, atol=1e-4)


def test_start_task_begins_a_task_with_the_next_batch() -> None:
    class Asks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step in SWITCHES:
                held.start_task(SWITCHES.index(trainer.global_step) + 1)

    held = anchor(task_steps=None)
    run = fit_tasks([held, Asks()])
    assert_same(weights(run.module), weights(fit_tasks([anchor()]).module), "asked against steps")


@pytest.mark.parametrize("cut", [3, 5, 7, 9])
def test_it_resumes_before_at_and_after_a_switch(cut: int, tmp_path: Path) -> None:
    straight, again = resumed(anchor, cut, lambda: Net(norm=False), str(tmp_path / "cut.ckpt"))
    assert_same(weights(again.module), weights(straight.module), "weights")
    assert_same(again.plugins[0].state_dict(), straight.plugins[0].state_dict(), "state")


def test_two_processes_are_one(workers: Pair) -> None:
    first, second = workers.run("tasks:shared_job", name="l2_anchor")
    assert_same([second["weights"], second["state"]], [first["weights"], first["state"]], "rank 1 against rank 0")
    single = fit_tasks([SHARED["l2_anchor"]()])
    assert_same(first["weights"], weights(single.module), "two processes against one", tolerance=1e-5)
    assert_same(first["state"], single.plugins[0].state_dict(), "state", tolerance=1e-5)


def test_an_unfrozen_weight_is_held_where_it_was_at_the_switch() -> None:
    class Thaws(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.body.requires_grad_(trainer.current_epoch > 0)

    class Starts(NetWith):
        def on_train_start(self) -> None:
            self.started = weights(self)

    held = anchor(task_steps=[2])
    for order in (1, -1):
        module = Starts(sgd, norm=False)
        fit_tasks([held, Thaws()][::order], module=module)
        found = held.state_dict()
        assert_same(found["anchor"]["body.0.weight"], module.started["body.0.weight"], "the anchor of what was frozen")
        assert not torch.equal(found["anchor"]["head.weight"], module.started["head.weight"])
        assert found["frozen"] == []


class Grows(NetWith):
    """Gets a head with more outputs and a new part after a switch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 6:
            self.head = nn.Linear(8, 4)
            self.added = nn.Linear(1, 1)
            (optimizer,) = self.trainer.optimizers
            optimizer.add_param_group({"params": [*self.head.parameters(), *self.added.parameters()], "lr": 0.05})

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return self.added(found) if hasattr(self, "added") else found


def test_parts_that_grew_or_are_new_move_freely_until_the_next_switch(caplog: pytest.LogCaptureFixture) -> None:
    held = anchor(task_steps=[5])
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        module = Grows(sgd, norm=False)
        fit_tasks([held], module=module)
    said = [record.message for record in caplog.records if "L2Anchor" in record.message]
    assert said == [
        "L2Anchor: 'head.weight', 'head.bias' had another shape when the last task ended and move freely until the "
        "next one does."
    ]
    assert "added.weight" not in held.state_dict()["anchor"]
    held.start_task(2)
    fit_tasks([held], module=module, max_steps=1)
    assert held.state_dict()["anchor"]["head.weight"].shape == (4, 8)
    assert "added.weight" in held.state_dict()["anchor"]


@pytest.mark.parametrize("kind", [ManualNet, TwoOptimizerNet])
def test_manual_optimisation(kind: type[LightningModule]) -> None:
    several = 2 if kind is TwoOptimizerNet else 1
    run = fit_tasks([anchor()], module=kind(norm=False), max_steps=STEPS * several)
    plain = fit_tasks([], module=kind(norm=False), max_steps=STEPS * several)
    assert not torch.allclose(run.module.head.weight, plain.module.head.weight, atol=1e-4)
    names = {name for _, entry in run.logged for name in entry if "penalty" in name}
    assert names == ({"l2_anchor/penalty/0", "l2_anchor/penalty/1"} if several == 2 else {"l2_anchor/penalty"})


def test_beside_sam_the_penalty_is_at_the_weights() -> None:
    run = fit_tasks([SAM(rho=0.1), anchor()])
    plain = fit_tasks([SAM(rho=0.1)])
    switch = SWITCHES[0]
    # The first step of a task starts at the anchor; the second one's gradient has the pull.
    assert_same(run.steps[switch].weights, plain.steps[switch].weights, "the first step of a task")
    assert run.steps[switch + 1].gradients["head.weight"].ne(plain.steps[switch + 1].gradients["head.weight"]).any()


def test_another_module_starts_anew_and_a_weight_of_zero_keeps_nothing() -> None:
    held = anchor()
    first = fit_tasks([held])
    again = fit_tasks([held])
    assert_same(weights(again.module), weights(first.module), "another module")
    off = anchor(lam=0.0)
    fit_tasks([off])
    assert off.state_dict()["anchor"] == {}
    assert off.task_clock.task == 2
    pickle.dumps(held)


def test_reset_lets_go() -> None:
    held = anchor()
    module = Net(norm=False)
    fit_tasks([held], module=module)
    held.reset()
    assert held.state_dict()["anchor"] == {}


def test_refuses_patterns_that_match_nothing() -> None:
    with pytest.raises(ValueError, match=r"L2Anchor: the pattern 'backbone\.\*' in parameters matches no param"):
        fit([anchor(parameters=["body.*", "backbone.*"])], max_steps=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"lam": -1.0},
        {"lam": float("nan")},
        {"parameters": "body.*"},
        {"parameters": []},
        {"parameters": [1]},
        {"log_every_n_steps": 0},
        {"task_steps": [5, 5]},
    ],
)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        L2Anchor(**settings)
