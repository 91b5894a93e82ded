"""Fits under the simulated precision that two processes run together."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from contract.harness import Net, SaveAt, assert_same, fit
from contract.strategy_checks import begin
from contract.workers import of_rank_zero

from lightning_stable.precision.simulated import SimulatedPrecision

RANDOM: dict[str, Any] = {
    "weights": "int4",
    "activations": "int4",
    "gradients": "int4",
    "scaling": "row",
    "rounding": "stochastic",
    "exclude": (),
    "check_gradients": False,
}


class Outputs(Net):
    """Keeps the outputs of one batch that every rank sees alike."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.seen = self(torch.ones(4, 6))


def random_rounding_job(folder: str) -> dict[str, Any]:
    """Fit, save in the middle, resume; return what each rank drew."""
    os.chdir(tempfile.mkdtemp(dir=folder))
    begin()

    def run(*others: Any, **settings: Any) -> Any:
        return fit(
            [SimulatedPrecision(**RANDOM), *others], module=Outputs(norm=False), max_steps=5, **common, **settings
        )

    common = {"devices": 2, "strategy": "ddp"}
    path = Path(of_rank_zero(tempfile.mkdtemp(dir=folder))) / "saved.ckpt"
    whole = run(SaveAt(2, str(path)))
    assert_same(whole.module.state_dict(), of_rank_zero(whole.module.state_dict()), "a rank against rank 0")
    resumed = run(ckpt_path=str(path))
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run against the whole one")
    return {"outputs": whole.module.seen, "resumed": resumed.module.seen}
