"""Which task is trained on, from each source, over several fits and after a resume."""

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lightning_stable.callbacks import EWC, LAE, L2Anchor, LwF
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.testing.harness import Net, SaveAt, Stream, fit


class Watch(Callback):
    """Notes the task of each batch, and where it changed."""

    def __init__(self, task_steps: list[int] | None = None, name: str = "Watch") -> None:
        self.task_clock = TaskClock(name, task_steps)
        self.name = name
        self.tasks: list[int] = []
        self.switches: list[tuple[int, int | None, int]] = []

    @property
    @override
    def state_key(self) -> str:
        return self.name

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.task_clock.begin(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.task_clock.forget()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.task_clock.load_state_dict(state_dict)

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.task_clock.advance(trainer):
            self.switches.append((trainer.global_step, self.task_clock.previous, self.task_clock.task))
        self.tasks.append(self.task_clock.task)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.task_clock.state_dict()


def test_each_fit_of_a_module_is_a_task_and_another_module_starts_anew() -> None:
    watch, module = Watch(), Net()
    for _ in range(3):
        fit([watch], module=module, max_steps=2)
    assert watch.tasks == [0, 0, 1, 1, 2, 2]
    assert watch.switches == [(0, 0, 1), (0, 1, 2)]
    fit([watch], module=Net(), max_steps=2)
    assert watch.tasks[-2:] == [0, 0]
    assert len(watch.switches) == 2


def test_a_fit_without_a_batch_is_no_task() -> None:
    watch, module = Watch(), Net()
    fit([watch], module=module, max_steps=0)
    fit([watch], module=module, max_steps=2)
    assert watch.tasks == [0, 0]


def test_steps_count_optimizer_steps_under_accumulation() -> None:
    watch = Watch([1, 3])
    fit([watch], max_steps=4, accumulate_grad_batches=2)
    assert watch.tasks == [0, 0, 1, 1, 1, 1, 2, 2]


def test_steps_given_to_one_callback_hold_for_all() -> None:
    one, other = Watch([2], "one"), Watch(None, "other")
    fit([other, one], max_steps=3)
    assert one.tasks == other.tasks == [0, 0, 1]


def test_what_is_asked_of_one_callback_holds_for_all_and_wins_over_steps() -> None:
    one, other = Watch([1], "one"), Watch(None, "other")

    class Ask(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                other.task_clock.ask(4)

    fit([one, other, Ask()], max_steps=4)
    assert one.tasks == other.tasks == [0, 1, 4, 4]


def test_what_was_asked_before_the_first_fit_holds() -> None:
    watch = Watch()
    watch.task_clock.ask(2)
    fit([watch], max_steps=1)
    assert watch.tasks == [2]


def test_two_lists_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one was given task_steps=\[2\] and other task_steps=\[3\]"):
        fit([Watch([2], "one"), Watch([3], "other")], max_steps=1)


@pytest.mark.parametrize("steps", [[0], [3, 3], [4, 2], [1.5], [True]])
def test_steps_that_are_none_are_refused(steps: list[Any]) -> None:
    with pytest.raises(ValueError, match="increasing numbers of optimizer steps"):
        TaskClock("Watch", steps)


@pytest.mark.parametrize("task", [-1, 1.0, True, "1"])
def test_a_task_that_is_none_is_refused(task: Any) -> None:
    with pytest.raises(ValueError, match="a whole number from 0 on"):
        TaskClock("Watch").ask(task)


def test_the_datamodule_says_which_task_it_is() -> None:
    class Tasks(LightningDataModule):
        task_names = ("a", "b")

        @override
        def train_dataloader(self) -> Stream:
            return Stream()

        @property
        def current_task(self) -> int:
            return int(self.trainer.global_step >= 2)

    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=3,
        callbacks=[watch],
    )
    trainer.fit(Net(), datamodule=Tasks())
    assert watch.tasks == [0, 0, 1]
    assert watch.task_clock.names(trainer) == ["a", "b"]


def test_a_resumed_fit_stays_in_its_task(tmp_path: Any) -> None:
    watch, module = Watch(), Net()
    fit([watch], module=module, max_steps=2)
    run = fit([watch], module=module, max_steps=2)
    run.trainer.save_checkpoint(tmp_path / "second.ckpt")
    state = torch.load(tmp_path / "second.ckpt", weights_only=True)
    assert state["callbacks"]["Watch"]["task"] == 1
    again, other = Watch(), Net()
    fit([again], module=other, max_steps=4, ckpt_path=str(tmp_path / "second.ckpt"))
    assert again.tasks == [1, 1]
    fit([again], module=other, max_steps=1)
    assert again.tasks == [1, 1, 2]


class Late(Watch):
    """Reads its state later than the others do."""

    def __init__(self, task_steps: list[int] | None = None, name: str = "Late") -> None:
        super().__init__(task_steps, name)
        self.read: dict[str, Any] | None = None

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.read = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.read is not None:
            self.task_clock.load_state_dict(self.read)


class AskThem(Callback):
    """Asks for tasks at the ends of steps, each of one callback."""

    def __init__(self, asked: dict[int, tuple[Watch, int]]) -> None:
        self.asked = asked

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.asked:
            watch, task = self.asked[trainer.global_step]
            watch.task_clock.ask(task)


@pytest.mark.parametrize("last", ["early", "late"])
def test_what_was_asked_last_stays_the_last_after_a_resume(last: str, tmp_path: Any) -> None:
    path = str(tmp_path / "saved.ckpt")

    def watches() -> dict[str, Watch]:
        return {"late": Late(name="late"), "early": Watch(name="early")}

    straight = watches()
    first = "late" if last == "early" else "early"
    asked = {2: (straight[first], 1), 4: (straight[last], 2)}
    fit([*straight.values(), AskThem(asked), SaveAt(6, path)], max_steps=9)
    assert straight["early"].tasks == straight["late"].tasks == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    again = watches()
    fit([*again.values(), AskThem({7: (again[first], 5)})], max_steps=9, ckpt_path=path)
    assert again["early"].tasks == again["late"].tasks == [2, 5, 5]


def test_a_resumed_run_saves_what_the_run_does_that_it_goes_on_from(tmp_path: Any) -> None:
    """Whatever was asked before in this process."""
    path, runs = str(tmp_path / "saved.ckpt"), []
    for ckpt_path in (None, path):
        one, other = Watch(name="one"), Watch(name="other")
        asks = AskThem({2: (one, 1), 5: (other, 3)})
        fit([one, other, asks, SaveAt(3, path)], max_steps=7, ckpt_path=ckpt_path)
        runs.append([one.state_dict(), other.state_dict()])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("which", [0, 1])
def test_what_was_asked_before_a_resume_wins_over_what_the_checkpoint_asked(which: int, tmp_path: Any) -> None:
    path, run = str(tmp_path / "saved.ckpt"), [Watch(name="one"), Late(name="other")]
    asks = AskThem({1: (run[1], 7), 2: (run[0], 1), 3: (run[1], 2)})
    fit([*run, asks, SaveAt(4, path)], max_steps=4)
    for again in ([Watch(name="one"), Late(name="other")], run):
        again[which].task_clock.ask(3)
        before = len(again[0].tasks)
        fit(list(again), max_steps=6, ckpt_path=path)
        assert [watch.tasks[before:] for watch in again] == [[3, 3], [3, 3]]
        assert all(watch.switches[-1] == (4, 2, 3) for watch in again)


def test_what_was_asked_after_a_fit_is_in_a_checkpoint_that_is_saved_then(tmp_path: Any) -> None:
    path, run = str(tmp_path / "saved.ckpt"), [Watch(name="one"), Watch(name="other")]
    done = fit([*run, AskThem({2: (run[1], 1)})], max_steps=3)
    run[1].task_clock.ask(5)
    run[0].task_clock.ask(4)
    done.trainer.save_checkpoint(path)
    again = [Watch(name="one"), Watch(name="other")]
    fit(list(again), max_steps=4, ckpt_path=path)
    assert again[0].tasks == again[1].tasks == [4]


def test_what_was_asked_in_a_fit_does_not_outlive_a_resume_of_an_earlier_point(tmp_path: Any) -> None:
    path, watch = str(tmp_path / "saved.ckpt"), Watch()
    fit([watch, AskThem({3: (watch, 5)}), SaveAt(2, path)], max_steps=5)
    assert watch.tasks == [0, 0, 0, 5, 5]
    fit([watch], max_steps=4, ckpt_path=path)
    assert watch.tasks[5:] == [0, 0]


def test_what_was_asked_before_the_fit_of_another_module_holds() -> None:
    watch = Watch()
    watch.task_clock.ask(4)
    fit([watch], module=Net(), max_steps=1)
    fit([watch], module=Net(), max_steps=1)
    watch.task_clock.ask(2)
    fit([watch], module=Net(), max_steps=1)
    assert watch.tasks == [4, 0, 2]


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_joins_in_a_later_fit_is_in_the_task_of_the_others(first: bool) -> None:
    old, new, module = Watch(name="old"), Watch(name="new"), Net()
    fit([old], module=module, max_steps=1)
    for _ in range(2):
        fit([new, old] if first else [old, new], module=module, max_steps=2)
    assert (old.tasks, new.tasks) == ([0, 1, 1, 2, 2], [1, 1, 2, 2])
    assert new.switches == [(0, 1, 2)]


@pytest.mark.parametrize("make", [lambda: L2Anchor(), lambda: EWC(), lambda: LwF(), lambda: LAE(["head.*"])])
def test_what_had_one_task_only_says_so_once(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    plugin, module = make(), Net()
    with caplog.at_level(logging.INFO):
        fit([plugin], module=module, max_steps=2)
        assert caplog.text.count("there was one task so far") == 1
        fit([plugin], module=module, max_steps=2)
    assert caplog.text.count("there was one task so far") == 1
    assert type(plugin).__name__ in caplog.text
