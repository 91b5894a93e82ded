"""What robust aggregation buys and costs: digits trained by five workers, one of them faulty, by rule and fault.

scikit-learn's digits, 8x8: 1000 test images, the same in every run, and 797 training images. A perceptron 64-64-10 is
trained by SGD with momentum 0.9 on the aggregate of five workers' gradients, each of a batch of 20 images of the
worker's own: 400 steps at a rate of 0.1, which was not chosen for any of the rules. The workers are simulated in one
process, with the functions that the strategy calls in each of its processes; that both give the same is tested. Data
of the workers is "alike", drawn by each from all training images, or "by class": each has two of the ten classes to
itself. Within a seed all variants have the same initial weights and batches.

Faults, of one worker in every step:

* "none": all workers are right. What a rule loses here it costs.
* "nan": one number of the gradient is NaN. "huge": every number is 1e30.
* "garbage": standard normal numbers, anew in each step, tens of times as long as a gradient.
* "flipped": minus ten times the gradient. "mild": minus the gradient, no longer than a right one.
* "labels": the gradient for wrong labels, the class c taken for 9 - c: bad data on one machine.

``mean`` is plain DDP's. All rules are given f = 1 and their defaults; "krum, 2" is Multi-Krum with two gradients, and
"flag, rank 1" the Flag Aggregator with the subspace of the released code. Mean of the test accuracy in percent, and its
standard deviation, over three seeds; "lost" marks runs that ended in numbers that are not finite.

Cost: the time of one aggregation of five gradients of a million numbers in one process, against their mean,
interleaved; the median of the ratios. In training each of n processes does one n-th of this, and what is exchanged is
the same for all rules.

There is no target: the numbers are for the strategy's card.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _report import arguments, publish, table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_stable.functional.robust_ddp import RobustRule, aggregate

SEEDS = (0, 1, 2)
WORKERS, FAULTY = 5, 2
STEPS = 400
BATCH_SIZE = 20
HIDDEN = 64
TEST = 1000
RATE, MOMENTUM = 0.1, 0.9
NUMBERS = 1_000_000
REPEATS = 15

Rule = Callable[[Tensor], Tensor]


def by(aggregator: str, **settings: Any) -> Rule:
    rule = RobustRule(aggregator, 1, **settings)
    return lambda gradients: aggregate(gradients, rule)


RULES: dict[str, Rule] = {
    "mean": lambda gradients: gradients.mean(0),
    "flag": by("flag"),
    "flag, rank 1": by("flag", flag_rank=1),
    "median": by("median"),
    "krum": by("krum"),
    "krum, 2": by("krum", krum_m=2),
    "nna": by("nna"),
    "trimmed_mean": by("trimmed_mean"),
    "geometric_median": by("geometric_median"),
}
FAULTS = ("none", "nan", "huge", "garbage", "flipped", "mild", "labels")
DATA = ("alike", "by class")


class Digits:
    """Images (N, 64) and labels (N,) for training and test, and what each worker draws from."""

    def __init__(self, data: str) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.data).float() / 16
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(range(len(labels)), test_size=TEST, stratify=labels, random_state=0)
        self.images, self.labels = images[train], labels[train]
        self.test_images, self.test_labels = images[test], labels[test]
        everything = torch.arange(len(train))
        own = [everything[self.labels // 2 == worker] for worker in range(WORKERS)]
        self.pools = own if data == "by class" else [everything] * WORKERS

    def batch(self, generator: torch.Generator, fault: str) -> tuple[Tensor, Tensor]:
        """Return a batch for each worker: images (workers, batch, 64), labels (workers, batch)."""
        drawn = [pool[torch.randint(len(pool), (BATCH_SIZE,), generator=generator)] for pool in self.pools]
        chosen = torch.stack(drawn)
        labels = self.labels[chosen]
        if fault == "labels":
            labels[FAULTY] = 9 - labels[FAULTY]
        return self.images[chosen], labels


def corrupt(gradients: Tensor, fault: str, generator: torch.Generator) -> None:
    """Put in the faulty worker's row what it sends instead of its gradient."""
    row = gradients[FAULTY]
    noise = torch.randn(row.shape, generator=generator)
    if fault == "nan":
        row[0] = math.nan
    elif fault == "huge":
        row.fill_(1e30)
    elif fault == "garbage":
        row.copy_(noise)
    elif fault in ("flipped", "mild"):
        row.mul_(-10 if fault == "flipped" else -1)


def initial_weights(seed: int) -> Tensor:
    """Return the weights of a 64-64-10 perceptron as one vector, drawn as torch draws them."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, HIDDEN), torch.nn.Linear(HIDDEN, 10)]
    return torch.cat([part.detach().flatten() for layer in layers for part in (layer.weight.T, layer.bias)])


def logits(weights: Tensor, images: Tensor) -> Tensor:
    """Return the outputs of several perceptrons, (n, N, 10), of weights (n, numbers), for images (n, N, 64)."""
    first, bias, second, offset = weights.split([64 * HIDDEN, HIDDEN, HIDDEN * 10, 10], dim=1)
    hidden = torch.baddbmm(bias[:, None], images, first.view(-1, 64, HIDDEN)).relu()
    return torch.baddbmm(offset[:, None], hidden, second.view(-1, HIDDEN, 10))


def train(rule: Rule, fault: str, digits: Digits, seed: int, steps: int) -> dict[str, float]:
    """Train once; return the test accuracy in percent and the training loss in nats."""
    generator = torch.Generator().manual_seed(seed)
    weights = initial_weights(seed)
    momentum = torch.zeros_like(weights)
    for _ in range(steps):
        images, labels = digits.batch(generator, fault)
        copies = weights.repeat(WORKERS, 1).requires_grad_()
        # The sum of the workers' losses: each copy gets the gradient of its own.
        loss = cross_entropy(logits(copies, images).flatten(0, 1), labels.flatten(), reduction="sum") / BATCH_SIZE
        (gradients,) = torch.autograd.grad(loss, copies)
        corrupt(gradients, fault, generator)
        momentum = MOMENTUM * momentum + rule(gradients)
        weights = weights - RATE * momentum
    outputs = logits(weights[None], digits.test_images[None])[0]
    return {
        "test_accuracy": float((outputs.argmax(1) == digits.test_labels).float().mean()) * 100,
        "training_loss": float(cross_entropy(logits(weights[None], digits.images[None])[0], digits.labels)),
        "finite": float(weights.isfinite().all()),
    }


def compare(seeds: tuple[int, ...], steps: int, kinds: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """Return a table for each kind of data, and the numbers of every run."""
    parts, results = [], {}
    for data in kinds:
        rows, digits = [], Digits(data)
        for name, rule in RULES.items():
            runs = {fault: [train(rule, fault, digits, seed, steps) for seed in seeds] for fault in FAULTS}
            results[f"{data}/{name}"] = {
                fault: {key: [run[key] for run in several] for key in several[0]} for fault, several in runs.items()
            }
            rows.append([name, *(_cell(several) for several in runs.values())])
        parts.append(f"Test accuracy, %: data of the workers {data}\n\n{table(['Rule', *FAULTS], rows)}")
    return parts, results


def _cell(runs: list[dict[str, float]]) -> str:
    if not all(run["finite"] for run in runs):
        return "lost"
    values = [run["test_accuracy"] for run in runs]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def cost(numbers: int, repeats: int) -> tuple[str, dict[str, Any]]:
    """Return the table and the numbers of what an aggregation costs."""
    gradients = torch.randn(WORKERS, numbers, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in RULES}
    for repeat in range(repeats + 1):
        for name, rule in RULES.items():
            started = time.perf_counter()
            rule(gradients)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    rows, results = [], {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["mean"], strict=True)]
        results[name] = {"milliseconds": 1e3 * statistics.median(own), "ratio_to_mean": statistics.median(ratios)}
        rows.append([name, f"{results[name]['milliseconds']:.1f}", f"{results[name]['ratio_to_mean']:.1f}"])
    title = f"One aggregation of {WORKERS} gradients of {numbers} numbers, in one process, one thread"
    return f"{title}\n\n{table(['Rule', 'ms', 'times the mean'], rows)}", results


def main() -> None:
    options = arguments(__doc__)
    torch.set_num_threads(1)
    seeds, steps, kinds = ((0,), 5, DATA[:1]) if options.quick else (SEEDS, STEPS, DATA)
    parts, accuracy = compare(seeds, steps, kinds)
    price, costs = cost(*((10_000, 2) if options.quick else (NUMBERS, REPEATS)))
    head = (
        f"Mean ± standard deviation over {len(seeds)} seeds; {WORKERS} workers of which one is faulty, {steps} steps "
        f"with {BATCH_SIZE} images a worker"
    )
    result = {
        "settings": {
            "seeds": list(seeds),
            "workers": WORKERS,
            "f": 1,
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "learning_rate": RATE,
            "momentum": MOMENTUM,
            "test_images": TEST,
            "numbers_of_a_gradient": NUMBERS,
            "repeats": REPEATS,
        },
        "accuracy": accuracy,
        "cost": costs,
    }
    publish("robustness", "\n\n".join([head, *parts, price]), result, quick=options.quick)


if __name__ == "__main__":
    main()
