"""Does the balanced coefficient help on a sequence of tasks? Live weights, two fixed decays, and both its forms.

scikit-learn's digits come as five tasks of two classes, ten epochs each, in one ``Trainer.fit`` of 350 steps.
A perceptron 64-400-400-10 learns them by SGD (momentum 0.9) with experience replay: batches of 32 new images and 32
from a class-balanced memory of 100, which is refreshed at each task's end, and the loss
``share * new + (1 - share) * replay``. Two settings are run: rate 0.01 with share 0.3, and rate 0.05 with share 0.5,
where the accuracy on old tasks drops deep after each switch (the stability gap, arXiv 2205.13452).

The 30 % of the images that are held out are evaluated after every optimizer step, by the live weights and by the
shadow of the callback under test. The callbacks do not touch training, so all of them average the same trajectory.

* Final accuracy: mean over the five tasks after the last step.
* Min-ACC: mean over the first four tasks of the lowest accuracy at any step after the task ended.
* Fallback: share of tensors and steps at which the formula gave no coefficient in (0, 1).

There is no target: the numbers are for the method's card.
"""

import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _report import arguments, publish, table
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_stable.callbacks import EMA, BalancedEMA
from lightning_stable.data.digits import DigitsDataModule

SEEDS = (0, 1, 2, 3, 4)
TASKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
EPOCHS = 10
BATCH_SIZE = 32
MEMORY = 100
SETTINGS = ((0.01, 0.3), (0.05, 0.5))

AVERAGES: dict[str, Callable[[], Callback]] = {
    "EMA 0.9": lambda: EMA(decay=0.9),
    "EMA 0.99": lambda: EMA(decay=0.99),
    "BalancedEMA derived": lambda: BalancedEMA(form="derived"),
    "BalancedEMA released": lambda: BalancedEMA(form="released"),
}


class Stream(NamedTuple):
    """Batches of the whole sequence, in order.

    Attributes:
        batches: New images and labels, replayed images and labels (none in the first task).
        ends: Number of batches up to the end of each task.
    """

    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    ends: list[int]


class Curves(NamedTuple):
    """What one fit gives.

    Attributes:
        live: Accuracy of the live weights after each step on each task, shape (steps, tasks).
        average: The same of the averaged weights.
        coefficient: Mean coefficient over steps and tensors, not-a-number for a fixed decay.
        fallback: Share of fallbacks over steps and tensors, not-a-number for a fixed decay.
    """

    live: Tensor
    average: Tensor
    coefficient: float
    fallback: float


class ReplayClassifier(LightningModule):
    """The perceptron and its loss on new and replayed images."""

    def __init__(self, lr: float, share: float) -> None:
        super().__init__()
        self.lr, self.share = lr, share
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @override
    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, old_images, old_labels = batch
        if not len(old_labels):
            return cross_entropy(self(images), labels)
        new, old = self(torch.cat([images, old_images])).split([len(labels), len(old_labels)])
        return self.share * cross_entropy(new, labels) + (1 - self.share) * cross_entropy(old, old_labels)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Evaluate(Callback):
    """Evaluates the live weights and the shadow after every optimizer step; comes after the callback it reads."""

    def __init__(self, watched: Callback, images: Tensor, labels: Tensor) -> None:
        self.watched, self.images, self.labels = watched, images, labels
        self.live: list[Tensor] = []
        self.average: list[Tensor] = []
        self.logged: list[tuple[float, float]] = []

    @override
    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        shadow = self.watched.state_dict()["shadow"]
        self.live.append(self._accuracy(pl_module(self.images)))
        self.average.append(self._accuracy(torch.func.functional_call(pl_module, shadow, (self.images,))))
        found = trainer.callback_metrics
        if "balanced_ema/coefficient" in found:
            self.logged.append((float(found["balanced_ema/coefficient"]), float(found["balanced_ema/fallback_rate"])))

    def _accuracy(self, logits: Tensor) -> Tensor:
        right = (logits.argmax(1) == self.labels).float()
        return torch.stack([right[torch.isin(self.labels, torch.tensor(task))].mean() for task in TASKS])


def make_stream(images: Tensor, labels: Tensor, seed: int, epochs: int) -> Stream:
    """Lay out all batches of the sequence; the order and the memory are functions of the seed."""
    generator = torch.Generator().manual_seed(seed)
    batches, ends, memory = [], [], torch.empty(0, dtype=torch.int64)
    for number, task in enumerate(TASKS):
        present = torch.isin(labels, torch.tensor(task)).nonzero().flatten()
        for _ in range(epochs):
            order = present[torch.randperm(len(present), generator=generator)]
            for new in order.split(BATCH_SIZE)[: len(order) // BATCH_SIZE]:
                draw = torch.randint(max(len(memory), 1), (BATCH_SIZE if len(memory) else 0,), generator=generator)
                old = memory[draw]
                batches.append((images[new], labels[new], images[old], labels[old]))
        ends.append(len(batches))
        seen = [digit for pair in TASKS[: number + 1] for digit in pair]
        pools = [(labels == digit).nonzero().flatten() for digit in seen]
        memory = torch.cat(
            [pool[torch.randperm(len(pool), generator=generator)[: MEMORY // len(seen)]] for pool in pools]
        )
    return Stream(batches, ends)


def train(lr: float, share: float, seed: int, average: Callback, epochs: int) -> tuple[Curves, Stream]:
    """Train on the whole sequence with one averaging callback."""
    datamodule = DigitsDataModule(validation_share=0.3, seed=0)
    datamodule.setup("fit")
    train_images, train_labels = datamodule.train_dataloader().dataset.tensors
    stream = make_stream(train_images, train_labels, seed, epochs)
    seed_everything(seed, verbose=False)
    module = ReplayClassifier(lr, share)
    evaluate = Evaluate(average, *datamodule.val_dataloader().dataset.tensors)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[average, evaluate],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(stream.batches, batch_size=None))
    coefficient, fallback = (
        torch.tensor(evaluate.logged).mean(0).tolist() if evaluate.logged else (torch.nan, torch.nan)
    )
    return Curves(torch.stack(evaluate.live), torch.stack(evaluate.average), coefficient, fallback), stream


def final_and_min(curve: Tensor, ends: list[int]) -> tuple[float, float]:
    """Return the final accuracy and Min-ACC of an accuracy curve of shape (steps, tasks), both in percent."""
    lowest = [curve[end:, task].min() for task, end in enumerate(ends[:-1])]
    return float(curve[-1].mean()) * 100, float(torch.stack(lowest).mean()) * 100


def compare(seeds: tuple[int, ...], epochs: int) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    parts, results = [], []
    for lr, share in SETTINGS:
        scores: dict[str, list[tuple[float, float]]] = {"live weights": []}
        extra: dict[str, list[tuple[float, float]]] = {}
        for seed in seeds:
            trajectories = []
            for name, build in AVERAGES.items():
                curves, stream = train(lr, share, seed, build(), epochs)
                trajectories.append(curves.live)
                scores.setdefault(name, []).append(final_and_min(curves.average, stream.ends))
                extra.setdefault(name, []).append((curves.coefficient, curves.fallback))
            if any(not torch.equal(trajectories[0], other) for other in trajectories):
                raise RuntimeError("An averaging callback changed the training that it averages.")
            scores["live weights"].append(final_and_min(trajectories[0], stream.ends))
            print(f"rate {lr}, seed {seed}: done", flush=True)
        rows = []
        for name, found in scores.items():
            final, lowest = (list(values) for values in zip(*found, strict=True))
            own = [statistics.fmean(values) for values in zip(*extra.get(name, [(torch.nan, torch.nan)]), strict=True)]
            balanced = name in extra and own[0] == own[0]  # not-a-number for a fixed decay
            rows.append([name, _spread(final), _spread(lowest), *(f"{value:.2f}" if balanced else "" for value in own)])
            results.append(
                {
                    "lr": lr,
                    "share_of_new": share,
                    "weights": name,
                    "final_accuracy": final,
                    "min_acc": lowest,
                    "mean_coefficient": own[0] if balanced else None,
                    "fallback_rate": own[1] if balanced else None,
                }
            )
        head = ["Weights", "Final accuracy, %", "Min-ACC, %", "Mean coefficient", "Fallback rate"]
        parts.append(f"Rate {lr}, share of the new task {share}\n\n{table(head, rows)}")
    text = f"Mean ± standard deviation over {len(seeds)} seeds, {stream.ends[-1]} steps\n\n" + "\n\n".join(parts)
    settings = {
        "seeds": list(seeds),
        "tasks": [list(task) for task in TASKS],
        "epochs": epochs,
        "batch_size": BATCH_SIZE,
        "memory": MEMORY,
        "steps": stream.ends[-1],
    }
    return text, {"settings": settings, "results": results}


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def main() -> None:
    options = arguments(__doc__)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, result = compare((0,), 1) if options.quick else compare(SEEDS, EPOCHS)
    publish("balanced_ema", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
