"""RefreshLearning: whole runs against a loop by hand, and what the unlearning must not leave behind."""

import copy
import os
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import weights
from lightning.pytorch import Callback, LightningModule, Trainer
from oracles.shared_twin import SharedRefreshLearning
from tasks import HOWS, STEPS, SWITCHES, a_fit_for_each_task, fit_tasks, one_fit
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.refresh_learning import RefreshLearning
from lightning_stable.callbacks.sam import SAM
from lightning_stable.testing.harness import DictNet, ManualNet, Net, Stream, assert_same, fit
from lightning_stable.testing.streams import BATCHES
from lightning_stable.testing.workers import Pair

SETTINGS: dict[str, Any] = {
    "learning_rate": 0.1,
    "strength": 0.02,
    "noise": 0.05,
    "damping": 20.0,
    "decay": 0.5,
    "seed": 3,
    "task_steps": SWITCHES,
}


def strong(**settings: Any) -> RefreshLearning:
    return RefreshLearning(**{**SETTINGS, **settings})


def short(**settings: Any) -> RefreshLearning:
    return strong(task_steps=None, **settings)


# ------------------------------------------------------------------ whole runs


def by_hand(unlearn_steps: int, accumulate_grad_batches: int = 1, gradient_clip_val: float | None = None) -> Net:
    """Train without the host, unlearning each step's first micro-batch before it."""
    module, stream, generator = Net(), Stream(), torch.Generator().manual_seed(SETTINGS["seed"])
    groups = [{"params": module.body.parameters(), "lr": 0.05}, {"params": module.head.parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    importance: dict[str, Tensor] = {}
    task: list[Any] = []
    firsts = range(0, BATCHES, accumulate_grad_batches)
    for step in range(STEPS):
        first = firsts[step % len(firsts)]
        batches = [stream.batch(index) for index in range(first, first + accumulate_grad_batches)]
        if step in SWITCHES:
            found = weighted_fisher(module, task)
            importance = {name: value + 0.5 * importance.get(name, 0.0) for name, value in found.items()}
            task = []
        task += batches
        unlearn(module, batches[0], importance, unlearn_steps, generator)
        optimizer.zero_grad()
        for batch in batches:
            (module.loss(batch) / accumulate_grad_batches).backward()
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(module.parameters(), gradient_clip_val)
        optimizer.step()
    return module


def unlearn(module: Net, batch: Any, importance: dict[str, Tensor], steps: int, generator: torch.Generator) -> None:
    """Walk a copy of the module up the loss, and move the module a little that way."""
    walker = Net()
    walker.load_state_dict(module.state_dict())
    for _ in range(steps):
        gradients = torch.autograd.grad(walker.loss(batch), list(walker.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(walker.parameters(), gradients, strict=True):
                parameter += SETTINGS["learning_rate"] * gradient
    with torch.no_grad():
        for (name, weight), there in zip(module.named_parameters(), walker.parameters(), strict=True):
            way = there - weight
            way = way * (weight.norm() / way.norm()) if way.norm() > 1e-7 * weight.norm() else 0 * way
            way += SETTINGS["noise"] * torch.randn(weight.shape, generator=generator)
            weight += SETTINGS["strength"] * way / (1 + SETTINGS["damping"] * importance.get(name, torch.zeros(())))


def weighted_fisher(module: Net, batches: list[Any]) -> dict[str, Tensor]:
    """Go through the samples of a task one by one."""
    probe = Net()
    probe.load_state_dict(module.state_dict())
    probe.eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    total = {name: torch.zeros_like(value) for name, value in probe.named_parameters()}
    for index in range(len(x)):
        loss = probe.loss((x[index : index + 1], y[index : index + 1]))
        gradients = torch.autograd.grad(loss, list(probe.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += (-loss.detach()).exp() * gradient.square() / len(x)
    return total


@pytest.mark.parametrize("unlearn_steps", [1, 3])
@pytest.mark.parametrize("how", HOWS)
def test_against_a_loop_by_hand(how: str, unlearn_steps: int) -> None:
    run = fit_tasks([strong(unlearn_steps=unlearn_steps)], module=Net(), **HOWS[how])
    expected = by_hand(unlearn_steps, **HOWS[how])
    plain = fit_tasks([], module=Net(), **HOWS[how])
    assert_same(run.module.state_dict(), expected.state_dict(), "weights and batch statistics", tolerance=2e-4)
    gap = max(float((value - weights(plain.module)[name]).abs().max()) for name, value in weights(run.module).items())
    assert gap > 0.02, "unlearning hardly shows"


def test_a_fit_for_each_task_is_one_fit_over_all() -> None:
    plugins = strong(task_steps=[5, 9]), short()
    runs = one_fit(plugins[0]), a_fit_for_each_task(plugins[1])
    assert_same(weights(runs[1].module), weights(runs[0].module), "weights")
    assert_same(plugins[1].state_dict()["importance"], plugins[0].state_dict()["importance"], "importance")


def test_a_rate_has_no_effect_on_one_step() -> None:
    runs = [fit([short(learning_rate=rate)], max_steps=4) for rate in (1e-3, 1.0)]
    assert_same(weights(runs[0].module), weights(runs[1].module), "weights", tolerance=1e-5)
    runs = [fit([short(learning_rate=rate, unlearn_steps=2)], max_steps=4) for rate in (1e-3, 1.0)]
    with pytest.raises(AssertionError):
        assert_same(weights(runs[0].module), weights(runs[1].module), "weights", tolerance=1e-5)


def test_seeds_differ() -> None:
    runs = [fit([short(seed=seed)], max_steps=3) for seed in (0, 0, 1)]
    assert_same(weights(runs[0].module), weights(runs[1].module), "one seed")
    with pytest.raises(AssertionError):
        assert_same(weights(runs[0].module), weights(runs[2].module), "two seeds")


def shared_job() -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    plugin = strong(unlearn_steps=2, samples=20)
    run = fit_tasks([plugin], devices=2, strategy="ddp")
    return {"weights": weights(run.module), "state": plugin.state_dict()}


def test_two_processes(workers: Pair) -> None:
    first, second = workers.run("test_refresh_learning:shared_job")
    assert_same(second, first, "rank 1 against rank 0")
    plugin = SharedRefreshLearning(**{**SETTINGS, "unlearn_steps": 2, "samples": 20})
    run = fit_tasks([plugin])
    single = {"weights": weights(run.module), "state": plugin.state_dict()}
    assert_same(first, single, "two processes against one", tolerance=2e-4)


# ------------------------------------------------------------------ what it leaves behind, and when it comes


class Curious(Net):
    """Has dropout, batch statistics and a metric, and knows what ran."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.mean = MeanMetric()
        self.passes = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.passes += 1
        assert self.training
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss


class LooksOn(Callback):
    """Sees the weights at the start of each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(weights(pl_module))


def test_a_pass_leaves_nothing_behind() -> None:
    """Where weights do not move, all is as without it, and the live pass draws the same dropout masks."""
    torch.manual_seed(3)
    plain = fit([], module=Curious(), max_steps=8)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    run = fit([short(strength=1e-30)], module=Curious(), max_steps=8)
    assert torch.equal(torch.rand(3), drawn)
    assert run.module.passes == 16
    assert_same(run.module.state_dict(), plain.module.state_dict(), "weights and batch statistics")
    assert_same(run.logged, plain.logged, "logged values")


@pytest.mark.parametrize("first", [True, False])
def test_callbacks_see_the_weights_that_the_step_before_ended_with(first: bool) -> None:
    looks = LooksOn()
    run = fit([short(), looks] if first else [looks, short()], max_steps=6)
    for number in range(1, 6):
        assert_same(looks.seen[number], run.steps[number - 1].weights, "weights at the start of a batch")
        with pytest.raises(AssertionError):
            assert_same(run.steps[number].before, run.steps[number - 1].weights, "weights that the step starts from")


def test_once_for_each_optimizer_step() -> None:
    run = fit([short()], module=Curious(), max_steps=4, accumulate_grad_batches=3)
    assert run.module.passes == 4 * (3 + 1)
    # SAM's second passes are of the weights that were refreshed before its first.
    run = fit([short(), SAM(rho=0.1)], module=Curious(), max_steps=4, accumulate_grad_batches=3)
    assert run.module.passes == 4 * (3 + 3 + 1)


@pytest.mark.parametrize("first", [True, False])
def test_terms_of_other_callbacks_are_not_unlearned(first: bool) -> None:
    mesa = MESA(logits="head", lam=20.0, start_epoch=0, decay=0.5)
    run = fit([mesa, short()] if first else [short(), mesa], max_steps=2)
    assert run.logged[1][1]["mesa_loss"] > 1e-3
    module, generator = Net(), torch.Generator().manual_seed(SETTINGS["seed"])
    for number in range(2):
        unlearn(module, Stream().batch(number), {}, 1, generator)
        assert_same(
            weights(module), run.steps[number].before, f"weights that step {number} starts from", tolerance=1e-5
        )
        module.load_state_dict({**module.state_dict(), **run.steps[number].weights})


class TakesTheBatchAlone(DictNet):
    def training_step(self, batch: Any) -> Any:
        return {"loss": self.loss(batch)}


def test_dictionaries_and_a_step_that_takes_the_batch_alone() -> None:
    plain = fit([short()], max_steps=4)
    assert_same(weights(fit([short()], module=DictNet(), max_steps=4).module), weights(plain.module), "weights")
    alone = fit([short()], module=TakesTheBatchAlone(), max_steps=4)
    assert_same(weights(alone.module), weights(plain.module), "weights")


def test_frozen_and_unused_weights() -> None:
    module = Net()
    module.body[0].bias.requires_grad_(False)
    module.idle = nn.Linear(2, 2)
    before = copy.deepcopy(module.state_dict())
    fit([short(noise=0.0)], module=module, max_steps=4)
    for name in ("body.0.bias", "idle.weight"):
        assert torch.equal(module.state_dict()[name], before[name])
    fit([short(noise=0.1)], module=module, max_steps=4)
    assert not torch.equal(module.idle.weight, before["idle.weight"])


class Grows(Net):
    """Has other parameters in its second fit."""

    def grow(self) -> "Grows":
        self.head = nn.Linear(8, 5)
        self.more = nn.Parameter(torch.ones(3))
        return self


def test_a_head_that_grows_between_tasks() -> None:
    module, refresh = Grows(), short()
    fit([refresh], module=module, max_steps=4)
    for _ in range(2):
        fit([refresh], module=module.grow(), max_steps=4)
    assert refresh.state_dict()["importance"]["head.weight"].shape == (5, 8)


# ------------------------------------------------------------------ tasks


def test_importance_is_of_tasks_that_ended() -> None:
    refresh = short()
    fit([refresh], max_steps=8)
    assert refresh.state_dict()["importance"] == {}
    module = Net()

    class Asks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                refresh.start_task(1)

    fit([Asks(), refresh], module=module, max_steps=8)
    state = refresh.state_dict()
    assert state["importance"].keys() == weights(module).keys()
    assert all((value >= 0).all() for value in state["importance"].values())
    assert state["samples"]["seen"] == 5 * 8
    # Another module is another stream.
    fit([refresh], max_steps=2)
    assert refresh.state_dict()["importance"] == {}


def test_strength_0_does_nothing() -> None:
    refresh = strong(strength=0.0)
    run = fit([refresh], module=Curious(), max_steps=8)
    assert run.module.passes == 8
    assert refresh.state_dict()["samples"]["seen"] == 0


def test_pickles_without_what_is_of_a_run() -> None:
    refresh = strong()
    fit([refresh], max_steps=8)
    again = pickle.loads(pickle.dumps(refresh))
    assert_same(again.state_dict(), refresh.state_dict(), "state")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not a finite number above 0"),
        ({"strength": -1.0}, "strength=-1.0 is not a finite number from 0 on"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"damping": -1}, "damping=-1"),
        ({"decay": 1.5}, r"decay=1.5 is above 1"),
        ({"decay": -0.5}, r"decay=-0.5"),
        ({"samples": 0}, "samples=0 is not a whole number of samples from 1 on"),
        ({"unlearn_steps": 0}, "unlearn_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"task_steps": [3, 3]}, "RefreshLearning: task_steps="),
    ],
)
def test_refuses_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RefreshLearning(**settings)


class Iterates(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.table(torch.tensor([1])).sum()


class Overflows(Net):
    """Has no finite loss of a sample by itself."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) / (len(batch[0]) - 1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (ManualNet, "RefreshLearning does not work with manual optimisation"),
        pytest.param(
            Iterates,
            "RefreshLearning runs batches a second time",
            marks=pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
        ),
        (Sparse, r"RefreshLearning does not work with sparse gradients, and that of 'table.weight'"),
        (Overflows, "RefreshLearning: the importance of weights for task 0 is not finite"),
    ],
)
def test_refuses_modules(module: Callable[[], Net], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit([strong(task_steps=[2])], module=module(), max_steps=4)
