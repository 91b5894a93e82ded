"""The end of a run: the table of budgets, the picture, and where the files are."""

import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_stable.cli.main import main
from lightning_stable.cli.picture import draw_training
from lightning_stable.cli.summary import (
    _missed,
    budget_rows,
    last_validation,
    logged_budgets,
    read_metrics,
    validation_metrics,
)

LOG = """\
epoch,step,lr-AdamW,train_loss,val_accuracy,val_accuracy_live,val_loss,val_loss_live,wsd/phase
,0,0.0,,,,,,
0,0,,2.5,,,,,0.0
0,4,0.01,1.5,,,,,1.0
0,9,,,0.75,0.5,0.5,0.75,
0,9,0.001,nan,,,,,2.0
1,14,0.01,0.9,,,,,1.0
1,19,,,0.875,0.75,0.25,0.375,
1,19,0.001,0.5,,,,,2.0
"""


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / "metrics.csv").write_text(LOG)
    return read_metrics(tmp_path / "metrics.csv")


def test_metrics_are_read_by_column_without_gaps(metrics):
    assert metrics["train_loss"] == [(0, 2.5), (4, 1.5), (14, 0.9), (19, 0.5)]
    assert "epoch" not in metrics
    assert "step" not in metrics
    assert validation_metrics(metrics) == ["val_accuracy", "val_accuracy_live", "val_loss", "val_loss_live"]


def test_rows_hold_what_was_measured_at_the_budget(metrics, tmp_path):
    (tmp_path / "budget-10.ckpt").touch()
    first, second, third = budget_rows(metrics, [10, 19, 20], [tmp_path / "none", tmp_path])
    assert first.values == {"val_accuracy": 0.75, "val_accuracy_live": 0.5, "val_loss": 0.5, "val_loss_live": 0.75}
    assert first.checkpoint == tmp_path / "budget-10.ckpt"
    assert set(second.values.values()) == {None}, "no validation fell on it, though one did on the next step"
    assert second.checkpoint is None
    assert third.values["val_loss"] == 0.25
    (shifted,) = budget_rows(metrics, [19], [], late=1)
    assert shifted.values["val_loss"] == 0.25, "after a resume the log's numbers are one too high"


def test_budgets_before_a_log_have_no_row():
    metrics = {"lr-AdamW": [(605, 0.01), (611, 0.01)], "val_loss": [(629, 0.5)]}
    assert logged_budgets(metrics, [300, 600, 605, 606, 630]) == [606, 630]
    assert logged_budgets(metrics, [300, 600, 605, 606, 630], late=1) == [605, 606, 630]
    assert logged_budgets({}, [300]) == [300]


def test_the_last_validation_is_a_line(metrics):
    line = "Last validation, at step 20: val_accuracy 0.8750, val_accuracy_live 0.7500, val_loss 0.2500, "
    assert last_validation(metrics) == line + "val_loss_live 0.3750\n"
    assert last_validation({"val_loss": [(9, 0.5)], "val_accuracy": [(4, 0.25)]}) == (
        "Last validation, at step 10: val_loss 0.5000\n"
    )
    assert "at step 19:" in last_validation(metrics, late=1)
    assert last_validation({"train_loss": metrics["train_loss"]}) == ""


@pytest.mark.parametrize(
    "columns",
    [
        None,
        ["train_loss"],
        ["lr-AdamW"],
        ["val_loss", "val_loss_live"],
        ["val_accuracy", "wsd/phase"],
    ],
    ids=["all", "loss", "rate", "validation", "phases"],
)
def test_a_picture_is_drawn_from_any_columns(metrics, tmp_path, columns):
    chosen = {name: points for name, points in metrics.items() if columns is None or name in columns}
    path = tmp_path / "run" / "version_0" / "training.png"
    assert draw_training(chosen, path, budgets=[10, 20])
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_there_is_no_picture_of_nothing(metrics, tmp_path):
    assert not draw_training({"wsd/phase": metrics["wsd/phase"]}, tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()


@pytest.fixture
def quickstart(tmp_path, monkeypatch, capsys):
    """Run the quickstart for 8 steps in an empty directory and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    previous = signal.getsignal(signal.SIGINT)

    def run(*options):
        quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
        assert main(["run", "quickstart", "--trainer.max_steps", "8", *quiet, *options]) == 0
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGINT, previous)


def test_the_quickstart_ends_with_a_table_a_picture_and_the_place(quickstart, tmp_path):
    out = quickstart("--trainer.log_every_n_steps", "1")
    folder = tmp_path / "runs/quickstart/version_0"
    lines = out.splitlines()
    for budget in (2, 4, 8):
        (row,) = [line.split() for line in lines if line.split()[:1] == [str(budget)]]
        assert row[-1] == f"budget-{budget}.ckpt"
        assert (folder / "checkpoints" / row[-1]).is_file()
        assert len(row) == 6
        assert all(float(value) >= 0 for value in row[1:5]), "both weight sets were measured at every budget"
    assert "live weights" in out
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 8, "last.ckpt is the last"
    assert lines[-3:] == [
        "Checkpoints: runs/quickstart/version_0/checkpoints",
        "Picture: runs/quickstart/version_0/training.png",
        "The run's files are in runs/quickstart/version_0",
    ]
    assert (folder / "training.png").stat().st_size > 10_000
    assert (folder / "config.yaml").is_file()
    assert {"lr-AdamW", "train_loss", "wsd/phase", "val_loss", "val_loss_live"} <= set(
        read_metrics(folder / "metrics.csv")
    )


@pytest.mark.parametrize("steps", ["9", "14"])
def test_the_quickstart_measures_every_budget_whatever_its_length(quickstart, steps):
    out = quickstart("--trainer.max_steps", steps, "--trainer.log_every_n_steps", "4")
    assert "No validation ran" not in out


def test_empty_cells_are_explained(quickstart):
    out = quickstart("--trainer.val_check_interval", "3", "--vars.budgets", "[3, 5]")
    (line,) = [line for line in out.splitlines() if "No validation ran" in line]
    assert "at steps 5, 8." in line
    assert line.endswith("let trainer.val_check_interval, now 3, divide the budgets and trainer.max_steps.")


@pytest.mark.parametrize(
    ("steps", "max_steps", "epochs", "ending"),
    [
        ([8], 8, None, "divide trainer.max_steps."),
        ([8], 9, None, "divide the step at which the run ends."),
        ([4], 8, 1, "divide the budgets, with check_val_every_n_epoch: null."),
    ],
    ids=["the last", "ended early", "a budget"],
)
def test_what_an_interval_has_to_divide(steps, max_steps, epochs, ending):
    trainer = SimpleNamespace(global_step=8, max_steps=max_steps, val_check_interval=3, check_val_every_n_epoch=epochs)
    assert _missed(steps, trainer).endswith(ending)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a run that goes on has a folder of its own
def test_an_interrupted_quickstart_leaves_a_checkpoint_to_go_on_from(quickstart, tmp_path, capsys):
    (tmp_path / "stopping.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Stops(Callback):\n"
        "    def on_train_batch_start(self, trainer, *args):\n"
        "        if trainer.global_step == 5:\n"
        "            raise KeyboardInterrupt\n"
    )
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_steps", "8"]
    interval = ["--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "4"]
    assert main(["run", "quickstart", *quiet, *interval, "--trainer.callbacks+=stopping.Stops"]) == 130
    assert capsys.readouterr().err.endswith(
        "lightning-stable: interrupted. The run's files are in runs/quickstart/version_0. To go on, give the same "
        "command with --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt\n"
    )
    last = tmp_path / "runs/quickstart/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5
    out = quickstart(*interval, "--ckpt_path", str(last))
    assert "At each budget" in out
    (row,) = [line.split() for line in out.splitlines() if line.split()[:1] in (["4"], ["8"])]
    assert (row[0], row[-1]) == ("8", "budget-8.ckpt"), "no row of dashes for what the earlier run has measured"
    assert "Budget 4: before the log of this run" in out


def test_without_matplotlib_it_says_how_to_get_the_picture(quickstart, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    out = quickstart("--trainer.log_every_n_steps", "4")
    assert "lightning-stable[plots]" in out
    assert "The run's files are in" in out


def test_another_logger_gets_the_place_only(quickstart):
    out = quickstart("--trainer.logger", "false", "--trainer.callbacks", "null")
    assert "metrics.csv" in out
    assert "The run's files are in" in out
