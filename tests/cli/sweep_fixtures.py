"""A config, a grid of twelve runs, and what stands in for their subprocesses, for the tests of the sweep."""

import time
from pathlib import Path

import yaml

from lightning_stable.cli._sweep_grid import write_json

CONFIG = """
vars: {lr: 0.01}
model:
  class_path: lightning_stable.recipes.image_classifier.ImageClassifier
  init_args: {architecture: mlp, width: 16, lr: "${vars.lr}"}
data: {class_path: lightning_stable.data.digits.DigitsDataModule}
trainer: {accelerator: cpu, max_steps: 3, limit_val_batches: 1, enable_model_summary: false}
"""
TWELVE = ["--config", "mine.yaml", "--seeds", "2", "--lr", "3e-3", "1e-3", "0.01", "--precision", "e8m7", "e8m3"]


def record_of(lr, seed, precision):
    """What a stand-in for a run records: coarse formats diverge at high rates."""
    lost = lr >= 0.01 and precision == "e8m3"
    final = None if lost and seed else 3.0 if lost else 0.5 + seed / 10
    return {"metric": "val_loss", "steps": 5, "initial": 2.3, "best": 0.4, "final": final, "curve": [[5, final]]}


class StandIn:
    """Takes the place of a subprocess; notes what it was asked for."""

    def __init__(self, codes=None):
        self.codes = codes or {}
        self.seconds = 0.0
        self.say = None
        self.jobs = []

    def __call__(self, job, started=None):
        folder = Path(job.folder)
        self.jobs.append(job)
        time.sleep(self.seconds)
        code = self.codes.get(folder.name, 0)
        said = self.say or f"lightning-stable: error: it broke with {code}."
        (folder / "log.txt").write_text(f"some lines\n{said}\n\n")
        checkpoint = folder / "logs" / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        if code == 0:
            settings = yaml.safe_load((folder / "run.yaml").read_text())["trainer"]
            record = (settings.get("callbacks+") or settings["callbacks"])[-1]["init_args"]
            options = dict(zip(job.command, job.command[1:], strict=False))
            (plugin,) = settings["plugins"] or [{"init_args": {"weights": settings["precision"]}}]
            values = float(job.command[-3]), int(options["--seed_everything"]), plugin["init_args"]["weights"]
            write_json(Path(record["path"]), record_of(*values))
        return code, 0.5

    @property
    def names(self):
        return sorted(Path(job.folder).name for job in self.jobs)
