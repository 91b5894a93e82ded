"""StabilityGap: what it writes, and what stays as it was."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.gap_runs import Classifier, loaders, run, samples
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_stable.callbacks.stability_gap import StabilityGap


def test_file_picture_log_and_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gap = StabilityGap(loaders(), task_steps=[3])
    with caplog.at_level(logging.INFO):
        trainer = run(gap, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    folder = Path(trainer.log_dir)
    assert json.loads((folder / "stability_gap.json").read_text()) == gap.record()
    assert (folder / "stability_gap.png").stat().st_size > 10_000
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert {"stability_gap/task_0", "stability_gap/task_1", "stability_gap/average_accuracy"} <= set(header.split(","))
    assert "at the end of task 0" in caplog.text
    assert gap.summary() in caplog.text


def test_an_interrupted_run_leaves_its_file(tmp_path: Path) -> None:
    class Fail(Callback):
        @override
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("deliberate")

    gap = StabilityGap(loaders(), directory=str(tmp_path), task_steps=[3])
    with pytest.raises(RuntimeError, match="deliberate"):
        run(gap, Fail())
    assert json.loads((tmp_path / "stability_gap.json").read_text())["series"]["live"][0]["steps"][-1] == 4


def test_a_run_without_a_directory_says_that_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        run(StabilityGap(loaders()))
    assert "writes no stability_gap.json" in caplog.text
    assert not list(tmp_path.iterdir())


def test_training_is_untouched_with_everything_on() -> None:
    def weights(*callbacks: Callback) -> dict[str, Tensor]:
        module = Classifier()
        torch.manual_seed(11)
        run(*callbacks, module=module, data=DataLoader(samples(24, (0, 1, 2, 3), 0), batch_size=4, shuffle=True))
        return {**module.state_dict(), "random": torch.rand(4)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = weights()
        watched = weights(StabilityGap(loaders(), gradients=True, task_steps=[3], subset=9))
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("in the way")
    with pytest.raises(ValueError, match="is a file"):
        run(StabilityGap(loaders(), directory=str(blocked)))
    with pytest.warns(RuntimeWarning, match="files could not be written"):
        trainer = run(StabilityGap(loaders(), directory=str(blocked / "within"), task_steps=[3]))
    assert trainer.global_step == 8
