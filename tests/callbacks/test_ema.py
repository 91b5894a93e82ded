"""EMA in a Trainer: precision, buffers, what it refuses, and the faults of the host's own average."""

import copy
from typing import Any

import pytest
import torch
from averages import assert_average, parameters, validation
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from lightning_stable.callbacks import EMA
from lightning_stable.testing.harness import DictNet, Net, TwoOptimizerNet, assert_same, fit

# ------------------------------------------------------------------ precision, device, buffers


def test_bfloat16_weights_keep_a_float32_shadow() -> None:
    run = fit(
        [EMA(0.99, dtype="float32", validate_with="both")],
        validation=validation(),
        max_steps=8,
        precision="bf16-true",
        val_check_interval=3,
    )
    callback = run.plugins[0]
    shadow = callback.state_dict()["shadow"]
    assert {value.dtype for value in shadow.values()} == {torch.float32}
    history = [run.steps[0].before, *(step.weights for step in run.steps)]
    assert history[0]["head.weight"].dtype == torch.bfloat16
    assert_average(shadow, history, 0.99)
    assert {value.dtype for value in parameters(run.module).values()} == {torch.bfloat16}
    live = callback.state_dict()["live"]
    assert_same(live, run.steps[-1].weights, "live weights beside a wider shadow")


def test_buffers_are_the_live_ones_or_averaged() -> None:
    runs = {
        buffers: fit([EMA(0.5, buffers=buffers)], validation=validation(), max_steps=9)
        for buffers in ("copy", "average")
    }
    means = {buffers: run.module.body[1].running_mean for buffers, run in runs.items()}
    assert not torch.allclose(means["copy"], means["average"])
    for run in runs.values():
        assert int(run.module.body[1].num_batches_tracked) == 9
    plain = fit([], validation=validation(), max_steps=9)
    assert torch.equal(means["copy"], plain.module.body[1].running_mean)


def test_a_shadow_on_a_named_device_and_every_few_steps() -> None:
    run = fit([EMA(0.5, device="cpu", every_n_steps=3)], validation=validation(), max_steps=10)
    history = [run.steps[0].before, *(run.steps[step - 1].weights for step in (3, 6, 9))]
    assert_average(parameters(run.module), history, 0.5)


def test_two_optimizers_are_averaged_once_a_batch() -> None:
    run = fit([callback := EMA(0.5)], module=TwoOptimizerNet(), validation=validation(), max_steps=12)
    assert run.trainer.global_step == 12
    assert callback.updates == 6


def test_parameters_that_begin_to_train_join() -> None:
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.head.requires_grad_(trainer.current_epoch > 0)

    module = Net()
    module.head.requires_grad_(False)
    run = fit([Unfreezes(), EMA(0.5)], module=module, validation=validation(), max_steps=12)
    history = [run.steps[0].before, *(step.weights for step in run.steps)]
    assert_average(parameters(run.module), history, 0.5)


# ------------------------------------------------------------------ the host's own average, and what ours does instead


def test_a_start_step_that_is_not_reached() -> None:
    module = Net()
    before = parameters(module)
    host = fit([EMAWeightAveraging(update_starting_at_step=100)], module=module, validation=validation(), max_steps=6)
    assert_same(parameters(host.module), before, "the host's average ends on the initial weights")

    with pytest.warns(UserWarning, match=r"EMA\(start_step=100\) never began: training ended at optimizer step 6"):
        ours = fit([EMA(start_step=100)], validation=validation(), max_steps=6)
    assert_same(parameters(ours.module), ours.steps[-1].weights, "ours ends on the live ones")


def test_one_object_over_two_tasks() -> None:
    def second_fit(callback: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module = Net()
        for _ in range(2):
            start = parameters(module)
            fit([callback], module=module, validation=validation(), max_steps=6)
        return start, parameters(module)

    start, end = second_fit(EMAWeightAveraging(decay=0.5))
    assert_same(end, start, "the host's average discards the second task")
    start, end = second_fit(EMA(0.5))
    assert not torch.equal(end["head.weight"], start["head.weight"])


def test_integer_buffers() -> None:
    host = fit([EMAWeightAveraging(decay=0.9)], validation=validation(), max_steps=12)
    assert int(host.module.body[1].num_batches_tracked) != 12
    ours = fit([EMA(0.9, buffers="average")], validation=validation(), max_steps=12)
    assert int(ours.module.body[1].num_batches_tracked) == 12


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0 is not in \[0, 1\)"),
        ({"decay": -0.1}, r"decay=-0.1 is not in"),
        ({"warmup": "linear"}, r"warmup='linear' is unknown. Choose None"),
        ({"every_n_steps": 0}, r"every_n_steps=0 is not a positive number"),
        ({"start_step": -1}, r"start_step=-1 is not a number of optimizer steps"),
        ({"buffers": "skip"}, r"buffers='skip' is unknown. Choose one of 'copy', 'average'"),
        ({"validate_with": "raw"}, r"validate_with='raw' is unknown"),
        ({"finish_with": "best"}, r"finish_with='best' is unknown"),
        ({"dtype": "int8"}, r"dtype='int8' is not a floating-point dtype"),
        ({"dtype": "float31"}, r"dtype='float31' is not a floating-point dtype"),
    ],
)
def test_bad_settings_are_told_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EMA(**settings)


def test_a_second_average_is_refused() -> None:
    with pytest.raises(ValueError, match=r"EMA and EMAWeightAveraging are both among"):
        fit([EMA(), EMAWeightAveraging()], max_steps=2, limit_val_batches=0)


def test_sharded_strategies_are_refused() -> None:
    trainer = copy.copy(fit([], max_steps=1, limit_val_batches=0).trainer)
    trainer._accelerator_connector = copy.copy(trainer._accelerator_connector)
    trainer._accelerator_connector.strategy = object.__new__(FSDPStrategy)
    with pytest.raises(ValueError, match=r"EMA does not work with FSDPStrategy: its weights are sharded"):
        EMA().setup(trainer, Net(), "fit")


def test_nothing_to_average_is_a_clear_error() -> None:
    class Frozen(DictNet):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + torch.zeros((), requires_grad=True)

    module = Frozen().requires_grad_(False)
    with pytest.raises(ValueError, match="EMA found no parameter of Frozen that trains"):
        fit([EMA()], module=module, max_steps=2, limit_val_batches=0)
