"""Modules whose validation calls their own training step: nothing that is added to a training step is in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import entries
from lightning.pytorch import Callback
from torch import Tensor

from lightning_stable.callbacks.lae import LAE
from lightning_stable.callbacks.lwf import LwF
from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.replay import Replay
from lightning_stable.callbacks.saf import SAF
from lightning_stable.callbacks.sam import SAM
from lightning_stable.callbacks.softmax_collapse import SoftmaxCollapseMonitor
from lightning_stable.testing.harness import Net, Run, Stream, assert_same, fit

STEPS = 14


class Plain(Net):
    """Logs the loss of its validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))


class Shared(Plain):
    """Validates by its own training step, as is common."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[0]))


PLUGINS: dict[str, Callable[[str | None], Callback]] = {
    "lwf": lambda logits: LwF(lam=4.0, logits=logits, task_steps=[5, 9]),
    "mesa": lambda logits: MESA(lam=2.0, logits=logits, start_epoch=0, decay=0.5),
    "saf": lambda logits: SAF(lam=2.0, logits=logits, start_epoch=1, lag_epochs=1),
    "softmax_collapse": lambda logits: SoftmaxCollapseMonitor(logits=logits, log_every_n_steps=1),
    "lae": lambda logits: LAE(["body.*"], decay=0.5, logits=logits, task_steps=[5, 9]),
    "replay": lambda logits: Replay(capacity=24),
    "sam": lambda logits: SAM(rho=0.05),
    "looksam": lambda logits: SAM(rho=0.05, variant="looksam", interval=3),
}
# Those that look for no head have no name to be given.
CASES = [
    (name, head) for name in PLUGINS for head in (None, "head") if head or name not in ("replay", "sam", "looksam")
]


def run(plugin: Callback, module: Net, accumulate: int) -> Run:
    # Validations come in the middle of the batches of an optimizer step, too.
    settings = {"val_check_interval": 1, "num_sanity_val_steps": 2, "accumulate_grad_batches": accumulate}
    return fit([plugin], module=module, validation=Stream(2, seed=5), max_steps=STEPS, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "logits"), CASES)
def test_a_validation_is_no_training(name: str, logits: str | None, accumulate: int) -> None:
    expected, found = (run(PLUGINS[name](logits), module(), accumulate) for module in (Plain, Shared))
    assert_same(found.snapshot(), expected.snapshot(), "validating by the training step against a step of its own")
    assert entries(found.logged, "val_loss")


class AsksBetween(Callback):
    """Asks for the training loss without gradients, between two steps."""

    def on_train_batch_end(self, trainer: Any, pl_module: Plain, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            asked = pl_module.training_step(batch, batch_idx)
            assert torch.equal(asked, pl_module.loss(batch))


@pytest.mark.parametrize("name", ["lwf", "mesa", "saf"])
def test_a_step_without_gradients_has_no_term(name: str) -> None:
    class NoNorm(Plain):
        def __init__(self) -> None:
            super().__init__(norm=False)

    plugins = [PLUGINS[name]("head") for _ in range(2)]
    expected = fit(plugins[:1], module=NoNorm(), max_steps=STEPS)
    found = fit([plugins[1], AsksBetween()], module=NoNorm(), max_steps=STEPS)
    assert_same(found.snapshot(), expected.snapshot() | {"plugins": found.snapshot()["plugins"]}, "runs")


class TrainsInEvalMode(Plain):
    """Trains in evaluation mode, as where dropout and batch statistics are to stand still."""

    def on_train_epoch_start(self) -> None:
        self.eval()


@pytest.mark.parametrize("name", ["lwf", "mesa", "saf"])
def test_a_module_that_trains_in_evaluation_mode_has_the_term(name: str) -> None:
    found = fit([PLUGINS[name]("head")], module=TrainsInEvalMode(), max_steps=STEPS)
    assert entries(found.logged, f"{name}_loss")
