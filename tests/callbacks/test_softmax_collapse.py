"""The monitor of softmax collapse: what it reports, when, and that it changes nothing."""

import math
from typing import Any

import pytest
import torch
from gradients import entries
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.sam import SAM
from lightning_stable.callbacks.softmax_collapse import SoftmaxCollapseMonitor
from lightning_stable.testing.harness import (
    MODULES,
    DictNet,
    ManualNet,
    Net,
    Stream,
    TwoOptimizerNet,
    assert_same,
    fit,
)

NAME = "softmax_collapse"


class Classifies(LightningModule):
    """Logits that are what the batch says; the share that has collapsed is known."""

    def __init__(self, collapsed: list[float]) -> None:
        super().__init__()
        self.collapsed = collapsed
        self.before = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.rows = 4

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        share = self.collapsed[batch_idx % len(self.collapsed)]
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[100.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        rows = torch.zeros(self.rows, 2)
        rows[: round(share * self.rows), 0] = 1.0
        z = self.head(rows)
        self.log("plain", z.sum())
        return nn.functional.cross_entropy(z, z.argmax(1)) + 0.0 * self.before(rows).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_share_of_the_samples_is_reported_every_few_steps() -> None:
    shares = [0.0, 0.25, 0.5, 0.75, 1.0, 0.5]
    monitor = SoftmaxCollapseMonitor(logits="head", log_every_n_steps=2)
    run = fit([monitor], module=Classifies(shares), max_steps=6, limit_val_batches=0)
    assert entries(run.logged, NAME) == {1: 0.25, 3: 0.75, 5: 0.5}


def test_the_head_is_found() -> None:
    run = fit([monitor := SoftmaxCollapseMonitor(log_every_n_steps=1)], module=(module := Net()), max_steps=4)
    assert len(entries(run.logged, NAME)) == 4
    assert len(module.head._forward_hooks) == 0
    assert monitor._tap.name == "head"


def test_an_accumulated_batch_is_looked_at_as_a_whole() -> None:
    monitor = SoftmaxCollapseMonitor(logits="head", log_every_n_steps=2)
    shares = [1.0, 1.0, 1.0, 0.0, 0.5, 0.25]
    run = fit([monitor], module=Classifies(shares), max_steps=2, limit_val_batches=0, accumulate_grad_batches=3)
    assert entries(run.logged, NAME) == {1: 0.25}


def test_large_logits_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_stable.callbacks.softmax_collapse._ENTRIES", 4)
    monitor = SoftmaxCollapseMonitor(logits="head", log_every_n_steps=1)
    run = fit([monitor], module=Classifies([0.75]), max_steps=1, limit_val_batches=0)
    assert entries(run.logged, NAME) == {0: 0.75}


def test_the_precision_decides() -> None:
    class Narrow(Classifies):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.head.weight[0, 0] = 8.0
            z = self.head(torch.tensor([[1.0, 0.0]]))
            return loss + nn.functional.cross_entropy(z, z.argmax(1))

    for dtype, expected in (("float32", 0.0), ("bfloat16", 0.2)):
        run = fit([SoftmaxCollapseMonitor("head", dtype, 1)], module=Narrow([0.0]), max_steps=1, precision="bf16-mixed")
        assert entries(run.logged, NAME) == {0: pytest.approx(expected)}


@pytest.mark.parametrize("kind", MODULES)
def test_it_changes_no_bit(kind: str) -> None:
    def run(plugins: list[Any]) -> dict[str, Any]:
        torch.manual_seed(3)
        case = MODULES[kind]()
        done = fit(plugins, module=case.module, train=case.train, own_loaders=case.train is None, max_steps=6)
        values = [(step, {n: v for n, v in entry.items() if n != NAME}) for step, entry in done.logged]
        return {
            "weights": done.module.state_dict(),
            "logged": [entry for entry in values if entry[1]],
            "random": torch.rand(3),
            "reported": bool(entries(done.logged, NAME)),
        }

    watched, plain = run([SoftmaxCollapseMonitor(log_every_n_steps=1)]), run([])
    assert watched.pop("reported")
    assert not plain.pop("reported")
    assert_same(watched, plain, "with the monitor against without")


@pytest.mark.parametrize("module", [ManualNet, TwoOptimizerNet])
def test_manual_optimisation(module: type[Net]) -> None:
    steps = 12 if module is TwoOptimizerNet else 6
    run = fit([SoftmaxCollapseMonitor(log_every_n_steps=steps // 3)], module=module(), max_steps=steps)
    assert list(entries(run.logged, NAME)) == [1, 3, 5]


def test_passes_of_other_callbacks_are_not_counted() -> None:
    class Counts(SoftmaxCollapseMonitor):
        calls = 0

        def _count(self, logits: Tensor) -> None:
            Counts.calls += len(logits)

    for other in (SAM(), MESA(start_epoch=0)):
        Counts.calls = 0
        fit([Counts(log_every_n_steps=1), other], max_steps=5, limit_val_batches=0)
        assert Counts.calls == 5 * 8, type(other).__name__
        Counts.calls = 0
        fit([other, Counts(log_every_n_steps=1)], max_steps=5, limit_val_batches=0)
        assert Counts.calls == 5 * 8, type(other).__name__


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_a_step_without_a_forward_pass_is_left_out() -> None:
    class Skips(Classifies):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    monitor = SoftmaxCollapseMonitor(logits="head", log_every_n_steps=1)
    run = fit([monitor], module=Skips([0.25]), max_steps=4, limit_val_batches=0)
    assert set(entries(run.logged, NAME).values()) == {0.25}


def test_nothing_is_left_after_a_failure() -> None:
    module = DictNet()
    module.fail_at = ("train", 3)
    with pytest.raises(RuntimeError, match="deliberate failure"):
        fit([SoftmaxCollapseMonitor(log_every_n_steps=1)], module=module, max_steps=6)
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": ""}, r"logits='' is not the dotted name of a submodule"),
        ({"dtype": "int8"}, r"dtype='int8' is not a floating-point dtype"),
        ({"dtype": None}, r"dtype=None is no precision"),
        ({"log_every_n_steps": 0}, r"log_every_n_steps=0 is not a whole number of optimizer steps from 1 on"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftmaxCollapseMonitor(**settings)


def test_an_unknown_head_is_told_at_the_start() -> None:
    with pytest.raises(ValueError, match="logits='tail' of SoftmaxCollapseMonitor is no submodule of Net"):
        fit([SoftmaxCollapseMonitor(logits="tail")], max_steps=1)


def test_reports_are_only_at_their_steps_and_at_no_other() -> None:
    # What the module logs itself is written again at later steps of the epoch.
    run = fit([SoftmaxCollapseMonitor(log_every_n_steps=3)], train=Stream(6), max_steps=12, limit_val_batches=0)
    assert list(entries(run.logged, NAME)) == [2, 5, 8, 11]
    assert not any(math.isnan(value) for value in entries(run.logged, NAME).values())
