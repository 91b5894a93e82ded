"""The whole run as configs/train.yaml says, for 2 steps."""

from pathlib import Path

import torch
from lightning_stable.cli.main import main

CONFIG = Path(__file__).parents[1] / "configs" / "train.yaml"
SMALL = ["--trainer.accelerator", "cpu", "--vars.devices", "1", "--trainer.limit_val_batches", "1"]
{% if cookiecutter.task == 'causal_lm' %}
SMALL += ["--vars.length", "32", "--data.init_args.max_bytes", "300000"]
{% endif %}


def test_the_run_trains_and_its_checkpoint_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where runs/ is written
    assert main(["fit", "--config", str(CONFIG), *SMALL, "--trainer.max_steps", "2"]) == 0
    (folder,) = tmp_path.glob("runs/train/version_*")
    assert "train_loss" in (folder / "metrics.csv").read_text()
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert main(["validate", "--config", str(CONFIG), *SMALL, "--ckpt_path", str(last)]) == 0
