"""What validation measures with EMA: both sets, over every kind of loader, without a trace in training."""

from typing import Any

import pytest
import torch
from averages import flat, loss_of, parameters, validation
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from oracles.averaging_twin import ema
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from lightning_stable.callbacks import EMA
from lightning_stable.testing.harness import Net, Stream, assert_same, fit

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


class Collects(Net):
    """Keeps its outputs in the batch hook, begins anew in the start hook, and asks for the batch only."""

    def on_validation_start(self) -> None:
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any) -> Tensor:
        return self.loss(batch)

    def on_validation_batch_end(self, outputs: Tensor, *args: Any) -> None:
        self.outputs.append(outputs)

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", torch.stack(self.outputs).mean())


class Numbers(IterableDataset):
    """Batches of a stream, for workers."""

    def __iter__(self) -> Any:
        yield from iter(Stream(2, seed=5))


def samples(**settings: Any) -> DataLoader:
    stream = Stream(2, seed=5)
    x, y = (torch.cat(parts) for parts in zip(*(stream.batch(index) for index in range(2)), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=8, **settings)


@pytest.mark.parametrize(
    "loader",
    [
        samples,
        lambda: samples(num_workers=1, persistent_workers=True),
        lambda: DataLoader(Numbers(), batch_size=None, num_workers=1, persistent_workers=True),
        lambda: CombinedLoader([samples()], "sequential"),
    ],
    ids=["plain", "persistent workers", "iterable, persistent workers", "combined"],
)
def test_the_extra_pass_leaves_the_hosts_own_whole(loader: Any) -> None:
    def logged(validate_with: str) -> dict[str, float]:
        average = EMA(0.5, validate_with=validate_with, finish_with="live")
        run = fit([average], module=Collects(), validation=loader(), max_steps=6, val_check_interval=3)
        return {name: value for _, entry in run.logged for name, value in entry.items() if name.startswith("val")}

    both = logged("both")
    assert both["val_loss"] == pytest.approx(logged("ema")["val_loss"], rel=1e-6)
    assert both["val_loss_live"] == pytest.approx(logged("live")["val_loss"], rel=1e-6)


def test_loaders_read_side_by_side() -> None:
    class Pairs(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch[0]) + self.loss(batch[1]), batch_size=8)

    run = fit(
        [EMA(0.5, validate_with="both")],
        module=Pairs(),
        validation=CombinedLoader([samples(), samples()], "min_size"),
        max_steps=6,
    )
    assert run.trainer.callback_metrics["val_loss_live"] > 0


def test_an_exception_in_the_extra_pass_leaves_nothing() -> None:
    class Fails(Elaborate):
        def validation_step(self, *args: Any) -> None:
            super().validation_step(*args)
            raise RuntimeError("deliberate failure")

    module = Fails()
    with pytest.raises(RuntimeError, match="deliberate"):
        fit([EMA(0.5, validate_with="both")], module=module, validation=validation(), max_steps=6)
    assert "log" not in vars(module)
    assert_same(parameters(module), module.steps[-1].weights, "live weights after the exception")


def test_a_checkpoint_is_not_chosen_by_the_weights_it_does_not_hold() -> None:
    with pytest.raises(ValueError, match=r"monitor='val_loss_live'\) would choose by the live weights .* 'val_loss'"):
        fit(
            [ModelCheckpoint(monitor="val_loss_live"), EMA(validate_with="both")],
            max_steps=2,
            enable_checkpointing=True,
        )
