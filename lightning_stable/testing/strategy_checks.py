"""How strategies come under contract: every check runs in both processes of the pair, each of which checks itself."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks import EMA
from lightning_stable.testing import contracts
from lightning_stable.testing._host import hastened
from lightning_stable.testing.harness import Net, SaveAt, Stream, assert_same, fit, vector
from lightning_stable.testing.modules import prepared_by, trained_by
from lightning_stable.testing.rows import CUT, STEPS, Row, StrategySettings, found_by, preparation
from lightning_stable.testing.workers import Pair, of_all_ranks, of_rank_zero

__all__ = ["begin", "check_alone", "check_shared_average", "check_two_ranks", "job", "on_both_ranks"]


def on_both_ranks(workers: Pair, check: str, row: Row, tmp_path: Path, **arguments: Any) -> None:
    """Run one of the checks in both processes of the pair.

    Args:
        workers: The pair.
        check: Name of a function of ``contracts.py`` or of this file.
        row: The strategy.
        tmp_path: A folder for both.
        arguments: What else the check takes; another row crosses as the first one does.
    """
    crossing = {name: found_by(value) if isinstance(value, Row) else value for name, value in arguments.items()}
    workers.run(
        "lightning_stable.testing.strategy_checks:job",
        check=check,
        find=found_by(row),
        folder=str(tmp_path),
        arguments=crossing,
    )


def begin() -> None:
    """Let this process be one of a group, which later jobs find."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def job(check: str, find: Callable[[], Row], folder: str, arguments: dict[str, Any]) -> None:
    """Run a check on this rank."""
    os.chdir(tempfile.mkdtemp(dir=folder))
    begin()
    row = find()
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    prepare = preparation(row, *(value for value in arguments.values() if isinstance(value, Row)))
    function = globals().get(check) or getattr(contracts, check)
    optimizer = row.settings.optimizer if isinstance(row.settings, StrategySettings) else "sgd"
    with hastened(), trained_by(optimizer), prepared_by(prepare):
        function(row, tmp_path=Path(folder), **arguments)


# ---------------------------------------------------------------------------------------------------- 4


class _SeenInValidation(Callback):
    """Notes the weights that validations see."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    @override
    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen[trainer.global_step] = vector(dict(pl_module.named_parameters()))


def check_two_ranks(row: Row, tmp_path: Path) -> None:
    """Both ranks end alike, as the row's oracle says, and validate with the mean of what they have in between."""
    watch, plugin = _SeenInValidation(), row.settings.make()
    run = fit([plugin, watch], validation=Stream(2, seed=5), max_steps=STEPS, val_check_interval=4)
    own = {**run.snapshot(), "logged": None}
    if not row.has_rounds:
        # The host lets each process go on with the batch statistics of its own samples.
        own["weights"] = vector(dict(run.module.named_parameters()))
    assert_same(own, of_rank_zero(own), "a rank against rank 0 at the end")
    steps = of_all_ranks(run.steps)
    for step, seen in watch.seen.items():
        assert_same(seen, of_rank_zero(seen), f"the weights of a rank against those of rank 0 in validation {step}")
        if step < STEPS:
            # What a rank goes on from after the validation is what it had before.
            mean = torch.stack([vector(each[step].before) for each in steps]).mean(0)
            assert_same(seen, mean, f"the weights in the validation after step {step} against the mean", 1e-6)
    assert watch.seen, "there was no validation"
    row.settings.oracle(run, plugin)


# ---------------------------------------------------------------------------------------------------- 10


class _AfterEachStep(Callback):
    """Notes the weights at the end of each batch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights.append(vector(dict(pl_module.named_parameters())))


def check_shared_average(row: Row, tmp_path: Path) -> None:
    """At a checkpoint in the middle of a round, EMA is the average of the workers' mean weights, on both ranks."""
    path, notes = tmp_path / "shared.ckpt", _AfterEachStep()
    average = EMA(decay=0.8, finish_with="live")
    fit([row.settings.make(), notes, average, SaveAt(CUT - 1, str(path))], max_steps=STEPS)
    means = [torch.stack(pair).mean(0).double() for pair in zip(*of_all_ranks(notes.weights), strict=True)]
    expected = vector(dict(Net().named_parameters())).double()
    for weights in means[: CUT - 1]:
        expected = 0.8 * expected + 0.2 * weights
    saved = next(state for key, state in torch.load(path, weights_only=True)["callbacks"].items() if "EMA" in key)
    found = vector(saved["shadow"]).double()
    assert_same(found, expected, "EMA against that of the mean weights", 1e-6)
    ended = vector(average.averaged())
    assert_same(ended, of_rank_zero(ended), "the average of a rank against that of rank 0 at the end")


# ---------------------------------------------------------------------------------------------------- 3


def check_alone(row: Row, tmp_path: Path) -> None:
    """In one process the strategy changes no bit of training."""
    settings = row.settings
    assert isinstance(settings, StrategySettings)
    with trained_by(settings.optimizer):
        contracts.check_inert(
            dataclasses.replace(row, settings=dataclasses.replace(settings, identities=settings.alone)), tmp_path
        )
