"""The Fisher information of a module's own training step: its value, and what taking it must not leave behind."""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from lightning_stable._glue.quiet import QuietPass
from lightning_stable.callbacks._fisher import fisher_diagonal
from lightning_stable.callbacks.lwf import LwF
from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import DictNet, Net, PlainBoring, Stream, assert_same, fit
from lightning_stable.testing.workers import Pair

Batch = tuple[Tensor, ...]


def samples(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for place in range(len(batch[0])):
            yield tuple(part[place : place + 1] for part in batch)


class Takes(Callback):
    """Takes the Fisher information before a batch, or within an accumulated step."""

    def __init__(self, at: int = 3, names: list[str] | None = None, **settings: Any) -> None:
        self.at, self.names, self.settings = at, names, settings
        self.found: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.at or trainer.current_epoch:
            return
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        names = [name for name, _ in pl_module.named_parameters()] if self.names is None else self.names
        own = list(samples([batch]))[trainer.global_rank if self.settings.get("uneven") else 0 :]
        settings = {name: value for name, value in self.settings.items() if name != "uneven"}
        self.found = fisher_diagonal(trainer, pl_module, own, names, quiet=QuietPass(), **settings)


def by_hand(state: dict[str, Tensor], batch: Batch, weighted: bool = False) -> dict[str, Tensor]:
    module = Net(dropout=0.5)
    module.load_state_dict(state)
    module.eval()
    total = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for one in samples([batch]):
        module.zero_grad()
        loss = module.loss(one)
        loss.backward()
        for name, value in module.named_parameters():
            total[name] += value.grad.square() * (float((-loss.detach()).exp()) if weighted else 1.0)
    return {name: value / len(batch[0]) for name, value in total.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_mean_squared_gradient_of_single_samples(weighted: bool) -> None:
    takes = Takes(weighted=weighted)
    fit([takes], module=Net(dropout=0.5), max_steps=4, limit_val_batches=0)
    assert_same(takes.found, by_hand(takes.state, Stream().batch(3), weighted), "against a loop", tolerance=1e-6)
    assert all(bool(value.ge(0).all()) and bool(value.gt(0).any()) for value in takes.found.values())


class LogisticNet(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self.layer(batch[0]), (batch[1][:, 0] > 0).long())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_of_a_logistic_regression_it_has_a_closed_form() -> None:
    takes = Takes()
    fit([takes], module=LogisticNet(), max_steps=4)
    x, y = Stream().batch(3)
    layer = nn.Linear(6, 2)
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in takes.state.items()})
    wrong = 1 - torch.softmax(layer(x), -1).gather(1, (y > 0).long())
    expected = (wrong.square() * x.square()).mean(0).expand(2, -1)
    assert_same(takes.found["layer.weight"], expected.detach(), "closed form", tolerance=1e-6)


class Curious(Net):
    """Has dropout, batch statistics, a metric and a hook on a gradient, and knows in which mode it ran."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.mean = MeanMetric()
        self.modes: list[bool] = []
        self.backwards = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append(self.training)
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_after_backward(self) -> None:
        self.backwards += 1


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_it_leaves_nothing_behind(settings: dict[str, Any]) -> None:
    """Not even in the middle of an accumulated step: batch 3 is the second of its step."""
    torch.manual_seed(3)
    plain = fit([], module=Curious(), max_epochs=2, limit_val_batches=0, **settings)
    torch.manual_seed(3)
    run = fit([Takes()], module=Curious(), max_epochs=2, limit_val_batches=0, **settings)
    assert run.module.modes == [True] * 3 + [False] * 8 + [True] * 9
    assert run.module.backwards == plain.module.backwards
    found, expected = ({**done.snapshot(), "plugins": None} for done in (run, plain))
    assert_same(found, expected, "a run with it against one without")
    assert all(part.training for part in run.module.modules())


def test_frozen_and_unused_weights_have_none() -> None:
    module = Net()
    module.body[0].bias.requires_grad_(False)
    module.unused = nn.Linear(2, 2)
    takes = Takes()
    fit([takes], module=module, max_steps=4, limit_val_batches=0)
    for name in ("body.0.bias", "unused.weight"):
        assert not takes.found[name].any()
    assert takes.found["head.weight"].any()
    some = Takes(names=["head.bias"])
    fit([some], max_steps=4, limit_val_batches=0)
    assert some.found.keys() == {"head.bias"}


class Skips(DictNet):
    """Returns nothing for every second sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if len(batch[0]) == 1 and batch[1].item() > 0:
            return None
        return super().training_step(batch, batch_idx)


def test_a_skipped_sample_counts_as_one_that_says_nothing() -> None:
    takes = Takes()
    fit([takes], module=Skips(), max_steps=4, limit_val_batches=0)
    x, y = Stream().batch(3)
    kept = (y <= 0).flatten()
    expected = by_hand(takes.state, (x[kept], y[kept]))
    share = float(kept.float().mean())
    assert 0 < share < 1
    scaled = {name: share * value for name, value in expected.items()}
    assert_same(takes.found, scaled, "kept samples over all", tolerance=1e-6)


def test_no_sample_at_all_and_a_batch_that_is_a_tensor() -> None:
    class None_(Takes):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.found = fisher_diagonal(trainer, pl_module, [], ["layer.weight"], quiet=QuietPass())

    takes = None_()
    fit([takes], module=PlainBoring(), own_loaders=True, max_steps=2)
    assert not takes.found["layer.weight"].any()


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.float32)])
def test_under_other_precisions(precision: str, dtype: torch.dtype) -> None:
    takes, full = Takes(), Takes()
    fit([takes], max_steps=4, limit_val_batches=0, precision=precision)
    fit([full], max_steps=4, limit_val_batches=0)
    for name, value in takes.found.items():
        assert value.dtype == dtype
        assert float((value - full.found[name]).norm()) <= 0.1 * float(full.found[name].norm()) + 1e-6


class Reads(LightningModule):
    """Reads a sample's features one by one; knows in which mode its parts ran."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.reader = nn.LSTM(1, 5, num_layers=2, dropout=0.5, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 1)
        self.modes: list[tuple[bool, bool, float]] = []

    def loss(self, batch: Batch) -> Tensor:
        self.modes.append((self.training, self.reader.training, self.reader.dropout))
        return nn.functional.mse_loss(self.head(self.drop(self.reader(batch[0][..., None])[0][:, -1])), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_recurrent_parts_can_go_backward_and_drop_nothing() -> None:
    """On an accelerator they refuse the backward pass in evaluation mode."""
    takes, module = Takes(), Reads()
    fit([takes], module=module, max_steps=4)
    assert module.modes == [(True, True, 0.5)] * 3 + [(False, True, 0.0)] * 8 + [(True, True, 0.5)]
    assert (module.reader.training, module.reader.dropout) == (True, 0.5)
    other = Reads()
    other.load_state_dict(takes.state)
    other.eval()
    total: dict[str, Any] = dict.fromkeys(takes.state, 0.0)
    for one in samples([Stream().batch(3)]):
        other.zero_grad()
        other.loss(one).backward()
        for name, value in other.named_parameters():
            total[name] = total[name] + value.grad.square() / 8
    assert_same(takes.found, total, "against a loop in evaluation mode", tolerance=1e-6)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")
def test_recurrent_parts_are_themselves_again_after_a_failure() -> None:
    module = Reads()
    module.reader.eval()

    class Fails(Takes):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.head.register_forward_pre_hook(self.fail)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def fail(self, *_: Any) -> None:
            raise RuntimeError("deliberate")

    with pytest.raises(RuntimeError, match="deliberate"):
        fit([Fails(at=0)], module=module, max_steps=1)
    assert module.modes == [(False, True, 0.0)]
    assert (module.reader.training, module.reader.dropout) == (False, 0.5)


def test_the_loss_is_the_modules_own() -> None:
    """Other callbacks' terms and second passes have no part in it."""
    plain, takes = Takes(), Takes()
    fit([plain], max_steps=4, limit_val_batches=0)
    fit([LwF(lam=1.0, logits="head"), SAM(rho=1e-30), takes], max_steps=4, limit_val_batches=0)
    assert_same(takes.found, plain.found, "beside others", tolerance=1e-6)


def two_process_job(uneven: bool = False) -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    takes = Takes(uneven=uneven)
    run = fit([takes], module=Net(norm=False), max_steps=4, limit_val_batches=0, devices=2, strategy="ddp")
    return {"found": takes.found, "weights": run.module.state_dict()}


@pytest.mark.parametrize("uneven", [False, True])
def test_two_processes_have_the_mean_over_all_samples(uneven: bool, workers: Pair) -> None:
    first, second = workers.run("test_fisher:two_process_job", uneven=uneven)
    assert_same(second, first, "rank 1 against rank 0")
    takes = Takes()
    single = fit([takes], module=Net(norm=False), max_steps=4, limit_val_batches=0)
    assert_same(first["weights"], single.module.state_dict(), "weights", tolerance=1e-5)
    if not uneven:
        assert_same(first["found"], takes.found, "two processes against one", tolerance=1e-5)
        return
    module = Net(norm=False)
    module.load_state_dict(takes.state)
    x, y = Stream().batch(3)
    order = [0, 2, 4, 6, 3, 5, 7]  # the second process leaves its first sample out
    total = 0.0
    for one in samples([(x[order], y[order])]):
        (gradient,) = torch.autograd.grad(module.loss(one), [module.head.bias])
        total = total + gradient.square()
    assert_same(first["found"]["head.bias"], total / 7, "seven samples", tolerance=1e-5)
