"""LwF against a loop by hand, its teacher and its classes, over tasks, fits and processes."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import NetWith, weights
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from tasks import (
    HOWS,
    SHARED,
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
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_stable.callbacks.lwf import LwF
from lightning_stable.callbacks.sam import SAM
from lightning_stable.functional.lwf import distillation_loss
from lightning_stable.testing.harness import QUIET, ManualNet, Net, assert_same, fit
from lightning_stable.testing.workers import Pair

LAM, TEMPERATURE = 4.0, 2.0


def divergence(past: Tensor, now: Tensor) -> Tensor:
    pair = (torch.log_softmax(now / TEMPERATURE, -1), torch.softmax(past / TEMPERATURE, -1))
    return LAM * TEMPERATURE**2 * kl_div(*pair, reduction="batchmean")


class LwFByHand(ByHand):
    def __init__(self, module: Net | None = None) -> None:
        self.teacher: nn.Module | None = None
        super().__init__(self.term, self.teach, module)

    def teach(self, module: Any, task: list[Any]) -> None:
        self.teacher = copy.deepcopy(module).eval()

    def term(self, module: Any, batch: Any) -> Tensor | float:
        if self.teacher is None:
            return 0.0
        with torch.no_grad():
            past = self.teacher.head(self.teacher.body(batch[0]))
        # The pass of the module's loss has moved its batch statistics already.
        flags = [(part, part.momentum) for part in module.modules() if isinstance(part, nn.BatchNorm1d)]
        for part, _ in flags:
            part.momentum = 0.0
        now = module.head(module.body(batch[0]))
        for part, momentum in flags:
            part.momentum = momentum
        return divergence(past, now)


def lwf(**settings: Any) -> LwF:
    return LwF(**{"lam": LAM, "temperature": TEMPERATURE, "logits": "head", "task_steps": SWITCHES, **settings})


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_it_is_a_loop_with_a_copy_of_the_old_model(how: str, norm: bool) -> None:
    hand = LwFByHand(Net(norm=norm))
    expected = hand.run(**HOWS[how])
    run = fit_tasks([lwf()], module=Net(norm=norm), **HOWS[how])
    assert_same(weights(run.module), expected, "against the loop", tolerance=1e-6 if not norm else 1e-5)
    # The loop counts its batches twice.
    teacher, found = hand.teacher.state_dict(), run.plugins[0].state_dict()["teacher"]
    assert found.keys() == teacher.keys()
    for name in teacher.keys() - {"body.1.num_batches_tracked"}:
        assert_same(found[name], teacher[name], name, tolerance=1e-5)
    plain = fit_tasks([], module=Net(norm=norm), **HOWS[how])
    assert not torch.allclose(plain.module.head.weight, run.module.head.weight, atol=1e-4)


class Curious(Net):
    """Has dropout, batch statistics and a metric, and knows in which mode it ran."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.mean = MeanMetric()
        self.modes: list[tuple[bool, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append((self.training, torch.is_grad_enabled()))
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


def test_before_a_switch_there_is_no_term_and_after_it_a_pass_that_leaves_nothing_behind() -> None:
    torch.manual_seed(3)
    plain = fit_tasks([], module=Curious())
    torch.manual_seed(3)
    run = fit_tasks([lwf(lam=1e-30)], module=Curious())
    first = SWITCHES[0]
    assert run.module.modes == [(True, True)] * first + [(False, False), (True, True)] * (STEPS - first)
    assert_same(run.module.state_dict(), plain.module.state_dict(), "weights and batch statistics")
    logged = [{name: value for name, value in entry.items() if name != "lwf_loss"} for _, entry in run.logged]
    assert_same(logged, [entry for _, entry in plain.logged], "logged values")
    assert [step for step, entry in run.logged if "lwf_loss" in entry] == list(range(first, STEPS))


class Counts(Net):
    """Counts its passes in a buffer, in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("derived", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(x)


def test_the_teachers_buffers_stay_those_of_the_switch() -> None:
    run = fit_tasks([lwf(task_steps=[5])], module=Counts())
    teacher = run.plugins[0].state_dict()["teacher"]
    assert float(teacher["passes"]) == 5
    assert float(run.module.passes) == STEPS
    assert "derived" not in teacher


def test_the_head_is_found() -> None:
    named, found = fit_tasks([lwf()]), fit_tasks([lwf(logits=None)])
    assert_same(weights(found.module), weights(named.module), "the head found against the head named")


def test_one_fit_for_each_task_is_one_fit_with_steps() -> None:
    single, several = lwf(), lwf(task_steps=None)
    expected, found = one_fit(single), a_fit_for_each_task(several)
    assert_same(weights(found.module), weights(expected.module), "weights")
    for key in ("teacher", "past", "outputs", "heads"):
        assert_same(several.state_dict()[key], single.state_dict()[key], key)
    assert single.state_dict()["past"] == [0, 1]


@pytest.mark.parametrize("cut", [3, 5, 7, 9])
def test_it_resumes_before_at_and_after_a_switch(cut: int, tmp_path: Path) -> None:
    straight, again = resumed(lwf, cut, Net, str(tmp_path / "cut.ckpt"))
    assert_same(again.module.state_dict(), straight.module.state_dict(), "weights")
    assert_same(again.plugins[0].state_dict(), straight.plugins[0].state_dict(), "state")


def test_two_processes_are_one(workers: Pair) -> None:
    first, second = workers.run("tasks:shared_job", name="lwf")
    assert_same([second["weights"], second["state"]], [first["weights"], first["state"]], "rank 1 against rank 0")
    single = fit_tasks([SHARED["lwf"]()])
    assert_same(first["weights"], weights(single.module), "two processes against one", tolerance=1e-5)
    assert_same(first["state"], single.plugins[0].state_dict(), "state", tolerance=1e-5)


def test_two_processes_with_batch_statistics_have_one_teacher(workers: Pair) -> None:
    first, second = workers.run("tasks:shared_job", name="lwf", norm=True)
    assert "body.1.running_mean" in first["state"]["teacher"]
    assert_same([second["weights"], second["state"]], [first["weights"], first["state"]], "rank 1 against rank 0")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_beside_sam_each_pass_has_the_term_and_one_teacher(accumulate: int) -> None:
    expected = fit_tasks([lwf()], accumulate_grad_batches=accumulate)
    found = fit_tasks([SAM(rho=1e-30), lwf()], accumulate_grad_batches=accumulate)
    assert_same(weights(found.module), weights(expected.module), "weights", tolerance=1e-5)

    class Modes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            modes.append(self.training)
            return super().training_step(batch, batch_idx)

    modes: list[bool] = []
    fit_tasks([SAM(), lwf()], module=Modes(norm=False), accumulate_grad_batches=accumulate)
    # Before the switch two passes for each batch, after it a third for the teacher.
    assert modes.count(False) == accumulate * (STEPS - SWITCHES[0])
    assert modes.count(True) == 2 * accumulate * STEPS


class TaskData(LightningDataModule):
    """Names its tasks, and the classes of each."""

    def __init__(self, classes: list[list[int]], task_incremental: bool = False) -> None:
        super().__init__()
        self.task_classes = classes
        self.task_incremental = task_incremental
        self.current_task = 0

    def train_dataloader(self) -> DataLoader:
        return loader(0, STEPS)


class Switches(Callback):
    """Moves the datamodule on, as a stream does when a batch of another task comes."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.datamodule.current_task = sum(trainer.global_step >= step for step in SWITCHES)


class FourClasses(NetWith):
    def __init__(self) -> None:
        super().__init__(sgd, norm=False)
        self.head = nn.Linear(8, 4)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.head.register_forward_hook(self.keep)

    def keep(self, head: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append((output.detach(), torch.tensor(self.training)))


def named_run(data: TaskData) -> tuple[LwF, FourClasses, list[float]]:
    plugin, module, terms = lwf(task_steps=None), FourClasses(), []

    class Terms(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            terms.append(float(trainer.callback_metrics.get("lwf_loss", 0.0)))

    trainer = Trainer(**QUIET, devices=1, max_epochs=1, callbacks=[plugin, Terms(), Switches()])
    trainer.fit(module, datamodule=data)
    return plugin, module, terms


@pytest.mark.parametrize("task_incremental", [False, True])
def test_the_classes_of_past_tasks_are_compared(task_incremental: bool) -> None:
    data = TaskData([[0, 2], [3, 1], [0, 1, 2, 3]], task_incremental)
    plugin, module, terms = named_run(data)
    assert plugin.state_dict()["past"] == [0, 1]
    passes = iter(module.seen)
    for step in range(STEPS):
        past = next(passes)[0] if step >= SWITCHES[0] else None
        now = next(passes)[0]
        if past is None:
            assert terms[step] == 0.0
            continue
        groups = [[0, 2]] if step < SWITCHES[1] else [[0, 2], [1, 3]] if task_incremental else [[0, 1, 2, 3]]
        assert terms[step] == pytest.approx(float(LAM * distillation_loss(past, now, TEMPERATURE, groups).mean()))
    assert terms[6] > 0


def test_refuses_classes_that_are_no_logits() -> None:
    with pytest.raises(ValueError, match=r"TaskData.task_classes names \[7, 9\] for the past tasks \[0\]"):
        named_run(TaskData([[7, 9], [0], [1]]))
    with pytest.raises(ValueError, match="names no classes for the past tasks"):
        named_run(TaskData([]))


class GrowsBetween(NetWith):
    """Its head has as many outputs as classes came."""

    def grow(self) -> None:
        old, self.head = self.head, nn.Linear(8, self.head.out_features + 2)
        with torch.no_grad():
            self.head.weight[: old.out_features] = old.weight
            self.head.bias[: old.out_features] = old.bias


def test_a_head_that_grows_between_fits_is_compared_in_the_old_classes() -> None:
    plugin, module = lwf(task_steps=None), GrowsBetween(sgd, norm=False)
    fit([plugin], module=module, train=loader(0, 5), max_epochs=1)
    module.grow()
    fit([plugin], module=module, train=loader(5, 9), max_epochs=1)
    assert plugin.state_dict()["outputs"] == [5, 3]
    module.grow()
    run = fit([plugin], module=module, train=loader(9, 14), max_epochs=1)
    assert plugin.state_dict()["outputs"] == [7, 5]
    assert any("lwf_loss" in entry for _, entry in run.logged)


class OneHeadForEachTask(NetWith):
    """Trains another head in each fit."""

    def __init__(self) -> None:
        super().__init__(sgd, norm=False)
        self.heads = nn.ModuleList([self.head, nn.Linear(8, 3)])
        del self.head
        self.present = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.present](self.body(x)).sum(1, keepdim=True)


def test_refuses_a_head_that_no_task_has_trained() -> None:
    plugin, module = lwf(task_steps=None, logits=None), OneHeadForEachTask()
    fit([plugin], module=module, train=loader(0, 5), max_epochs=1)
    module.present = 1
    with pytest.raises(ValueError, match=r"LwF: the logits are the output of 'heads.1' now, .* 'heads.0' in the last"):
        fit([plugin], module=module, train=loader(5, 9), max_epochs=1)


def test_a_checkpoint_knows_the_head_of_the_last_task(tmp_path: Path) -> None:
    plugin, module, path = lwf(task_steps=None, logits=None), OneHeadForEachTask(), str(tmp_path / "end.ckpt")
    fit([plugin], module=module, train=loader(0, 5), max_epochs=1).trainer.save_checkpoint(path)
    resumed, other = lwf(task_steps=None, logits=None), OneHeadForEachTask()
    other.present = 1
    resumed_fit = {"module": other, "train": loader(5, 9), "max_epochs": 2, "ckpt_path": path}
    with pytest.raises(ValueError, match=r"'heads.0' in the last"):
        fit([resumed, StartsTask(resumed)], **resumed_fit)


class StartsTask(Callback):
    def __init__(self, plugin: LwF) -> None:
        self.plugin = plugin

    def on_train_start(self, *_: Any) -> None:
        self.plugin.start_task(1)


def test_refuses_a_head_that_is_replaced_within_a_task() -> None:
    class Grows(GrowsBetween):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 6:
                self.grow()
                self.trainer.optimizers[0].add_param_group({"params": list(self.head.parameters()), "lr": 0.05})

    plugin = lwf(task_steps=[5], logits=None)
    with pytest.raises(ValueError, match=r"'head' did not run"):
        # The hook is on the old head.
        fit([plugin], module=Grows(sgd, norm=False), train=loader(0, 14), max_epochs=1)


def test_an_unfrozen_weight_is_the_teachers_as_it_was_at_the_switch() -> None:
    class Thaws(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.body.requires_grad_(trainer.current_epoch > 0)

    class Starts(NetWith):
        def on_train_start(self) -> None:
            self.started = weights(self)

    plugin, module = lwf(task_steps=[2]), Starts(sgd, norm=False)
    fit_tasks([plugin, Thaws()], module=module)
    assert_same(plugin.state_dict()["teacher"]["body.0.weight"], module.started["body.0.weight"], "what was frozen")
    assert plugin.state_dict()["frozen"] == []
    assert not torch.equal(module.body[0].weight, module.started["body.0.weight"])


class Shrinks(Net):
    """Scores three samples less in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x[3:])

    def loss(self, batch: Any) -> Tensor:
        return self(batch[0]).mean()


def test_refuses_logits_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"shape \(8, 3\), and at the last task's weights, .* \(5, 3\)"):
        fit_tasks([lwf()], module=Shrinks(norm=False))


def test_refuses_a_model_whose_parts_went_away() -> None:
    class Loses(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 6:
                self.body[0] = nn.Linear(6, 8, bias=False)

    with pytest.raises(ValueError, match=r"LwF: 'body.0.bias' of Loses went away"):
        fit_tasks([lwf()], module=Loses(norm=False))


def test_a_weight_of_zero_keeps_nothing_and_another_module_starts_anew() -> None:
    off = lwf(lam=0.0)
    fit_tasks([off])
    assert off.state_dict()["teacher"] == {}
    plugin = lwf()
    first = fit_tasks([plugin])
    again = fit_tasks([plugin])
    assert_same(weights(again.module), weights(first.module), "another module")
    copy.deepcopy(pickle.loads(pickle.dumps(plugin)))


def test_refuses_manual_optimisation() -> None:
    with pytest.raises(ValueError, match="LwF does not work with manual optimisation"):
        fit([lwf()], module=ManualNet(), max_steps=1)


@pytest.mark.parametrize("settings", [{"lam": -1.0}, {"temperature": 0.0}, {"logits": ""}, {"task_steps": [0]}])
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        LwF(**settings)
