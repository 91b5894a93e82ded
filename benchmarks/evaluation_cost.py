"""What it costs to evaluate all tasks inside training: StabilityGap against a plain loop that does the same work.

The loop is what one would write in ``on_train_batch_end``, and what evaluation plugins of continual-learning libraries
do: for each task iterate over its DataLoader without gradients in evaluation mode, count the right ones, read the
accuracy. StabilityGap joins the samples of all tasks, keeps them collated, runs them in one pass, and reads scores from
the device now and then. Both evaluate the same samples: a check compares their scores.

Two sizes: 5 tasks of 108 samples (the held-out part of split digits) and 5 of 1000 (enlarged by noise). The module is a
perceptron of 64-400-400-10, trained with SGD on batches of 32, and of 256 as in arXiv 2205.13452. Cost is the processor
time of a fit from its eleventh update on, when all tasks have begun, minus that of the same fit without evaluation;
fits of all kinds take turns in one process, and the table has medians over the rounds.

Avalanche's evaluation plugin is not measured: Avalanche needs torchvision, whose wheel on PyPI does not load beside the
build of torch that this project is tested with. The loop is what that plugin does at each evaluation, without its
bookkeeping.

Targets: at most 0.6 of the loop's cost, and with ``every_n_steps=10`` less than 10 % on top of training. The second one
depends on the batch more than on the code: a tenth of 540 samples forward, against a batch forward and backward, is
54 / (3 x 32) = 56 % of the arithmetic with batches of 32, and 7 % with batches of 256.
"""

import itertools
import logging
import statistics
import time
import warnings
from typing import Any

import torch
from _perceptron import Perceptron
from _report import arguments, publish, table, verdict
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks import StabilityGap
from lightning_stable.data.digits import DigitsDataModule

ROUNDS, SKIPPED, STEPS, BATCHES = 7, 10, 110, (32, 256)
SIZES = (108, 1000)
TARGET, TARGET_SHARE = 0.6, 0.10


class Loop(Callback):
    """Evaluates all tasks after each update, one DataLoader after the other."""

    def __init__(self, loaders: list[DataLoader[Any]]) -> None:
        self.loaders = loaders
        self.scores: list[list[float]] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.scores.append([self._accuracy(pl_module, loader) for loader in self.loaders])
        pl_module.train()

    def _accuracy(self, pl_module: LightningModule, loader: DataLoader[Any]) -> float:
        right, seen = 0, 0
        for images, labels in loader:
            right += int((pl_module(images).argmax(1) == labels).sum())
            seen += len(labels)
        return right / seen


class Clock(Callback):
    """Takes the processor time of the updates of a fit, the first ones left out; comes before other callbacks."""

    seconds = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == SKIPPED:
            self._began = time.process_time()

    @override
    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self._began


def tasks(size: int) -> list[DataLoader[Any]]:
    """Return held-out digits, two in each task, with as many samples as asked for."""
    data = DigitsDataModule(validation_share=0.3)
    data.setup()
    pairs: Any = list(data.val_dataloader().dataset)  # type: ignore[arg-type] # map-style
    images, labels = torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])
    generator = torch.Generator().manual_seed(0)
    found = []
    for task in range(5):
        mine = (labels // 2 == task).nonzero().flatten()
        chosen = mine[torch.randint(len(mine), (size,), generator=generator)]
        noise = 0.01 * torch.randn(size, *images.shape[1:], generator=generator)
        found.append(DataLoader(TensorDataset(images[chosen] + noise, labels[chosen]), batch_size=256))
    return found


def fit(batch: int, steps: int, *callbacks: Callback) -> float:
    """Train for some updates, all in one epoch; return their processor time, in seconds."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule()
    data.setup()
    digits = data.train_dataloader().dataset
    drawn = RandomSampler(digits, replacement=True, num_samples=batch * steps)  # type: ignore[arg-type] # map-style
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(Perceptron(), DataLoader(digits, batch_size=batch, sampler=drawn))
    return clock.seconds


def all_seen(loaders: list[DataLoader[Any]], every: int) -> StabilityGap:
    """Return a StabilityGap that has seen all tasks by the first steps, in which one begins after the other."""
    return StabilityGap(loaders, every_n_steps=every, picture=False, strict=True, task_steps=[1, 2, 3, 4])


def check(gap: StabilityGap, loop: Loop) -> None:
    """Compare the scores of both."""
    for entry in gap.record()["series"]["live"]:
        by_step = dict(zip(entry["steps"], entry["scores"], strict=True))
        for step, scores in enumerate(loop.scores, start=1):
            if step in by_step and abs(by_step[step] - scores[entry["task"]]) > 1e-6:
                raise AssertionError(
                    f"task {entry['task']} at step {step}: {by_step[step]} and {scores[entry['task']]}"
                )


def measure(size: int, batch: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the processor seconds of each kind of fit, round by round."""
    loaders = tasks(size)
    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "loop": [], "ours, every 10": []}
    for number in range(rounds + 1):
        gap, loop = all_seen(loaders, 1), Loop(loaders)
        kinds = {"plain": (), "ours": (gap,), "loop": (loop,), "ours, every 10": (all_seen(loaders, 10),)}
        order = list(kinds) if number % 2 else list(reversed(kinds))
        for kind in order:
            taken = fit(batch, steps, *kinds[kind])
            if number:  # the first round warms up
                seconds[kind].append(taken)
        check(gap, loop)
    return seconds


def main() -> None:
    quick = arguments(__doc__).quick
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rounds, steps, sizes, batches = (1, 15, SIZES[:1], BATCHES[:1]) if quick else (ROUNDS, STEPS, SIZES, BATCHES)
    rows, results, counted = [], {}, steps - SKIPPED
    for size, batch in itertools.product(sizes, batches):
        seconds = measure(size, batch, rounds, steps)
        plain = statistics.median(seconds["plain"])
        cost = {kind: statistics.median(seconds[kind]) - plain for kind in seconds if kind != "plain"}
        ratio = statistics.median(
            (ours - base) / (loop - base)
            for ours, loop, base in zip(seconds["ours"], seconds["loop"], seconds["plain"], strict=True)
        )
        share = cost["ours, every 10"] / plain
        rows.append(
            [
                f"5 x {size}",
                f"{batch}",
                f"{1e3 * plain / counted:.2f}",
                f"{1e3 * cost['loop'] / counted:.2f}",
                f"{1e3 * cost['ours'] / counted:.2f}",
                f"{ratio:.2f} ({verdict(ratio <= TARGET)})",
                f"{100 * share:.1f} % ({verdict(share < TARGET_SHARE)})",
            ]
        )
        results[f"5 x {size}, batches of {batch}"] = {"seconds": seconds, "ratio": ratio, "share_every_10": share}
    head = [
        "samples",
        "batch",
        "training, ms a step",
        "loop, ms",
        "StabilityGap, ms",
        "ratio",
        "every 10, on top of training",
    ]
    publish(
        "evaluation_cost",
        f"{table(head, rows)}\n\nTargets: ratio at most {TARGET}, every 10 steps below {100 * TARGET_SHARE:.0f} %.",
        {"settings": {"rounds": rounds, "steps": steps, "batches": list(batches)}, "results": results},
        quick=quick,
    )


if __name__ == "__main__":
    main()
