"""What sharpness-aware training buys: test accuracy and two measures of sharpness, on digits, clean and mislabelled.

scikit-learn's digits, 8x8, in three parts: 1000 test images, the same in every run, that no choice was made on; 500
training images, drawn anew for each seed from the other 797; and the remaining 297, which only the choice of settings
sees. The convolutional network of the package's image classifier trains for 60 epochs of 10 batches of 50, without
augmentation. With ``20 % wrong labels``, 100 of the training images have another class as their label, drawn evenly.

The base is SGD with momentum 0.9, weight decay 0.0005 and a cosine to zero by step: what the papers compare with, and
with an optimizer that rescales each coordinate by itself, such as AdamW, sharpness in the plain metric of the weights
says less about where training is stable. Every other variant is the base with a callback. Within a seed all have the
same images, initial weights and order.

Each method runs at the callback's defaults, LookSAM with an interval of 5; and once more with one number chosen for the
labels at hand, out of four: the radius ``rho``, LookSAM's ``alpha`` (its component has the same length whatever the
radius), the weight ``lam`` of SAF and MESA. The base's learning rate was chosen first, in the same way (0.005 and 0.01,
tried with wrong labels, were no better), and is everybody's. As a control, the base's number of epochs was chosen too.
The choice is the best mean accuracy on the 297 images, whose labels are as wrong as the training's, over three seeds
that are not among the reported ones; ``--tune`` prints these. The average of MESA's default decay of 0.9995 spans 2000
steps, more than three times this run, so its other rows have 0.98, which spans 5 epochs.

Measures, on the training images and labels, of the plain cross-entropy in nats, at the weights at the end:

* Largest eigenvalue of the Hessian, by power iteration with Hessian-vector products until the value changes by less
  than 0.01 %, or 300 times.
* Worst loss within a distance of 0.5 of the weights: 60 steps of gradient ascent of length 0.125, each followed by the
  projection into the ball; the largest loss met. The same radius for all.

Both depend on the scale of the weights, which the layers before a normalisation can choose freely, so the norm of the
weights is shown too. The eigenvalue also falls as the loss does: where all is fitted, it is small for all.

There is no target: the numbers are for the methods' cards. One thread a run, runs share the cores: nothing is timed.
"""

import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from _pool import run_jobs
from _report import arguments, publish, table
from lightning.pytorch import Callback, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.saf import SAF
from lightning_stable.callbacks.sam import SAM
from lightning_stable.recipes.image_classifier import ImageClassifier

SEEDS = tuple(range(10))
TUNING_SEEDS = (100, 101, 102)
TRAINING, TEST = 500, 1000
EPOCHS = 60
BATCH_SIZE = 50
WIDTH = 16
SIZE = (EPOCHS, WIDTH)
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SETTINGS = {"clean labels": 0.0, "20 % wrong labels": 0.2}
RADIUS = 0.5
ASCENT_STEPS = 60
POWER_STEPS = 300
POWER_TOLERANCE = 1e-4

# The number of each variant that is chosen, its candidates, its default, and the choice for either setting.
KNOBS = {"SAM": "rho", "ASAM": "rho", "LookSAM": "alpha", "GSAM": "rho", "SAF": "lam", "MESA": "lam"}
KNOBS |= {"base": "learning rate", "base, shorter": "epochs", "MESA, decay 0.9995": "lam"}
GRID: dict[str, tuple[float, ...]] = {
    "base": (0.02, 0.05, 0.1, 0.2),
    "base, shorter": (8, 15, 30, 60),
    "SAM": (0.05, 0.1, 0.2, 0.4),
    "ASAM": (0.5, 1.0, 2.0, 4.0),
    "LookSAM": (0.1, 0.2, 0.4, 0.7),
    "GSAM": (0.05, 0.1, 0.2, 0.4),
    "SAF": (0.1, 0.3, 1.0, 3.0),
    "MESA": (0.3, 0.8, 2.0, 5.0),
}
DEFAULTS = {"SAM": 0.05, "ASAM": 0.5, "LookSAM": 0.7, "GSAM": 0.05, "SAF": 0.3, "MESA, decay 0.9995": 0.8}
CHOSEN: dict[str, tuple[float, ...]] = {  # in the order of GRID
    "clean labels": (0.1, 60, 0.05, 0.5, 0.2, 0.2, 0.1, 0.3),
    "20 % wrong labels": (0.02, 8, 0.4, 2.0, 0.7, 0.2, 3.0, 5.0),
}
BUILD: dict[str, Callable[[float], list[Callback]]] = {
    "base": lambda _: [],
    "base, shorter": lambda _: [],
    "SAM": lambda rho: [SAM(rho=rho)],
    "ASAM": lambda rho: [SAM(rho=rho, adaptive=True)],
    "LookSAM": lambda alpha: [SAM(variant="looksam", interval=5, alpha=alpha)],
    "GSAM": lambda rho: [SAM(rho=rho, variant="gsam")],
    "SAF": lambda lam: [SAF(lam=lam)],
    "MESA": lambda lam: [MESA(lam=lam, decay=0.98)],
    "MESA, decay 0.9995": lambda lam: [MESA(lam=lam)],
}


class Job(NamedTuple):
    """One run of training.

    Attributes:
        setting: Which labels, a key of ``SETTINGS``.
        variant: What trains, a key of ``BUILD``.
        seed: Of the training part, the wrong labels, the initial weights and the order.
        lr: Learning rate at the start.
        value: The number of the variant that is chosen.
        epochs: Length of the run.
        width: Channels of the first convolution.
    """

    setting: str
    variant: str
    seed: int
    lr: float
    value: float
    epochs: int
    width: int


class Parts(NamedTuple):
    """Images of shape (N, 1, 8, 8) and labels of shape (N,) of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Classifier(ImageClassifier):
    """The image classifier under SGD with a cosine to zero."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        steps = (self.trainer.max_epochs or 0) * (TRAINING // BATCH_SIZE)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load(seed: int, wrong: float) -> Parts:
    """Return the three parts; the test part is the same for all seeds, and its labels are right."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    pool, test = train_test_split(range(len(labels)), test_size=TEST, stratify=labels, random_state=0)
    train, validation = train_test_split(pool, train_size=TRAINING, stratify=labels[pool], random_state=seed)

    def part(indices: list[int], wrong: float) -> tuple[Tensor, Tensor]:
        return images[indices], mislabel(labels[indices], wrong, seed)

    return Parts(part(train, wrong), part(validation, wrong), part(test, 0.0))


def mislabel(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return labels of which a share has another class, drawn evenly from the nine."""
    generator = torch.Generator().manual_seed(seed)
    changed = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    wrong = labels.clone()
    wrong[changed] = (labels[changed] + torch.randint(1, 10, (len(changed),), generator=generator)) % 10
    return wrong


def train(job: Job) -> tuple[Job, dict[str, float], float]:
    """Run a job; return it with its numbers, and its seconds."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    started = time.perf_counter()
    parts = load(job.seed, SETTINGS[job.setting])
    seed_everything(job.seed, verbose=False)
    module = Classifier(width=job.width, lr=job.lr)
    generator = torch.Generator().manual_seed(job.seed)
    trainer = Trainer(
        max_epochs=job.epochs,
        callbacks=BUILD[job.variant](job.value),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, DataLoader(TensorDataset(*parts.train), batch_size=BATCH_SIZE, shuffle=True, generator=generator)
    )
    return job, evaluate(module, parts), time.perf_counter() - started


def evaluate(module: Classifier, parts: Parts) -> dict[str, float]:
    """Return accuracies in percent and the measures of sharpness."""
    images, labels = parts.train
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    size = math.sqrt(sum(float(weight.detach().square().sum()) for weight in weights))

    def loss() -> Tensor:
        return cross_entropy(module(images), labels)

    eigenvalue, steps = largest_eigenvalue(loss, weights)
    return {
        "test_accuracy": accuracy(module, *parts.test),
        "validation_accuracy": accuracy(module, *parts.validation),
        "training_accuracy": accuracy(module, *parts.train),
        "training_loss": float(loss().detach()),
        "largest_eigenvalue": eigenvalue,
        "power_steps": steps,
        "worst_loss": worst_loss(loss, weights, RADIUS, ASCENT_STEPS),
        "weight_norm": size,
    }


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right predictions, in percent."""
    return float((module(images).argmax(1) == labels).float().mean()) * 100


def largest_eigenvalue(loss: Callable[[], Tensor], weights: list[nn.Parameter]) -> tuple[float, int]:
    """Return the eigenvalue of the loss's Hessian that is largest in size, and the products it took."""
    gradients = torch.autograd.grad(loss(), weights, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(weight.shape, generator=generator) for weight in weights]
    values: list[float] = []
    while len(values) < POWER_STEPS:
        length = _norm(vector)
        unit = [part / length for part in vector]
        vector = list(torch.autograd.grad(gradients, weights, unit, retain_graph=True))
        values.append(sum(float((u * v).sum()) for u, v in zip(unit, vector, strict=True)))
        if len(values) > 1 and abs(values[-1] - values[-2]) < POWER_TOLERANCE * abs(values[-1]):
            break
    return values[-1], len(values)


def worst_loss(loss: Callable[[], Tensor], weights: list[nn.Parameter], radius: float, steps: int) -> float:
    """Return the largest loss met by projected gradient ascent in a ball around the weights, which are put back."""
    centre = [weight.detach().clone() for weight in weights]
    worst = -math.inf
    for step in range(steps + 1):
        value = loss()
        worst = max(worst, float(value.detach()))
        if step < steps:
            gradients = torch.autograd.grad(value, weights)
            with torch.no_grad():
                torch._foreach_add_(weights, gradients, alpha=radius / 4 / _norm(gradients))
                offset = torch._foreach_sub(weights, centre)
                outside = max(_norm(offset) / radius, 1.0)
                torch._foreach_copy_(weights, torch._foreach_add(centre, offset, alpha=1 / outside))
    with torch.no_grad():
        torch._foreach_copy_(weights, centre)
    return worst


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def run(jobs: Iterable[Job], processes: int) -> dict[Job, dict[str, float]]:
    """Run jobs, in this process if ``processes`` is 0; return the numbers of each."""
    return run_jobs(train, jobs, processes, _told)


def _told(job: Job, found: dict[str, float]) -> str:
    words = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    return f"{job.setting}, {job.variant} {job.value:g}, lr {job.lr:g}, seed {job.seed}: {words}"


def tune(processes: int) -> None:
    """Print the mean accuracy on the validation part of each candidate, and what is best."""
    lrs: dict[str, float] = {}
    for names in (["base"], [name for name in GRID if name != "base"]):
        jobs = {
            (setting, name, value): [make_job(setting, name, value, lrs.get(setting, value), s) for s in TUNING_SEEDS]
            for setting in SETTINGS
            for name in names
            for value in GRID[name]
        }
        numbers = run([job for several in jobs.values() for job in several], processes)
        for setting in SETTINGS:
            for name in names:
                means = {
                    value: statistics.fmean(numbers[job]["validation_accuracy"] for job in jobs[setting, name, value])
                    for value in GRID[name]
                }
                best = max(means, key=lambda value: means[value])
                lrs.setdefault(setting, best)
                words = ", ".join(f"{value:g} {mean:.2f}" for value, mean in means.items())
                print(f"{setting}, {name}: {words}; best {best:g}", flush=True)


def make_job(setting: str, name: str, value: float, lr: float, seed: int, size: tuple[int, int] = SIZE) -> Job:
    """Return a run; ``size`` is epochs and width."""
    epochs, width = size
    return Job(setting, name, seed, lr, value, int(value) if name == "base, shorter" else epochs, width)


def rows_of(setting: str, defaults: bool) -> dict[str, tuple[str, float]]:
    """Return variant and number of each row of a table; a default that was also chosen has one row."""
    chosen = dict(zip(GRID, CHOSEN[setting], strict=True))
    wanted = {("base", chosen["base"]): ["chosen"]}
    for name in ["base, shorter", "SAM", "ASAM", "LookSAM", "GSAM", "SAF", "MESA, decay 0.9995", "MESA"]:
        if defaults and name in DEFAULTS:
            wanted[name, DEFAULTS[name]] = ["default"]
        if name in chosen and (name, chosen[name]) != ("base, shorter", EPOCHS):
            wanted.setdefault((name, chosen[name]), []).append("chosen")
    return {
        f"{name}, {KNOBS[name]} {value:g} ({' and '.join(how)})": (name, value) for (name, value), how in wanted.items()
    }


def summarise(runs: list[dict[str, float]], base: list[dict[str, float]]) -> tuple[dict[str, Any], list[str]]:
    """Return the numbers of a row and its cells."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    own = [run["test_accuracy"] for run in base]
    columns["gain_in_test_accuracy"] = [a - b for a, b in zip(columns["test_accuracy"], own, strict=True)]
    digits = {"training_loss": 3, "weight_norm": 1, "largest_eigenvalue": 2, "worst_loss": 2, "test_accuracy": 1}
    digits["gain_in_test_accuracy"] = 2
    return columns, [_spread(columns[name], places) for name, places in digits.items()]


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def compare(
    settings: Sequence[str], seeds: Sequence[int], size: tuple[int, int], *, defaults: bool, processes: int
) -> tuple[str, dict[str, Any]]:
    """Return the report and the result; ``size`` is epochs and width."""
    jobs = {
        setting: {
            row: [make_job(setting, name, value, CHOSEN[setting][0], seed, size) for seed in seeds]
            for row, (name, value) in rows_of(setting, defaults).items()
        }
        for setting in settings
    }
    numbers = run([job for rows in jobs.values() for several in rows.values() for job in several], processes)
    parts, results = [], {}
    for setting, rows in jobs.items():
        base = [numbers[job] for job in next(iter(rows.values()))]
        found = {row: summarise([numbers[job] for job in several], base) for row, several in rows.items()}
        results[setting] = {row: summary for row, (summary, _) in found.items()}
        head = ["Variant", "Training loss", "Norm of weights", "Largest eigenvalue", f"Worst loss within {RADIUS}"]
        head += ["Test accuracy, %", "Minus the base's"]
        parts.append(f"{setting.capitalize()}\n\n{table(head, [[row, *c] for row, (_, c) in found.items()])}")
    title = (
        f"Mean ± standard deviation over {len(seeds)} seeds, {size[0]} epochs of {TRAINING // BATCH_SIZE} steps, "
        f"{TEST} test images; the last column is of the differences within a seed"
    )
    result = {
        "settings": {
            "seeds": list(seeds),
            "tuning_seeds": list(TUNING_SEEDS),
            "training_images": TRAINING,
            "test_images": TEST,
            "epochs": size[0],
            "batch_size": BATCH_SIZE,
            "width": size[1],
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "wrong_labels": SETTINGS,
            "knobs": KNOBS,
            "candidates": GRID,
            "defaults": DEFAULTS,
            "chosen": CHOSEN,
            "radius": RADIUS,
            "ascent_steps": ASCENT_STEPS,
            "power_steps": POWER_STEPS,
            "power_tolerance": POWER_TOLERANCE,
        },
        "results": results,
    }
    return "\n\n".join([title, *parts]), result


def main() -> None:
    options = arguments(__doc__, tune="print the accuracies of candidate settings on the tuning seeds, and stop")
    processes = os.cpu_count() or 1
    if options.tune:
        tune(processes)
        return
    if options.quick:
        outcome = compare(["20 % wrong labels"], (0,), (6, 4), defaults=False, processes=0)
    else:
        outcome = compare(list(SETTINGS), SEEDS, SIZE, defaults=True, processes=processes)
    publish("sharpness_effect", *outcome, quick=options.quick)


if __name__ == "__main__":
    main()
