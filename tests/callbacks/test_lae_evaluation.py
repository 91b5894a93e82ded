"""LAE: what evaluation sees, whoever asks for it."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from ensembles import ensemble_loss, held_out, plain_loss, quick, validated
from gradients import weights
from lightning.pytorch import Callback, LightningModule, Trainer
from tasks import STEPS, fit_tasks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_stable.callbacks.ema import EMA
from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.stability_gap import StabilityGap
from lightning_stable.testing.harness import QUIET, Net, SaveAt, assert_same, fit


def test_validation_sees_the_ensemble_from_the_second_task_on() -> None:
    lae = quick()
    run = fit([lae], validation=held_out(), max_steps=STEPS, val_check_interval=3)
    found = {step: entry["val_loss"] for step, entry in run.logged if "val_loss" in entry}
    assert list(found) == [2, 5, 8, 11]
    plain = fit([quick(ensemble=False)], validation=held_out(), max_steps=STEPS, val_check_interval=3)
    assert_same(weights(plain.module), weights(run.module), "weights with and without an ensemble")
    alone = {step: entry["val_loss"] for step, entry in plain.logged if "val_loss" in entry}
    assert [found[step] == alone[step] for step in found] == [True, False, False, False]


@pytest.mark.parametrize("logits", ["head", None])
def test_validation_test_and_prediction_after_a_fit(logits: str | None) -> None:
    lae = quick(logits=logits)
    run = fit_tasks([lae], module=Net())
    expected = ensemble_loss(run.module, lae.offline)
    assert expected != pytest.approx(plain_loss(run.module), rel=1e-3)
    assert validated([lae], run.module) == pytest.approx(expected, rel=1e-5)
    assert run.trainer.test(run.module, held_out(), verbose=False)[0]["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert validated([lae], copy.deepcopy(run.module)) == pytest.approx(plain_loss(run.module), rel=1e-5)
    assert not run.module.head._forward_hooks
    assert validated([], run.module) == pytest.approx(plain_loss(run.module), rel=1e-5)
    assert validated([quick(ensemble=False)], run.module) == pytest.approx(plain_loss(run.module), rel=1e-5)
    assert validated([quick()], run.module) == pytest.approx(plain_loss(run.module), rel=1e-5)


class Predicts(Net):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


def test_prediction_sees_the_ensemble() -> None:
    lae = quick()
    run = fit_tasks([lae], module=Predicts())
    losses = run.trainer.predict(run.module, DataLoader(held_out().dataset, batch_size=8))
    assert sum(map(float, losses)) / 2 == pytest.approx(ensemble_loss(run.module, lae.offline), rel=1e-5)


def test_a_checkpoint_brings_the_ensemble(tmp_path: Any) -> None:
    path = str(tmp_path / "some.ckpt")
    lae = quick()
    run = fit([lae, SaveAt(11, path)], max_steps=STEPS)
    at_11 = torch.load(path, weights_only=True)
    state = next(state for state in at_11["callbacks"].values() if "offline" in state)
    module = Net()
    module.load_state_dict(at_11["state_dict"])
    expected = ensemble_loss(module, state["offline"])
    assert validated([quick()], Net(), path) == pytest.approx(expected, rel=1e-5)
    # Validating a checkpoint between fits leaves what was learned as it is.
    before = copy.deepcopy(lae.state_dict())
    other = Net()
    assert validated([lae], other, path) == pytest.approx(expected, rel=1e-5)
    assert_same(lae.state_dict(), before, "the state of the fit")
    assert validated([lae], run.module) == pytest.approx(ensemble_loss(run.module, lae.offline), rel=1e-5)
    # A run that is resumed sees it before its first step, too.
    run = fit([quick()], validation=held_out(), max_steps=STEPS, ckpt_path=path, num_sanity_val_steps=2)
    assert len(run.steps) == 3


class Collects(Net):
    """Keeps outputs of validation in lists, counts, and has a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 8})
        self.losses: list[Tensor] = []
        self.by_loader: dict[int, list[Tensor]] = {0: []}
        self.count = 0
        self.mean = MeanMetric()
        self.logs: Counter[str] = Counter()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.losses.append(loss)
        self.by_loader[0].append(loss)
        self.count += 1
        self.logs["loss"] += 1
        self.mean.update(loss)
        self.log("mean", self.mean)

    def on_validation_epoch_end(self) -> None:
        assert len(self.losses) == len(self.by_loader[0]) == self.count == self.logs["loss"] == self.mean.update_count
        self.log("val_loss", torch.stack(self.losses).mean())
        self.losses.clear()
        self.by_loader = {0: []}
        self.count = 0
        self.logs.clear()


def test_a_step_of_validation_counts_once() -> None:
    lae = quick()
    run = fit([lae], module=Collects(), validation=held_out(), max_steps=12)
    expected = ensemble_loss(run.module, lae.offline)
    logged = run.trainer.callback_metrics
    assert float(logged["val_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(logged["mean"]) == pytest.approx(expected, rel=1e-5)


class Tallies(Net):
    """Adds up in plain tensors, and makes attributes in its first step of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())
        self.count = torch.zeros((), dtype=torch.long)
        self.totals = {"loss": torch.zeros(()), "nested": [torch.zeros(())]}
        self.table = torch.zeros(4)
        self.ours = [*self.parameters(), *self.buffers()]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.total += loss
        self.count += 1
        self.totals["loss"] += loss
        self.totals["nested"][0].add_(loss)
        self.table.copy_(self.table + loss)
        if not hasattr(self, "made"):
            self.made = torch.zeros(())
        self.made += loss

    def on_validation_epoch_end(self) -> None:
        sums = self.total, self.totals["loss"], self.totals["nested"][0], self.table[0], self.made
        self.log_dict({f"sum_{number}": value.clone() for number, value in enumerate(sums)})
        self.log("count", self.count.float())
        for value in (self.total, self.count, self.totals["loss"], self.totals["nested"][0], self.table):
            value.zero_()
        del self.made


def test_tensors_and_new_attributes_are_of_one_pass() -> None:
    lae = quick()
    run = fit_tasks([lae], module=Tallies())
    expected = 2 * ensemble_loss(run.module, lae.offline)
    trainer = Trainer(**QUIET, devices=1, callbacks=[lae])
    for _ in range(2):
        found = trainer.validate(run.module, held_out(), verbose=False)[0]
        assert found.pop("count") == 2
        assert list(found.values()) == pytest.approx(5 * [expected], rel=1e-5)


class Hoards(Net):
    """Has long lists, of numbers and of tensors, one of them larger than what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = [float(number) for number in range(500_000)]
        self.outputs = [{"logits": torch.zeros(2)} for _ in range(1000)]
        self.by_class: list[list[float]] = [[] for _ in range(1000)]
        self.bank = torch.zeros(1 << 23)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.numbers.append(float(self.loss(batch)))
        self.outputs.append({"logits": self.head(self.body(batch[0]))})
        self.by_class[999].append(1.0)


def test_long_lists_are_kept_and_large_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    lae = quick()
    run = fit_tasks([lae], module=Hoards())
    copied: list[int] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda tensor, **how: copied.append(tensor.numel()) or clone(tensor, **how))
    Trainer(**QUIET, devices=1, callbacks=[lae]).validate(run.module, held_out(), verbose=False)
    assert len(run.module.numbers) == 500_002
    assert len(run.module.outputs) == 1002
    assert run.module.by_class[999] == [1.0, 1.0]
    assert sum(copied) < 1000


class Asks(Callback):
    """Calls the module itself, inside training and after a validation."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.modes: list[Tensor] = []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = [held_out().batch(index) for index in range(2)]
        self.found.append(sum(float(nn.functional.mse_loss(pl_module(x), y)) for x, y in batches) / 2)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        x = held_out().batch(0)[0]
        with torch.no_grad():
            calls = pl_module(x), pl_module.head(pl_module.body(x))[:, ::2].sum(1)
        assert calls[0].shape[0] == calls[1].shape[0]
        pl_module.eval()
        with torch.enable_grad():
            self.modes.append(pl_module(x).detach())
        pl_module.train()


def test_forward_is_the_ensembles_in_evaluation_only() -> None:
    asks, lae = Asks(), quick()
    run = fit([asks, lae], validation=held_out(), max_steps=12)
    assert asks.found[-1] == pytest.approx(ensemble_loss(run.module, lae.offline), rel=1e-5)
    # With gradients, or in training mode, it is the live module's.
    assert torch.equal(asks.modes[-1], copy.deepcopy(run.module).eval()(held_out().batch(0)[0]))


def test_other_callbacks_passes_are_the_live_modules() -> None:
    """MESA's reference is a training step in evaluation mode without gradients, and not to be changed by LAE."""

    def mesa() -> MESA:
        return MESA(logits="head", lam=2.0, start_epoch=0, decay=0.5)

    alone = fit([mesa()], max_steps=12)
    for order in ([mesa(), quick(calibration_steps=0)], [quick(calibration_steps=0), mesa()]):
        assert_same(weights(fit(order, max_steps=12).module), weights(alone.module), "weights")


def test_with_ema_the_average_is_the_online_set() -> None:
    for first in (True, False):
        ema, lae = EMA(0.5, finish_with="live"), quick()
        run = fit([ema, lae] if first else [lae, ema], validation=held_out(), max_steps=12)
        expected = ensemble_loss(run.module, lae.offline, live=ema.averaged())
        assert float(run.trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-5)


class Classifies(Net):
    """Has its logits as the output of forward, and learns fast to tell the sign of a target."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), (batch[1].flatten() > 0).long())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("logits", [None, "head"])
@pytest.mark.parametrize("first", [True, False])
def test_the_stability_gap_is_that_of_the_ensemble(logits: str | None, first: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    tasks = [
        TensorDataset(torch.randn(300, 6, generator=generator), torch.randint(2, (300,), generator=generator))
        for _ in range(2)
    ]
    gap = StabilityGap(loaders=[DataLoader(task, batch_size=300) for task in tasks], logits=logits, strict=True)
    lae = quick(task_steps=[3], decay=0.9, logits="head")
    run = fit([gap, lae] if first else [lae, gap], module=Classifies(), max_steps=8)
    online, slow = copy.deepcopy(run.module).eval(), copy.deepcopy(run.module).eval()
    slow.load_state_dict({**slow.state_dict(), **lae.offline})
    for (x, y), curve in zip((task.tensors for task in tasks), gap.record()["series"]["live"], strict=True):
        with torch.no_grad():
            surest = online(x).softmax(-1).maximum(slow(x).softmax(-1))
            alone = online(x)
        right, right_alone = (float((found.argmax(-1) == y).float().mean()) for found in (surest, alone))
        assert right != right_alone
        assert curve["scores"][-1] == pytest.approx(right)
