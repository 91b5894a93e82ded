"""LAE: whole runs against a loop by hand, its tasks, its state and what it refuses."""

import os
import pickle
import tempfile
from typing import Any

import pytest
import torch
from ensembles import SETTINGS, ensemble_loss, held_out, quick, validated
from gradients import NetWith, weights
from lightning.pytorch import Callback, Trainer
from tasks import HOWS, STEPS, SWITCHES, a_fit_for_each_task, fit_tasks, one_fit
from torch import Tensor, nn

from lightning_stable.testing.harness import ManualNet, Net, Stream, assert_same, fit
from lightning_stable.testing.streams import BATCHES
from lightning_stable.testing.workers import Pair


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
