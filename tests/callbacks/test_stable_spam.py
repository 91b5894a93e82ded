"""Stable-SPAM in a Trainer: what the optimizer sees, resets, the cosine, and resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from gradients import NetWith, Watches, entries
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_stable.callbacks.stable_spam import StableSPAM
from lightning_stable.functional import stable_spam
from lightning_stable.functional.stable_spam import init_stable_spam, update_stable_spam
from lightning_stable.testing.harness import Net, SaveAt, TwoOptimizerNet, assert_same, fit

ADAM = {"lr": 0.01}
OFF = {"clip": False, "norm": None}


def adam_net(**settings: Any) -> NetWith:
    return NetWith(lambda parameters: Adam(parameters, **{**ADAM, **settings}), norm=False)


# ------------------------------------------------------------------ the gradients


class Twin:
    """The equations for one tensor, in plain numbers."""

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, gamma3: float = 0.999) -> None:
        self.gammas = gamma1, gamma2, gamma3
        self.largest = self.norm = self.square = 0.0
        self.updates = 0

    def __call__(self, gradient: Tensor, kind: str | None) -> Tensor:
        gamma1, gamma2, gamma3 = self.gammas
        self.updates += 1
        values = gradient.double().flatten().tolist()
        top = max(map(abs, values))
        self.largest = gamma3 * self.largest + (1 - gamma3) * top
        limit = self.largest / (1 - gamma3**self.updates)
        values = [value * limit / top if abs(value) > limit else value for value in values]
        size = math.sqrt(sum(value**2 for value in values))
        self.norm = gamma1 * self.norm + (1 - gamma1) * size
        self.square = gamma2 * self.square + (1 - gamma2) * size**2
        usual = self.norm / (1 - gamma1**self.updates) / size
        root = math.sqrt(self.square / (1 - gamma2**self.updates)) + 1e-8
        factor = {"unit": usual / root, "history": usual, None: 1.0}[kind]
        return torch.tensor([value * factor for value in values]).view_as(gradient)


@pytest.mark.parametrize("kind", ["unit", "history", None])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_the_optimizer_sees_the_equations(kind: str | None, settings: dict[str, Any]) -> None:
    before, after = Watches(), Watches()
    callback = StableSPAM(norm=kind, gamma3=0.9)
    fit([before, callback, after], max_steps=12, limit_val_batches=0, **settings)
    twins = {name: Twin(gamma3=0.9) for name in before.seen[0]}
    for raw, seen in zip(before.seen, after.seen, strict=True):
        expected = {name: twins[name](gradient, kind) for name, gradient in raw.items() if "body.0.bias" not in name}
        assert_same({name: seen[name] for name in expected}, expected, "gradients", tolerance=1e-5)


def test_both_paths_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, dtypes = ((3, 4), (5,), (), (64, 64), (0,), (7,)), [torch.float32] * 5 + [torch.bfloat16]
    host = other = init_stable_spam(len(shapes))
    for step in range(25):
        gradients = [
            torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        gradients[3][0, 0] = 1e6 if step == 11 else math.nan if step == 13 else 0
        gradients[1].mul_(step % 5 != 0)
        copies = [gradient.clone() for gradient in gradients]
        host, told = update_stable_spam(gradients, host, gamma3=0.9)
        with monkeypatch.context() as patch:
            patch.setattr(stable_spam, "_on_host", lambda gradients: False)
            other, also = update_stable_spam(copies, other, gamma3=0.9)
        for mine, theirs in zip([*gradients, *host, *told], [*copies, *other, *also], strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-6, atol=0, equal_nan=True), step


@pytest.mark.parametrize("norm", ["unit", "history", None])
def test_nothing_is_read_back_from_an_accelerator(norm: str | None) -> None:
    # A device without values: reading one is an error.
    gradients = [torch.ones(4, 4, device="meta"), torch.ones(3, dtype=torch.bfloat16, device="meta")]
    state, told = update_stable_spam(gradients, init_stable_spam(2, "meta"), norm=norm)
    assert {value.device.type for value in (*state, *told)} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        state.maximum.tolist()


@pytest.mark.parametrize("norm", ["unit", "history", None])
@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf])
def test_a_tensor_without_a_norm_is_left_and_moves_no_statistic(norm: str | None, value: float) -> None:
    state, _ = update_stable_spam([torch.tensor([3.0, 4.0])], init_stable_spam(1), norm=norm)
    odd = torch.tensor([value, value])
    after, told = update_stable_spam([odd], state, norm=norm)
    assert torch.equal(odd.nan_to_num(7.0), torch.tensor([value, value]).nan_to_num(7.0))
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))
    assert float(told.clipped) == 0.0


def test_a_spike_is_scaled_to_the_usual_without_loss_of_precision() -> None:
    state = init_stable_spam(1)
    for _ in range(50):
        state, _ = update_stable_spam([torch.full((8,), 0.5)], state, gamma3=0.9, norm=None)
    spiked = torch.full((8,), 0.5)
    spiked[3] = 1e7
    limit = 0.9 * 0.5 + 0.1 * 1e7
    update_stable_spam([spiked], state, gamma3=0.9, norm=None)
    assert float(spiked[3]) == pytest.approx(limit / (1 - 0.9**51), rel=1e-5)
    assert float(spiked[0]) == 0.5


# ------------------------------------------------------------------ names


def test_a_parameter_that_begins_to_train_later_has_statistics_of_its_own() -> None:
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.body.requires_grad_(trainer.current_epoch > 0)

    def net() -> Net:
        module = Net()
        module.body.requires_grad_(False)
        return module

    run = fit(
        [Unfreezes(), callback := StableSPAM(**OFF | {"clip": True})], module=net(), max_steps=9, limit_val_batches=0
    )
    state = callback.state_dict()["optimizers"]["0"]
    counted = dict(zip(state["names"], state["clips"].tolist(), strict=True))
    assert counted == {n: (9 if n.startswith("head") else 3) for n, _ in run.module.named_parameters()}


def test_two_optimizers_have_counters_and_statistics_of_their_own() -> None:
    callback = StableSPAM(norm="history", reset_every_n_steps=None, log_every_n_steps=2)
    run = fit([callback], module=TwoOptimizerNet(), max_steps=12, limit_val_batches=0)
    states = callback.state_dict()["optimizers"]
    assert [states[key]["updates"] for key in "01"] == [6, 6]
    assert [{name.split(".")[0] for name in states[key]["names"]} for key in "01"] == [{"body"}, {"head"}]
    assert list(entries(run.logged, "stable_spam/norm/0")) == [1, 3, 5]
    assert list(entries(run.logged, "stable_spam/norm/1")) == [1, 3, 5]


def test_what_is_logged() -> None:
    before = Watches()
    callback = StableSPAM(gamma3=0.5, log_every_n_steps=3)
    run = fit([before, callback], max_steps=8, limit_val_batches=0)
    names = [f"stable_spam/{name}" for name in ("norm", "clip_share", "threshold")]
    found = {name: entries(run.logged, name) for name in names}
    assert all(list(values) == [2, 5] for values in found.values())
    twins = {name: Twin(gamma3=0.5) for name in before.seen[0]}
    for step, raw in enumerate(before.seen):
        limits = {}
        for name, gradient in raw.items():
            twins[name](gradient, None)
            limits[name] = twins[name].largest / (1 - 0.5 ** (step + 1))
        if step in (2, 5):
            norm = torch.cat([gradient.flatten() for gradient in raw.values()]).norm()
            assert found[names[0]][step] == pytest.approx(float(norm), rel=1e-5)
            # The bias before a batch norm has no gradient but rounding.
            over = [(gradient.abs() > limits[n]).flatten() for n, gradient in raw.items()]
            assert found[names[1]][step] == pytest.approx(float(torch.cat(over).float().mean()), abs=0.02)
            assert found[names[2]][step] == pytest.approx(sum(limits.values()) / len(limits), rel=1e-5)


# ------------------------------------------------------------------ resets


def fresh_adam_step(before: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(value.clone()) for name, value in before.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    Adam(parameters.values(), **ADAM).step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("settings", [{}, {"foreach": False}, {"amsgrad": True}, {"fused": True}])
def test_the_update_after_a_reset_is_the_first_of_a_new_optimizer(settings: dict[str, Any]) -> None:
    after = Watches()
    module = adam_net(**settings)
    fit([StableSPAM(**OFF, reset_every_n_steps=4), after], module=module, max_steps=10, limit_val_batches=0)
    plain = adam_net(**settings)
    fit([], module=plain, max_steps=10, limit_val_batches=0)
    assert_same(module.history[:4], plain.history[:4], "nothing is reset in the first four updates")
    for step in (4, 8):
        expected = fresh_adam_step(module.history[step - 1], after.seen[step])
        assert_same(module.history[step], expected, f"update {step + 1}", tolerance=1e-6)
        assert not torch.allclose(module.history[step]["head.weight"], plain.history[step]["head.weight"])


def test_clip_and_norm_statistics_are_not_reset() -> None:
    callback = StableSPAM(reset_every_n_steps=3)
    fit([callback], module=adam_net(), max_steps=10, limit_val_batches=0)
    assert set(callback.state_dict()["optimizers"]["0"]["clips"].tolist()) == {10}


def test_a_step_count_in_the_parameter_group_restarts_too() -> None:
    module = NetWith(lambda parameters: pytorch_optimizer.AdaBelief(parameters, lr=0.01), norm=False)
    entry = "exp_avg_var"
    settings = {"reset_every_n_steps": 4, "reset_entries": ["exp_avg", entry, "step"]}
    run = fit([StableSPAM(**OFF, **settings)], module=module, max_steps=6, limit_val_batches=0)
    assert run.trainer.optimizers[0].param_groups[0]["step"] == 2


def test_an_optimizer_without_known_moments_is_told_early() -> None:
    module = NetWith(lambda parameters: torch.optim.RMSprop(parameters, lr=0.01))
    with pytest.raises(ValueError, match=r"moments of RMSprop, which keeps .*square_avg.*reset_every_n_steps=None"):
        fit([StableSPAM()], module=module, max_steps=6, limit_val_batches=0)
    assert len(module.history) == 1
    settings = {"reset_entries": ["square_avg", "step"], "reset_every_n_steps": 2}
    fit([StableSPAM(**settings)], module=NetWith(module.make), max_steps=6, limit_val_batches=0)

    bare = NetWith(lambda parameters: SGD(parameters, lr=0.01))
    with pytest.raises(ValueError, match=r"StableSPAM\(reset_every_n_steps=1000\).* SGD, which keeps no state"):
        fit([StableSPAM()], module=bare, max_steps=6, limit_val_batches=0)
    fit([StableSPAM(reset_every_n_steps=None)], module=bare, max_steps=2, limit_val_batches=0)


# ------------------------------------------------------------------ the cosine


def test_the_cosine_multiplies_the_first_beta_and_is_gone_at_the_end() -> None:
    seen: list[float] = []

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            seen.append(optimizer.param_groups[0]["betas"])

    callback = StableSPAM(total_steps=8, final_scale=0.25)
    run = fit([callback, Looks()], module=adam_net(betas=(0.8, 0.95)), max_steps=10, limit_val_batches=0)
    factors = [0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * min(1, step / 8))) for step in range(10)]
    assert [first for first, _ in seen] == pytest.approx([0.8 * factor for factor in factors])
    assert {second for _, second in seen} == {0.95}
    assert run.trainer.optimizers[0].param_groups[0]["betas"] == (0.8, 0.95)


def test_the_betas_come_back_after_a_failure_and_resume_as_they_were(tmp_path: Path) -> None:
    def net() -> NetWith:
        return adam_net(betas=(0.8, 0.95))

    def spam() -> StableSPAM:
        return StableSPAM(total_steps=12, reset_every_n_steps=5, log_every_n_steps=2)

    straight = fit([spam()], module=net(), max_steps=12, limit_val_batches=0)
    path = tmp_path / "cut.ckpt"
    fit([spam(), SaveAt(7, str(path))], module=net(), max_steps=9, limit_val_batches=0)
    saved = torch.load(path, weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["betas"][0] < 0.8, "the checkpoint has them scaled"
    resumed = fit([spam()], module=net(), max_steps=12, limit_val_batches=0, ckpt_path=str(path))
    assert_same(resumed.snapshot(7), straight.snapshot(7), "resumed against uninterrupted")

    failing = net()
    failing.fail_at = ("train", 6)
    trainers = []

    class Keeps(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainers.append(trainer)

    with pytest.raises(RuntimeError, match="deliberate failure"):
        fit([spam(), Keeps()], module=failing, max_steps=12, limit_val_batches=0)
    assert trainers[0].optimizers[0].param_groups[0]["betas"] == (0.8, 0.95)


# ------------------------------------------------------------------ scalers and several fits


def test_what_a_gradient_scaler_will_skip_is_left_to_it() -> None:
    class Overflows(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 3:
                pl_module.head.weight.grad.fill_(math.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    callback, after, module = StableSPAM(), Watches(), adam_net()
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    fit([Overflows(), callback, after, precision], module=module, max_steps=6, limit_val_batches=0)
    assert not after.seen[3]["head.weight"].isfinite().any()
    assert scaler.get_scale() == 32.0
    assert_same(module.history[3], module.history[2], "the scaler skipped it")
    state = callback.state_dict()["optimizers"]["0"]
    counted = dict(zip(state["names"], state["clips"].tolist(), strict=True))
    assert counted["head.weight"] == 5
    assert counted["head.bias"] == 6
    assert all(bool(state[name].isfinite().all()) for name in ("maximum", "norm", "square"))


def test_statistics_go_on_with_the_module_and_start_anew_with_another() -> None:
    callback, module = StableSPAM(), adam_net()
    for updates in (4, 8):
        fit([callback], module=module, max_steps=4, limit_val_batches=0)
        assert callback.state_dict()["optimizers"]["0"]["updates"] == updates
    fit([callback], module=adam_net(), max_steps=3, limit_val_batches=0)
    assert callback.state_dict()["optimizers"]["0"]["updates"] == 3


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "global"}, r"norm='global' is unknown. Choose 'unit', 'history' or None"),
        ({"gamma1": 1.0}, r"gamma1=1.0 is not in \[0, 1\)"),
        ({"gamma2": -0.1}, r"gamma2=-0.1 is not in"),
        ({"gamma3": True}, r"gamma3=True is not in"),
        ({"eps": 0.0}, r"eps=0.0 is not a finite number above 0"),
        ({"reset_every_n_steps": 0}, r"reset_every_n_steps=0 is not a whole number of optimizer steps from 1 on"),
        ({"reset_entries": "exp_avg"}, r"reset_entries='exp_avg' is not a list of names"),
        ({"total_steps": 0}, r"total_steps=0 is not a whole number of optimizer steps from 1 on"),
        ({"final_scale": 1.5}, r"final_scale=1.5 is above 1"),
        ({"log_every_n_steps": 0}, r"log_every_n_steps=0 is not a whole number"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableSPAM(**settings)


def test_bad_input_of_the_function_is_told() -> None:
    with pytest.raises(ValueError, match="norm='l1' is unknown"):
        update_stable_spam([torch.ones(2)], init_stable_spam(1), norm="l1")
    with pytest.raises(ValueError, match="1 gradients were given with the statistics of 2 tensors"):
        update_stable_spam([torch.ones(2)], init_stable_spam(2))
