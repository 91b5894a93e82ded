"""The proof that the oracles of adapters bite: on another start, on more that trains, and on forgotten averages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import peft_rows
from contract.settings import BY_NAME
from lightning.pytorch import LightningModule, Trainer

from lightning_stable.peft import Adapters, ReorthogonaliseLoRA
from lightning_stable.testing.harness import fit
from lightning_stable.testing.modules import prepared_by
from lightning_stable.testing.rows import STEPS, PeftSettings
from lightning_stable.testing.streams import Stream


def _lora(init: str = "pissa", alpha: float = 3.0, **settings: Any) -> Adapters:
    config = {"r": 2, "lora_alpha": alpha, "target_modules": r"body\.0|head"}
    return Adapters(config, init=init, **{"model": None, "trainable": ["*bias"], **settings})


class _TrainsTheBase(Adapters):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.head.base_layer.weight.requires_grad_(True)


class _MovesTheBase(Adapters):
    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.head.base_layer.weight[0, 0].add_(1e-6)


class _LeavesTheBase(Adapters):
    """Starts adapters from the weight, and leaves that as it was."""

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layer = pl_module.head
        layer.base_layer.weight.add_(layer.get_delta_weight("default"))


def _of(kind: type[Adapters]) -> Adapters:
    config = {"r": 2, "lora_alpha": 3.0, "target_modules": r"body\.0|head"}
    return kind(config, init="pissa", model=None, trainable=["*bias"])


class _AddsAfterTurning(ReorthogonaliseLoRA):
    """Leaves the product other than it was."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._steps == 0:
            pl_module.head.lora_B["default"].weight.mul_(1.01)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("adapters", lambda: _lora(init="default"), "the weight of body.0 at the start"),
        ("adapters", lambda: _lora(alpha=2.0), "the weight of body.0 at the start"),
        ("adapters", lambda: _lora(trainable=["head.bias"]), "differ"),
        ("adapters", lambda: _of(_TrainsTheBase), "differ"),
        ("adapters", lambda: _of(_MovesTheBase), "frozen weights at the end"),
        ("adapters", lambda: _of(_LeavesTheBase), "the base of head"),
        ("reorthogonalise_lora", lambda: ReorthogonaliseLoRA(5, moments="reset"), "after step 5"),
        ("reorthogonalise_lora", lambda: ReorthogonaliseLoRA(4), "weights that nobody may change after step 3"),
        ("reorthogonalise_lora", lambda: _AddsAfterTurning(5), "B of head"),
    ],
)
def test_the_oracles_bite(name: str, make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    settings = BY_NAME[name].settings
    assert isinstance(settings, PeftSettings)
    with prepared_by(settings.prepare):
        run = fit([plugin := make()], validation=Stream(2, seed=5), max_steps=STEPS)
        with pytest.raises(AssertionError, match=message):
            settings.oracle(run, plugin)


@pytest.mark.parametrize("name", ["loldu", "svfit"])
def test_the_oracles_tell_one_kind_from_the_other(name: str, tmp_path: Path) -> None:
    other = {"loldu": peft_rows.svfit_adapters, "svfit": peft_rows.loldu_adapters}[name]
    run = fit([plugin := other()], max_steps=STEPS)
    with pytest.raises(KeyError, match=f"{name}_vector"):
        BY_NAME[name].settings.oracle(run, plugin)
