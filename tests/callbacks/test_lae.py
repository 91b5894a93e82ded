"""LAE: whole runs against a loop by hand, and what evaluation sees, whoever asks for it."""

import copy
import os
import pickle
import tempfile
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract.harness import QUIET, ManualNet, Net, SaveAt, Stream, assert_same, fit
from contract.streams import BATCHES
from contract.workers import Pair
from gradients import NetWith, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from tasks import HOWS, STEPS, SWITCHES, a_fit_for_each_task, fit_tasks, one_fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_stable.callbacks._quiet import is_quiet
from lightning_stable.callbacks.ema import EMA
from lightning_stable.callbacks.lae import LAE
from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.stability_gap import StabilityGap

SETTINGS: dict[str, Any] = {"parameters": ["body.*"], "decay": 0.6, "calibration_steps": 2, "task_steps": SWITCHES}


def quick(**settings: Any) -> LAE:
    return LAE(**{**SETTINGS, **settings})


def held_out() -> Stream:
    return Stream(2, seed=5)


def ensemble_loss(module: Net, offline: dict[str, Tensor], live: dict[str, Tensor] | None = None) -> float:
    """The loss on held-out samples by hand, with the larger probability of each class as the head's."""
    online = copy.deepcopy(module)
    online.load_state_dict({**module.state_dict(), **(live or {})})
    online.eval()
    slow = copy.deepcopy(online)
    slow.load_state_dict({**online.state_dict(), **offline})
    losses = []
    with torch.no_grad():
        for index in range(2):
            batch = held_out().batch(index)
            surest = [one.head(one.body(batch[0])).softmax(-1) for one in (online, slow)]
            logits = surest[0].maximum(surest[1]).log()
            handle = online.head.register_forward_hook(lambda *_, logits=logits: logits)
            losses.append(float(online.loss(batch)))
            handle.remove()
    return sum(losses) / 2


def plain_loss(module: Net) -> float:
    with torch.no_grad():
        return sum(float(copy.deepcopy(module).eval().loss(held_out().batch(index))) for index in range(2)) / 2


def validated(plugins: list[Any], module: LightningModule, ckpt_path: str | None = None) -> float:
    trainer = Trainer(**QUIET, devices=1, callbacks=plugins)
    return trainer.validate(module, held_out(), ckpt_path=ckpt_path, verbose=False)[0]["val_loss"]


# ------------------------------------------------------------------ whole runs


def by_hand(accumulate_grad_batches: int = 1, gradient_clip_val: float | None = None) -> tuple[Net, dict[str, Tensor]]:
    """Train without the host; the body is left out of the optimizer while it stands still."""
    module, stream, offline = Net(), Stream(), {}
    body, head = list(module.body.parameters()), list(module.head.parameters())
    groups = [{"params": body, "lr": 0.05}, {"params": head, "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    firsts = range(0, BATCHES, accumulate_grad_batches)
    for step in range(STEPS):
        if step == SWITCHES[0]:
            offline = {f"body.{name}": value.detach().clone() for name, value in module.body.named_parameters()}
        still = any(0 <= step - switch < SETTINGS["calibration_steps"] for switch in SWITCHES)
        optimizer.zero_grad()
        first = firsts[step % len(firsts)]
        for index in range(first, first + accumulate_grad_batches):
            (module.loss(stream.batch(index)) / accumulate_grad_batches).backward()
        for parameter in body if still else []:
            parameter.grad = None
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(module.parameters(), gradient_clip_val)
        optimizer.step()
        for name in offline:
            offline[name] = 0.6 * offline[name] + 0.4 * weights(module)[name]
    return module, offline


@pytest.mark.parametrize("how", HOWS)
def test_against_a_loop_by_hand(how: str) -> None:
    lae = quick()
    run = fit_tasks([lae], module=Net(), validation=held_out(), limit_val_batches=None, **HOWS[how])
    module, offline = by_hand(**HOWS[how])
    assert_same(run.module.state_dict(), module.state_dict(), "weights and batch statistics", tolerance=1e-5)
    assert_same(lae.offline, offline, "the offline copy", tolerance=1e-5)
    plain = fit_tasks([], module=Net(), **HOWS[how])
    with pytest.raises(AssertionError):
        assert_same(weights(run.module), weights(plain.module), "weights", tolerance=1e-3)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_adapters_do_not_move_at_all_while_the_head_adapts(make: Any) -> None:
    """Neither by weight decay nor by momentum; and what the optimizer knows of them stays, too."""
    module, states = NetWith(make), []

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            state = trainer.optimizers[0].state[module.body[0].weight]
            states.append({name: value.clone() for name, value in state.items()})

    fit_tasks([quick(), Looks()], module=module)
    for step in range(1, STEPS):
        still = step in (5, 6, 9, 10)
        before, after = module.history[step - 1], module.history[step]
        assert torch.equal(before["body.0.weight"], after["body.0.weight"]) is still
        assert not torch.equal(before["head.weight"], after["head.weight"])
        if still:
            assert_same(states[step], states[step - 1], "the optimizer's state")


def test_a_fit_for_each_task_is_one_fit_over_all() -> None:
    plugins = quick(), quick(task_steps=None)
    runs = one_fit(plugins[0]), a_fit_for_each_task(plugins[1])
    assert_same(weights(runs[1].module), weights(runs[0].module), "weights")
    assert_same(plugins[1].offline, plugins[0].offline, "the offline copy")


def test_manual_optimisation() -> None:
    lae = quick()
    run = fit_tasks([lae], module=ManualNet(), validation=held_out(), limit_val_batches=None)
    assert lae.state_dict()["head"] == "head"
    assert validated([lae], run.module) == pytest.approx(ensemble_loss(run.module, lae.offline), rel=1e-5)


def shared_job() -> dict[str, Any]:
    os.chdir(tempfile.mkdtemp())
    return outcome(devices=2, strategy="ddp")


def outcome(**settings: Any) -> dict[str, Any]:
    lae = quick(logits="head")
    run = fit_tasks([lae], validation=held_out(), limit_val_batches=None, val_check_interval=3, **settings)
    return {"weights": weights(run.module), "state": lae.state_dict(), "logged": run.logged}


def test_two_processes(workers: Pair) -> None:
    first, second = workers.run("test_lae:shared_job")
    assert_same(second["weights"], first["weights"], "weights of rank 1 against rank 0")
    assert_same(second["state"], first["state"], "state of rank 1 against rank 0")
    assert_same(first, outcome(), "two processes against one", tolerance=1e-4)


# ------------------------------------------------------------------ what evaluation sees


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


# ------------------------------------------------------------------ heads of several kinds


class Wrapped(nn.Module):
    """A head that holds its logits in an object or a mapping."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.kind(logits=self.linear(x), other=1)


class WrappedNet(Net):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.head = Wrapped(kind)

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(self.body(x))
        logits = output["logits"] if isinstance(output, dict) else output.logits
        return logits.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_a_head_that_holds_logits(kind: type) -> None:
    inner, outer = quick(logits="head.linear"), quick(logits="head")
    losses = [validated([lae], fit_tasks([lae], module=WrappedNet(kind)).module) for lae in (inner, outer)]
    assert losses[0] == losses[1]


class Twice(Net):
    """Runs its head twice a step."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 2 * super().loss((-batch[0], batch[1]))


def test_a_head_that_runs_twice() -> None:
    lae = quick()
    run = fit_tasks([lae], module=Twice())
    online, slow = copy.deepcopy(run.module).eval(), copy.deepcopy(run.module).eval()
    slow.load_state_dict({**slow.state_dict(), **lae.offline})
    total = 0.0
    with torch.no_grad():
        for index in range(2):
            x, y = held_out().batch(index)
            for sign, weight in ((1, 1), (-1, 2)):
                surest = [one.head(one.body(sign * x)).log_softmax(-1) for one in (online, slow)]
                z = surest[0].maximum(surest[1])
                predicted = (z[:, ::2].sum(1, keepdim=True) - z[:, 1::2].sum(1, keepdim=True)) / 3**0.5
                total += weight * float(nn.functional.mse_loss(predicted, y)) / 2
    assert validated([lae], run.module) == pytest.approx(total, rel=1e-5)


class Lora(LightningModule):
    """A classifier of PEFT's adapters over a small body, which was not trained before."""

    def __init__(self, targets: list[str]) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(1)
        self.model = nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, self.model)
        if "head" not in targets:
            self.model["head"].requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model["head"](torch.tanh(self.model["body"](x)))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), (batch[1][:, 0] > 0).long())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("targets", [["body"], ["body", "head"]])
def test_adapters_of_peft(targets: list[str]) -> None:
    lae = quick(parameters=["*lora_*"])
    module = Lora(targets)
    start = copy.deepcopy(module.state_dict())
    fit([lae], module=module, max_steps=STEPS)
    assert lae.state_dict()["head"] == "model.head"
    assert len(lae.offline) == 2 * len(targets)
    assert not torch.equal(
        module.state_dict()["model.body.lora_A.default.weight"], start["model.body.lora_A.default.weight"]
    )
    assert torch.equal(module.model["body"].base_layer.weight, start["model.body.base_layer.weight"])
    slow = copy.deepcopy(module)
    slow.load_state_dict({**module.state_dict(), **lae.offline})
    loss = 0.0
    with torch.no_grad():
        for index in range(2):
            x, y = held_out().batch(index)
            surest = module(x).softmax(-1).maximum(slow(x).softmax(-1))
            loss += float(nn.functional.cross_entropy(surest.log(), (y[:, 0] > 0).long())) / 2
    assert validated([lae], module) == pytest.approx(loss, rel=1e-5)


# ------------------------------------------------------------------ tasks, state, bad input


def test_half_precision_weights_have_a_wide_copy() -> None:
    lae = quick(decay=0.9999)
    run = fit([lae], max_steps=12, precision="bf16-true", validation=held_out())
    assert {value.dtype for value in lae.offline.values()} == {torch.float32}
    assert next(run.module.parameters()).dtype == torch.bfloat16


def test_another_module_starts_anew() -> None:
    lae = quick()
    fit([lae], max_steps=STEPS)
    assert lae.offline
    fit([lae], max_steps=3)
    assert not lae.offline


def test_tasks_may_be_said() -> None:
    lae = quick(task_steps=None)

    class Says(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                lae.start_task(3)

    run = fit([lae, Says()], max_steps=8)
    moved = [not torch.equal(step.before["body.0.weight"], step.weights["body.0.weight"]) for step in run.steps]
    assert moved == [True] * 4 + [False] * 2 + [True] * 2


def test_pickles_without_what_is_of_a_run() -> None:
    lae = quick()
    fit([lae], max_steps=8)
    assert_same(pickle.loads(pickle.dumps(lae)).state_dict(), lae.state_dict(), "state")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parameters": "*lora_*"}, r"parameters='\*lora_\*' of LAE is not a list of patterns"),
        ({"parameters": []}, r"parameters=\[\] of LAE"),
        ({"decay": 1.0}, r"decay=1.0 is not in \[0, 1\)"),
        ({"calibration_steps": -1}, "calibration_steps=-1"),
        ({"logits": ""}, "logits='' is not the dotted name"),
        ({"task_steps": [0]}, r"LAE: task_steps=\[0\]"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quick(**settings)


class OneOutput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)


class RunsAgain(Net):
    """Runs its head once more when nothing is quiet."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(1 if is_quiet(self) else 2):
            self.head(self.body(batch[0]))


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (Net, {"parameters": ["*lora_*"]}, r"LAE: the pattern '\*lora_\*' in parameters matches no parameter of Net"),
        (Net, {"logits": "tail"}, "logits='tail' of LAE is no submodule of Net"),
        (OneOutput, {}, r"LAE: the output of 'head' is Tensor of shape \(8, 1\), not logits of several classes"),
        (RunsAgain, {}, r"LAE: 'head' puts out logits of shape \(8, 3\) with the live weights, and nothing"),
    ],
)
def test_refuses_modules(module: type[Net], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit([quick(**settings)], module=module(), validation=held_out(), max_steps=12)
