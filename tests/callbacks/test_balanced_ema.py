"""BalancedEMA in a Trainer: both forms against the twin, what is logged, adapters, resume state, clear errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from averages import flat
from oracles.averaging_twin import BalancedAverage
from torch import Tensor

from lightning_stable.callbacks import EMA, BalancedEMA
from lightning_stable.testing.harness import Net, Run, SaveAt, Stream, assert_same, fit


def twin_of(run: Run, form: str, fallback: float) -> tuple[BalancedAverage, list[list[float]]]:
    twin = BalancedAverage(flat(run.steps[0].before), form=form, fallback=fallback)
    return twin, [twin.update(flat(s.weights), flat(s.before), flat(s.gradients)) for s in run.steps]


class Steep(Net):
    """Moves far enough for the released form to give numbers in (0, 1), which it does for large tensors else."""

    def loss(self, batch: Any) -> Tensor:
        return 15 * super().loss(batch)


@pytest.mark.parametrize("form", ["derived", "released"])
def test_both_forms_and_what_they_log(form: str) -> None:
    run = fit([BalancedEMA(form, fallback_decay=0.6)], module=Steep(), max_steps=12, limit_val_batches=0)
    twin, coefficients = twin_of(run, form, 0.6)
    for value, expected in zip(run.module.parameters(), twin.shadow, strict=True):
        assert value.detach().double().flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=2e-5)
    means = [entry["balanced_ema/coefficient"] for _, entry in run.logged if "balanced_ema/coefficient" in entry]
    rates = [entry["balanced_ema/fallback_rate"] for _, entry in run.logged if "balanced_ema/coefficient" in entry]
    assert means == pytest.approx([sum(step) / len(step) for step in coefficients], rel=1e-4)
    assert rates == pytest.approx([sum(value == 0.6 for value in step) / len(step) for step in coefficients])
    assert rates[0] == 1.0, "the first step has no gradient to compare with"
    assert min(rates) < 1.0, "the formula itself was never used"


def test_the_forms_differ() -> None:
    ends = [
        fit([BalancedEMA(form)], max_steps=12, limit_val_batches=0).module.state_dict()
        for form in ("derived", "released")
    ]
    assert not torch.allclose(ends[0]["head.weight"], ends[1]["head.weight"])


def test_only_what_trains_is_averaged() -> None:
    module = Net()
    module.body.requires_grad_(False)
    run = fit([callback := BalancedEMA()], module=module, validation=Stream(2, seed=5), max_steps=6)
    assert sorted(callback.state_dict()["shadow"]) == ["head.bias", "head.weight"]
    assert len(run.steps) == 6


def test_the_gradients_of_the_last_step_are_in_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    run = fit([BalancedEMA(), SaveAt(5, str(path))], max_steps=7, limit_val_batches=0)
    state = torch.load(path, weights_only=True)["callbacks"]["BalancedEMA"]
    assert_same(state["gradients"], run.steps[4].gradients, "gradients in the checkpoint")
    assert_same(BalancedEMA.load_weights(path, "live")["head.bias"], run.steps[4].weights["head.bias"], "live")


def test_a_parameter_without_a_gradient_falls_back() -> None:
    class Skips(Net):
        def loss(self, batch: Any) -> Tensor:
            self.head.bias.requires_grad_(self.global_step != 3 or not self.training)
            return super().loss(batch)

    run = fit([BalancedEMA("derived", fallback_decay=0.6)], module=Skips(), max_steps=6, limit_val_batches=0)
    rates = [entry["balanced_ema/fallback_rate"] for _, entry in run.logged if "balanced_ema/fallback_rate" in entry]
    assert all(0 <= rate <= 1 for rate in rates)
    assert torch.isfinite(run.module.head.bias).all()
    assert "head.bias" not in run.steps[3].gradients


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "paper"}, r"form='paper' is unknown. Choose one of 'derived', 'released'"),
        ({"fallback_decay": 1.0}, r"fallback_decay=1.0 is not in \[0, 1\)"),
        ({"buffers": "average"}, r"buffers='average' is not possible"),
        ({"validate_with": "raw"}, r"validate_with='raw' is unknown"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedEMA(**settings)


def test_two_averages_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"EMA and BalancedEMA|BalancedEMA and EMA"):
        fit([EMA(), BalancedEMA()], max_steps=2, limit_val_batches=0)
