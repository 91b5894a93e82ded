"""MESA: its reference, and what that pass must not leave behind; the contracts compare whole runs with a twin."""

from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.sam import SAM
from lightning_stable.functional.trajectory_loss import trajectory_loss
from lightning_stable.testing.harness import Net, Run, Stream, assert_same, fit


class Curious(Net):
    """Has dropout, batch statistics and a metric, and knows in which mode it ran."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.mean = MeanMetric()
        self.modes: list[tuple[bool, bool]] = []
        self.logs: Counter[str] = Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append((self.training, torch.is_grad_enabled()))
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


def short(**settings: Any) -> MESA:
    return MESA(**{"logits": "head", "lam": 2.0, "temperature": 2.0, "start_epoch": 0, "decay": 0.5, **settings})


def test_the_reference_leaves_nothing_behind() -> None:
    """With a weight of nearly nothing, all but the reference's own pass is as without it."""
    torch.manual_seed(3)
    plain = fit([], module=Curious(), max_steps=8)
    torch.manual_seed(3)
    run = fit([short(lam=1e-30)], module=Curious(), max_steps=8)
    assert run.module.modes == [(False, False), (True, True)] * 8
    assert_same(run.module.state_dict(), plain.module.state_dict(), "weights and batch statistics")
    logged = [{name: value for name, value in entry.items() if name != "mesa_loss"} for _, entry in run.logged]
    assert_same(logged, [entry for _, entry in plain.logged], "logged values")
    assert all(part.training for part in run.module.modules())


def test_the_term_begins_at_its_epoch_and_the_average_before() -> None:
    mesa = short(start_epoch=1)
    run = fit([mesa], max_steps=12)
    assert [step for step, entry in run.logged if "mesa_loss" in entry] == list(range(6, 12))
    average = {name: value.clone() for name, value in run.steps[0].before.items()}
    for step in run.steps:
        for name, value in step.weights.items():
            average[name] = 0.5 * average[name] + 0.5 * value
    assert_same(mesa.state_dict()["average"], average, "the average", tolerance=1e-5)


def test_the_head_is_found() -> None:
    named, found = fit([short()], max_steps=8), fit([short(logits=None)], max_steps=8)
    assert_same(found.module.state_dict(), named.module.state_dict(), "the head found against the head named")


class Tied(Net):
    """Its head's weight is shared with a second layer, which the reference has to run with the average of."""

    def __init__(self) -> None:
        super().__init__(norm=False)
        self.second = nn.Linear(8, 3, bias=False)
        self.second.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.second(self.body(x)).sum(1, keepdim=True)


def test_tied_and_frozen_weights() -> None:
    module = Tied()
    module.body[0].bias.requires_grad_(False)
    mesa = short()
    fit([mesa], module=module, max_steps=4)
    assert mesa.state_dict()["average"].keys() == {
        name for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    assert module.second.weight is module.head.weight


def test_the_reference_of_a_tied_layer_is_the_averages() -> None:
    """The named layer shares its weight with another one, under whose name the average is kept."""
    run = fit([short(logits="second")], module=Tied(), max_steps=2)
    before, after = run.steps[0].before, run.steps[0].weights
    average = {name: 0.5 * before[name] + 0.5 * after[name] for name in before}
    x = Stream().batch(1)[0]

    def logits(weights: dict[str, Tensor]) -> Tensor:
        module = Tied()
        module.load_state_dict({**weights, "second.weight": weights["head.weight"]})
        with torch.no_grad():
            return module.second(module.body(x))

    expected = 2.0 * trajectory_loss(logits(average), logits(after), 2.0).mean()
    assert run.logged[1][1]["mesa_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_beside_the_hosts_pruning() -> None:
    """It puts other parameters in the place of those that the average began with."""
    pruning = ModelPruning("l1_unstructured", amount=0.3, apply_pruning=True)
    run = fit([short(), pruning], max_epochs=2)
    assert len(run.steps) == 12


def test_metrics_with_two_names_count_once() -> None:
    class TwoNames(Curious):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.mean

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.again.update(loss)
            return loss

    module = TwoNames()
    updates: list[int] = []

    class Counts(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            updates.append(module.mean.update_count)

    fit([short(), SAM(), Counts()], module=module, max_steps=3)
    assert updates == [2, 4, 6]


class OneOutput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)


def test_refuses_one_class() -> None:
    with pytest.raises(ValueError, match=r"MESA: the logits of 'head' have the shape \(8, 1\)"):
        fit([short()], module=OneOutput(), max_steps=2)


@pytest.mark.parametrize(
    "limits", [{"max_epochs": 3}, {"max_steps": 18}, {"max_steps": 9, "accumulate_grad_batches": 2}]
)
def test_says_that_it_never_acts(limits: dict[str, int]) -> None:
    with pytest.warns(UserWarning, match="MESA will add nothing: start_epoch=3, and training ends in epoch 2"):
        fit([short(start_epoch=3)], **limits)
    fit([short(start_epoch=2)], **limits)


def test_beside_sam_each_pass_has_its_own_reference() -> None:
    expected = fit([short()], max_steps=6, accumulate_grad_batches=2)
    found = fit([SAM(rho=1e-30), short()], max_steps=6, accumulate_grad_batches=2)
    assert_same(_weights(found), _weights(expected), "weights", tolerance=1e-5)


def _weights(run: Run) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in run.module.named_parameters()}


class TakesTheBatchAlone(Net):
    def training_step(self, batch: Any) -> Any:
        return self.loss(batch)


def test_a_training_step_that_takes_the_batch_alone() -> None:
    run = fit([SAM(), short()], module=TakesTheBatchAlone(), max_steps=3)
    assert len(run.steps) == 3


class TakesAnIterator(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_refuses_a_training_step_that_takes_an_iterator() -> None:
    with pytest.raises(ValueError, match="MESA runs batches a second time, and TakesAnIterator"):
        fit([short()], module=TakesAnIterator(), max_steps=2)


class OtherShape(Net):
    """Scores three samples less in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x[3:])

    def loss(self, batch: Any) -> Tensor:
        return self(batch[0]).mean()


def test_refuses_logits_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"shape \(8, 3\) in training mode and \(5, 3\) in evaluation mode"):
        fit([short()], module=OtherShape(), max_steps=2)


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"decay": -0.1}, {"lam": float("inf")}, {"temperature": -1}])
def test_refuses_settings(settings: dict[str, Any]) -> None:
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name}="):
        MESA(**settings)
