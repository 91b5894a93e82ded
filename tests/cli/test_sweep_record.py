"""The callback in each run of a sweep: what it writes down, and when it ends a run."""

import math
import os

import pytest
import torch
from cli_fixtures import CliData, CliModule
from lightning.pytorch import Trainer

from lightning_stable.cli._sweep_grid import read_json
from lightning_stable.cli._sweep_pool import PARENT_VARIABLE
from lightning_stable.cli._sweep_record import SweepRecord
from lightning_stable.cli._sweep_report import divergence


def trained(path, module=None, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    defaults = {**quiet, "enable_checkpointing": False, "max_steps": 5, "limit_val_batches": 1}
    record = SweepRecord(str(path), settings.pop("metric", "val_loss"))
    trainer = Trainer(**{**defaults, **settings}, callbacks=[record])
    module = CliModule() if module is None else module
    trainer.fit(module, datamodule=CliData())
    return trainer, module


class Lost(CliModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step >= 2 else loss


def test_the_last_value_is_that_of_the_last_step(tmp_path):
    trainer, module = trained(tmp_path / "record.json")  # epochs of four batches, so no validation after the fifth
    record = read_json(tmp_path / "record.json")
    assert [step for step, _ in record["curve"]] == [4, 5]
    with torch.no_grad():
        expected = float(module(torch.ones(2, 4)).pow(2).mean())
    assert record["final"] == pytest.approx(expected)
    assert record["best"] == min(value for _, value in record["curve"])
    assert record["initial"] > record["curve"][0][1]
    assert record["steps"] == trainer.global_step == 5


def test_the_first_loss_is_that_of_whole_batches(tmp_path):
    records = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        trained(tmp_path / "record.json", accumulate_grad_batches=accumulate)
        records.append(read_json(tmp_path / "record.json"))
    assert records[0]["initial"] == pytest.approx(records[1]["initial"])


def test_a_run_that_is_lost_ends_early(tmp_path):
    trainer, _ = trained(tmp_path / "record.json", Lost(), max_steps=400)
    assert trainer.global_step == 40, "looked at after 20 steps and after 40"
    record = read_json(tmp_path / "record.json")
    assert record["final"] is None
    assert record["initial"] is not None
    assert divergence(record)


def test_a_value_of_training_does_where_there_is_no_validation(tmp_path):
    trained(tmp_path / "record.json", limit_val_batches=0, metric="train_loss")
    assert read_json(tmp_path / "record.json")["final"] is not None
    with pytest.raises(ValueError, match=r"no 'val_los' among what this run logs: train_loss, val_loss"):
        trained(tmp_path / "other.json", metric="val_los")
    assert not (tmp_path / "other.json").exists()


def test_a_run_whose_sweep_is_gone_ends(tmp_path, monkeypatch):
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getppid()))
    trained(tmp_path / "record.json")
    parents = iter([os.getppid(), os.getppid(), 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    with pytest.raises(RuntimeError, match="The sweep that started this run is gone"):
        trained(tmp_path / "gone.json")


def test_a_value_of_training_does_where_validation_has_not_begun(tmp_path):
    settings = {"check_val_every_n_epoch": 9, "num_sanity_val_steps": 0, "max_steps": 3}
    trainer, _ = trained(tmp_path / "record.json", metric="train_loss", **settings)
    assert trainer.enable_validation
    assert trainer.val_dataloaders is None, "the host has loaded none"
    assert read_json(tmp_path / "record.json")["final"] == float(trainer.callback_metrics["train_loss"])
