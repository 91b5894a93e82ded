"""The recipe ``stability_gap``: trains on digits, prints the table, writes record and picture, and shows a gap."""

import signal
import sys

import pytest
import torch

from lightning_stable.callbacks._gap_record import FILE_NAME, read_record
from lightning_stable.cli.main import main

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Run the recipe in an empty directory and return its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    previous = signal.getsignal(signal.SIGINT)

    def run(*options, expected=0):
        assert main(["run", "stability_gap", *QUIET, *options]) == expected
        return max((tmp_path / "runs/stability_gap").iterdir())

    yield run
    signal.signal(signal.SIGINT, previous)


def test_it_ends_with_a_record_a_table_and_a_picture(recipe, capsys):
    folder = recipe("--vars.tasks", "2", "--vars.epochs", "1", "--trainer.log_every_n_steps", "1")
    out, _ = capsys.readouterr()
    assert "Picture: runs/stability_gap/version_0/stability_gap.png\n" in out
    assert out.count("stability_gap.png") == 1
    assert (folder / "stability_gap.png").stat().st_size > 10_000
    record = read_record(folder / FILE_NAME)
    assert [task["name"] for task in record["tasks"]] == ["classes 0, 1, 2, 3, 4", "classes 5, 6, 7, 8, 9"]
    steps = record["switches"][1]["step"]
    for weights in ("live", "ema"):
        past, present = record["series"][weights]
        assert len(past["steps"]) >= 2 * steps, "every optimizer step is evaluated"
        assert present["steps"][0] == steps, "before the first update of the task, too"
        assert [entry["task"] for entry in record["summary"][weights]] == [0, 1]
    assert len(record["gradients"]["steps"]) > steps
    assert main(["plot", str(folder)]) == 0
    assert "after task" in capsys.readouterr().out


def test_the_optimizer_of_the_recipe_is_used(recipe):
    folder = recipe("--vars.tasks", "2", "--trainer.max_steps", "2", "--vars.lr", "0.25")
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (group,) = state["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["momentum"]) == (0.25, 0.9)
    assert "betas" not in group


SHORT = ("--vars.tasks", "2", "--vars.epochs", "1", "--vars.evaluate_every", "4")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a run that goes on has a folder of its own
def test_it_goes_on_from_a_checkpoint_to_the_same_record(recipe):
    settings = ("every_n_train_steps=22", "save_top_k=-1", "dirpath=saved")
    saving = ["--trainer.callbacks+=ModelCheckpoint", *(f"--trainer.callbacks.{setting}" for setting in settings)]
    whole = recipe(*SHORT, *saving)
    (checkpoint,) = whole.parents[2].glob("saved/*.ckpt")
    resumed = recipe(*SHORT, *saving, "--ckpt_path", str(checkpoint))
    assert resumed != whole
    assert read_record(resumed / FILE_NAME) == read_record(whole / FILE_NAME)


def test_an_interrupted_run_keeps_what_was_measured(recipe, tmp_path):
    (tmp_path / "stops_at_22.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Stops(Callback):\n"
        "    def on_train_batch_start(self, trainer, *args):\n"
        "        if trainer.global_step == 22:\n"
        "            raise KeyboardInterrupt\n"
    )
    folder = recipe(*SHORT, "--trainer.callbacks+=stops_at_22.Stops", expected=130)
    assert read_record(folder / FILE_NAME)["series"]["live"][0]["steps"] == [0, 4, 8, 12, 16, 19, 20]
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 22


def test_the_gap_is_there_and_the_average_narrows_it(recipe):
    """Three tasks of the recipe as it is: far below what is left at the end, and less so for the averaged weights."""
    folder = recipe("--trainer.max_steps", "210", "--vars.evaluate_every", "2")
    summary = read_record(folder / FILE_NAME)["summary"]
    live, ema = (summary[weights][-1] for weights in ("live", "ema"))
    assert live["average_accuracy"] > 0.7
    assert live["min_accuracy"] < live["average_accuracy"] - 0.15
    assert ema["gap_depth"] < live["gap_depth"]
