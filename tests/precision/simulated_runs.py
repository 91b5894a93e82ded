"""What tests of the simulated precision share: settings, a module, and fits that two processes run together."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from lightning_stable._glue.quiet import is_quiet
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision import simulated
from lightning_stable.precision.simulated import SimulatedPrecision
from lightning_stable.testing.harness import Net, SaveAt, assert_same, fit
from lightning_stable.testing.strategy_checks import begin
from lightning_stable.testing.workers import of_rank_zero

# Fits of a few steps, which a helper or a teacher outlasts, of layers smaller than a rank.
SHORT = ("ignore:helper_rank=.* fades over", "ignore:helper_rank=.* is cut", "ignore:teacher_steps=.* is no shorter")

RANDOM: dict[str, Any] = {
    "weights": "int4",
    "activations": "int4",
    "gradients": "int4",
    "scaling": "row",
    "rounding": "stochastic",
    "exclude": (),
    "check_gradients": False,
}


INT8: dict[str, Any] = {
    "weights": "int8",
    "activations": "int8",
    "gradients": "int8",
    "scaling": "row",
    "exclude": (),
}
STOCHASTIC: dict[str, Any] = {**INT8, "weights": "int4", "rounding": "stochastic"}


def taught(modules: Any = ("body.0",), steps: int = 100, **settings: Any) -> SimulatedPrecision:
    """Return a precision under which modules have a teacher's outputs."""
    low = {**INT8, "weights": "int3", "activations": "int3", "gradients": None, "check_gradients": False}
    return SimulatedPrecision(**{**low, "teacher_modules": modules, "teacher_steps": steps, **settings})


def told_of_fit(**settings: Any) -> tuple[list[str], list[str]]:
    """Return the lines that are told in a fit, and its warnings."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as warned, patch.object(simulated, "rank_zero_info", lines.append):
        warnings.simplefilter("always")
        fit(**settings)
    return lines, [str(each.message) for each in warned]


def kinds(module):
    return [type(part).__name__ for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


class Watched(Net):
    """Notes the kinds of its layers in each step."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.noted = {}

    def training_step(self, batch, batch_idx):
        self.noted["train"] = kinds(self)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.noted["validate"] = kinds(self)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.noted["test"] = kinds(self)
        super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.noted["predict"] = kinds(self)
        return self(batch[0])


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


class Biased(Net):
    """Notes the biases of its first layer in each step that counts."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.used: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not is_quiet(self):
            state = quantized_layers(self)["body.0"]
            self.used.append((state.weights.exponent_bias, state.activations.exponent_bias))
        return super().training_step(batch, batch_idx)


def bias_job(folder: str) -> dict[str, Any]:
    """Search biases over four batches, save within them, resume; return what was used in each step."""
    settings = {"weights": "e2m1", "activations": "e2m1", "gradients": None, "scaling": "none", "exclude": ()}
    search = {"search_bias": True, "bias_search_batches": 4, "bias_search_metric": "tensor"}
    runs = _saved_and_resumed(folder, {**settings, **search, "check_gradients": False}, Biased)
    return {"used": runs[0].module.used, "resumed": runs[1].module.used}


def helper_job(folder: str) -> dict[str, Any]:
    """Train with a fading helper, save within a phase, resume; return the helper's factors."""
    settings = {**INT8, "weights": "int2", "helper_rank": 4, "helper_phase_steps": 3, "check_gradients": False}
    whole, resumed = _saved_and_resumed(folder, settings, lambda: Net(norm=False))
    return {"whole": whole.plugins[0].state_dict()["helper"], "resumed": resumed.plugins[0].state_dict()["helper"]}


def teacher_job(folder: str) -> dict[str, Any]:
    """Train with a teacher's outputs, save meanwhile, resume."""
    settings = {**INT8, "weights": "int2", "teacher_modules": ("body.0",), "teacher_steps": 4, "check_gradients": False}
    whole, _ = _saved_and_resumed(folder, settings, lambda: Net(norm=False))
    return {"weights": whole.module.state_dict()}


def _saved_and_resumed(folder: str, settings: dict[str, Any], make: Any) -> tuple[Any, Any]:
    """Fit, save after two steps and go on from there; the ranks and both runs end alike."""
    os.chdir(tempfile.mkdtemp(dir=folder))
    begin()
    path = str(Path(of_rank_zero(tempfile.mkdtemp(dir=folder))) / "saved.ckpt")
    common = {"devices": 2, "strategy": "ddp", "max_steps": 5}
    whole = fit([SimulatedPrecision(**settings), SaveAt(2, path)], module=make(), **common)
    assert_same(whole.module.state_dict(), of_rank_zero(whole.module.state_dict()), "a rank against rank 0")
    resumed = fit([SimulatedPrecision(**settings)], module=make(), ckpt_path=path, **common)
    assert_same(resumed.snapshot()["weights"], whole.snapshot()["weights"], "the resumed run against the whole one")
    return whole, resumed
