"""EMA in a Trainer: what validation measures, what checkpoints hold, several fits, and the faults it does not share."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.harness import DictNet, Net, SaveAt, Stream, TwoOptimizerNet, assert_same, fit
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from oracles.averaging_twin import ema
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_stable.callbacks import EMA


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def validation() -> Stream:
    return Stream(2, seed=5)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def flat(weights: dict[str, Tensor]) -> list[list[float]]:
    return [value.double().flatten().tolist() for value in weights.values()]


def assert_average(found: dict[str, Tensor], history: list[dict[str, Tensor]], decay: float) -> None:
    for value, twin in zip(found.values(), ema([flat(weights) for weights in history], decay), strict=True):
        assert value.double().flatten().tolist() == pytest.approx(twin, rel=1e-4, abs=1e-6)


def loss_of(weights: dict[str, Tensor], buffers: nn.Module) -> float:
    """Validation loss of given parameters with the buffers of another module."""
    module = Net()
    module.load_state_dict({**buffers.state_dict(), **weights})
    module.eval()
    with torch.no_grad():
        return float(sum(module.loss(validation().batch(index)) for index in range(2)) / 2)


# ------------------------------------------------------------------ what validation measures


def test_both_sets_are_validated_and_named() -> None:
    run = fit([EMA(0.5, validate_with="both")], validation=validation(), max_steps=6)
    logged = next(entry for _, entry in run.logged if "val_loss" in entry)
    history = [run.steps[0].before, *(step.weights for step in run.steps)]
    averaged = ema([flat(weights) for weights in history], 0.5)
    shapes = run.steps[0].before
    twin = {name: torch.tensor(value).reshape(shapes[name].shape) for name, value in zip(shapes, averaged, strict=True)}
    assert logged["val_loss"] == pytest.approx(loss_of(twin, run.module), rel=1e-4)
    assert logged["val_loss_live"] == pytest.approx(loss_of(run.steps[-1].weights, run.module), rel=1e-5)
    assert logged["val_loss"] != pytest.approx(logged["val_loss_live"], rel=1e-3)
    assert "val_loss_live" in run.trainer.callback_metrics


def test_live_validation_logs_the_live_weights_only() -> None:
    run = fit([EMA(0.5, validate_with="live", finish_with="live")], validation=validation(), max_steps=6)
    assert not [name for _, entry in run.logged for name in entry if name.endswith("_live")]
    assert_same(parameters(run.module), run.steps[-1].weights, "live finish")


class Elaborate(Net):
    """Logs a metric object, a sum, values of an epoch hook, and over two dataloaders."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.mean.update(loss)
        self.log_dict({"plain": loss}, batch_size=len(batch[0]))
        self.log("total", loss, reduce_fx="sum", batch_size=len(batch[0]))
        assert not self.training

    def on_validation_epoch_end(self) -> None:
        self.log("metric", self.mean)
        self.log("from_hook", torch.stack(self.outputs).mean())
        self.count = len(self.outputs)
        self.outputs.clear()


def test_both_works_for_metric_objects_epoch_hooks_and_several_dataloaders() -> None:
    run = fit(
        [EMA(0.5, validate_with="both")],
        module=Elaborate(),
        validation=[validation(), Stream(3, seed=6)],
        max_steps=6,
    )
    logged = {name: value for _, entry in run.logged for name, value in entry.items()}
    names = ("metric", "from_hook", "plain/dataloader_idx_0", "plain/dataloader_idx_1", "total/dataloader_idx_0")
    for name in names:
        base, mark, index = name.partition("/")
        assert f"{base}_live{mark}{index}" in logged, sorted(logged)
    assert run.module.count == 5
    assert logged["metric_live"] == pytest.approx(logged["from_hook_live"], rel=1e-5)
    assert logged["total_live/dataloader_idx_0"] == pytest.approx(2 * logged["plain_live/dataloader_idx_0"], rel=1e-5)
    live_only = fit(
        [EMA(0.5, validate_with="live", finish_with="live")],
        module=Elaborate(),
        validation=[validation(), Stream(3, seed=6)],
        max_steps=6,
    )
    plain = {name: value for _, entry in live_only.logged for name, value in entry.items()}
    for name in names:
        base, mark, index = name.partition("/")
        assert logged[f"{base}_live{mark}{index}"] == pytest.approx(plain[name], rel=1e-5), name


def test_validation_does_not_move_training() -> None:
    def run(plugins: list[Any]) -> Any:
        torch.manual_seed(0)
        module = Net(dropout=0.5)
        return fit(plugins, module=module, validation=validation(), max_steps=9, val_check_interval=2)

    plain = run([])
    with_both = run([EMA(0.5, validate_with="both", finish_with="live")])
    assert_same(with_both.module.state_dict(), plain.module.state_dict(), "validating both sets")


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("validate_with", ["ema", "live", "both"])
def test_a_monitored_checkpoint_holds_the_weights_it_was_monitored_by(
    tmp_path: Path, validate_with: str, weights_only: bool
) -> None:
    saving = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_weights_only=weights_only)
    run = fit(
        [saving, EMA(0.6, validate_with=validate_with)],
        validation=validation(),
        max_steps=11,
        val_check_interval=3,
        enable_checkpointing=True,
    )
    weights = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    names = parameters(run.module)
    module = Net()
    module.load_state_dict(weights)
    assert loss_of({name: weights[name] for name in names}, module) == pytest.approx(
        float(saving.best_model_score), rel=1e-5
    )


def test_both_sets_load_into_a_plain_module(tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    run = fit([EMA(0.5), SaveAt(5, str(path))], validation=validation(), max_steps=8)
    head = nn.Linear(8, 1)
    EMA.load_weights(path, "live", into=head, prefix="head.")
    assert torch.equal(head.weight, run.steps[4].weights["head.weight"])
    averaged = EMA.load_weights(path, "ema", into=Net())
    history = [run.steps[0].before, *(step.weights for step in run.steps[:5])]
    assert_average({name: averaged[name] for name in history[0]}, history, 0.5)
    with pytest.raises(ValueError, match="which='raw' is unknown"):
        EMA.load_weights(path, "raw")
    with pytest.raises(ValueError, match=r"prefix='body\.9' fits no weight"):
        EMA.load_weights(path, "ema", prefix="body.9")


def test_a_checkpoint_without_an_average_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    fit([SaveAt(2, str(path))], max_steps=3, limit_val_batches=0)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        EMA.load_weights(path)


def test_a_checkpoint_holds_the_average_once(tmp_path: Path) -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body.insert(4, nn.Linear(8, 8))
            self.wide = nn.Linear(500, 500)

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.wide.weight.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    sizes = []
    for plugins in ([], [EMA(0.5)]):
        path = tmp_path / f"{len(plugins)}.ckpt"
        fit([*plugins, SaveAt(2, str(path))], module=Wide(), max_steps=3, limit_val_batches=0)
        sizes.append(path.stat().st_size)
    # Weights alone against live and averaged weights; the state_dict shares the memory of the average.
    assert 1.9 < sizes[1] / sizes[0] < 2.1


def test_saving_after_the_fit_keeps_both_sets(tmp_path: Path) -> None:
    for finish in ("ema", "live"):
        run = fit([EMA(0.5, finish_with=finish)], validation=validation(), max_steps=6)
        run.trainer.save_checkpoint(tmp_path / "end.ckpt")
        live = EMA.load_weights(tmp_path / "end.ckpt", "live")
        assert_same({name: live[name] for name in run.steps[-1].weights}, run.steps[-1].weights, f"live, {finish}")
        averaged = EMA.load_weights(tmp_path / "end.ckpt", "ema")
        history = [run.steps[0].before, *(step.weights for step in run.steps)]
        assert_average({name: averaged[name] for name in history[0]}, history, 0.5)


def test_tied_weights_are_averaged_once_and_saved_under_both_names(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(8, 1)
            self.twin.weight = self.head.weight

    path = tmp_path / "tied.ckpt"
    fit([EMA(0.5), SaveAt(3, str(path))], module=Tied(), validation=validation(), max_steps=4)
    for which in ("ema", "live"):
        weights = EMA.load_weights(path, which, into=Tied())
        assert torch.equal(weights["twin.weight"], weights["head.weight"])
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["twin.weight"], EMA.load_weights(path, "ema")["head.weight"])


def test_resume_before_the_average_began(tmp_path: Path) -> None:
    path = str(tmp_path / "cut.ckpt")

    def run(**settings: Any) -> Any:
        extra = [] if settings else [SaveAt(4, path)]
        return fit([EMA(0.5, start_step=6), *extra], validation=validation(), max_steps=12, **settings)

    straight, resumed = run(), run(ckpt_path=path)
    assert_same(resumed.module.state_dict(), straight.module.state_dict(), "resumed before the start step")
    history = [step.weights for step in straight.steps[5:]]
    assert_average(parameters(straight.module), history, 0.5)


def test_resuming_another_module_is_a_clear_error(tmp_path: Path) -> None:
    class Fewer(Net):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 1, bias=False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    path = str(tmp_path / "cut.ckpt")
    fit([EMA(0.5), SaveAt(4, path)], max_steps=5, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"this module does not have, the first is 'head.bias' of 1"):
        fit([EMA(0.5)], module=Fewer(), max_steps=8, ckpt_path=path, limit_val_batches=0)


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


# ------------------------------------------------------------------ several fits


def test_the_average_goes_on_over_the_tasks_of_a_stream() -> None:
    callback, module = EMA(0.9, finish_with="live"), Net()
    for task in range(2):
        fit([callback], module=module, train=Stream(seed=task), validation=validation(), max_steps=6)
    history = [module.steps[0].before, *(step.weights for step in module.steps)]
    assert_same(parameters(module), module.steps[-1].weights, "live weights at the end")
    assert_average(callback.state_dict()["shadow"], history, 0.9)
    assert callback.updates == 12

    callback.reset()
    fit([callback], module=module, train=Stream(seed=2), validation=validation(), max_steps=6)
    assert_average(
        callback.state_dict()["shadow"], [module.steps[11].weights, *(s.weights for s in module.steps[12:])], 0.9
    )


def test_a_fit_that_ended_on_the_average_goes_on_from_it() -> None:
    callback, module = EMA(0.9), Net()
    fit([callback], module=module, validation=validation(), max_steps=6)
    end = parameters(module)
    fit([callback], module=module, validation=validation(), max_steps=6)
    assert_same(module.steps[6].before, end, "the second fit begins where the first ended")
    assert_average(parameters(module), [end, *(step.weights for step in module.steps[6:])], 0.9)


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
