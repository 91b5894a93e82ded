"""Progress of long work: by Rich or tqdm as the Trainer's own, late for what may be short, and quiet where it is."""

import sys
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.errors import LiveError

from lightning_stable._glue import progress as glue
from lightning_stable._glue.progress import follow, follow_command, progress
from lightning_stable.callbacks import EMA, EWC
from lightning_stable.testing.harness import Net, Stream


class Bar:
    """Stands in for a bar, and keeps what it was told."""

    made: list["Bar"]

    def __init__(self, told, total, done):
        self.told, self.total, self.done, self.open = told, total, done, True
        Bar.made.append(self)

    def update(self, count):
        self.done += count

    def close(self):
        self.open = False


@pytest.fixture
def bars(monkeypatch):
    """What is shown: by which library, and the bars."""
    Bar.made = []
    kinds = []
    for kind in ("rich", "tqdm"):
        monkeypatch.setattr(glue, f"_{kind}_bar", lambda *given, kind=kind: kinds.append(kind) or Bar(*given))
    return kinds


def trainer_with(bar, *, zero=True):
    return SimpleNamespace(progress_bar_callback=bar, is_global_zero=zero)


@pytest.mark.parametrize(("own", "kind"), [(RichProgressBar, "rich"), (TQDMProgressBar, "tqdm")])
def test_it_is_shown_as_the_trainers_own(own, kind, bars):
    assert list(progress(trainer_with(own()), "abc", "told", 3, delay=0)) == ["a", "b", "c"]
    (bar,) = Bar.made
    assert (bars, bar.told, bar.total, bar.done, bar.open) == ([kind], "told", 3, 3, False)


def test_it_is_quiet_where_the_trainer_is(bars):
    off = TQDMProgressBar()
    off.disable()
    for trainer in (trainer_with(None), trainer_with(TQDMProgressBar(), zero=False), trainer_with(off)):
        assert list(progress(trainer, range(3), "told", delay=0)) == [0, 1, 2]
    assert Bar.made == []


def test_short_work_shows_nothing_and_long_work_what_is_done_already(bars, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds in (0.1, 0.4):
        for _ in progress(trainer_with(TQDMProgressBar()), range(5), "told", float("inf")):
            now[0] += seconds
    (bar,) = Bar.made
    assert (bar.total, bar.done, bar.open) == (None, 5, False)


def test_the_bar_goes_when_the_work_fails(bars):
    def fail():
        with follow(trainer_with(RichProgressBar()), "told", 9, 0) as advance:
            advance()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [(bar.done, bar.open) for bar in Bar.made] == [(1, False)]


@pytest.mark.parametrize("own", [RichProgressBar, TQDMProgressBar])
def test_the_real_bars_are_gone_afterwards(own, capsys):
    for item in progress(trainer_with(own()), [1, 2], "counting things", 2, delay=0):
        assert item
    assert "counting things" in "".join(capsys.readouterr()) or own is RichProgressBar


def test_a_rich_that_shows_one_at_a_time_is_no_failure(monkeypatch):
    def refuse(self):
        raise LiveError("Only one live display may be active at once")

    monkeypatch.setattr("rich.progress.Progress.start", refuse)
    assert list(progress(trainer_with(RichProgressBar()), [1, 2], "told", 2, delay=0)) == [1, 2]


@pytest.mark.parametrize("shown", [True, False])
def test_a_second_validation_and_the_fisher_information_show_in_a_fit(shown, bars, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "__defaults__", (None, 0.0))
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    settings |= {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_progress_bar": shown}
    callbacks = [EMA(validate_with="both"), EWC(task_steps=[6], samples=4)]
    Trainer(callbacks=callbacks, **settings).fit(Net(), Stream(), Stream(2, seed=5))
    told = {bar.told for bar in Bar.made}
    assert ({"Validation of the other weights", "Fisher information of the task"} <= told) == shown
    assert {bar.total for bar in Bar.made if bar.told.startswith("Valid")} == ({2} if shown else set())
    assert not [bar for bar in Bar.made if bar.open]


def test_a_command_shows_nothing_off_a_terminal(capsys, monkeypatch):
    with follow_command("Sweep", 3, 1) as advance:
        advance()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with follow_command("Sweep", 3, 1) as advance:
        advance()
    assert "\x1b" in capsys.readouterr().out  # it moved the cursor, and took the bar away
