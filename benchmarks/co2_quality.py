"""What local steps cost in quality: final loss of DDP, local SGD, SlowMo, DiLoCo and CO2 after the same samples.

Two tasks. *Text*: a Llama of 0.08 million parameters (the package's causal language model) on the standard library's
source text, each step 16 windows of 128 bytes. *Digits*: a perceptron 64-128-128-10 (the package's image classifier) on
1347 of scikit-learn's digits, each step 64 images. Both train for 384 steps by AdamW, the rate rises to 0.003 over 20
steps and falls by a cosine to zero, gradients are clipped to a norm of 1. Every method sees the same samples in the
same steps: a step's batch is cut into equal parts, one a worker, and for DDP it is one batch. So DDP takes as many
optimizer steps as each worker does.

The workers of the other methods are simulated one after the other in one process, with the package's functions for the
outer step and with the rounds of its strategies, which is exact: a test holds the simulation to the strategies in two
processes. Blocking are local SGD, SlowMo and DiLoCo, where not called otherwise. CO2 takes its outer step with the mean
of the round before; in its variant *paper* a worker starts the next round from the anchor, in *corrected* from the
anchor and its own last round. At the end the exchange under way and the last, unfinished round are taken in. The
warm-up is a quarter of the steps by DDP first. A method is followed by its outer rate/momentum, *gap* stands for the
staleness penalty "gap", *clip* for the bound of the outer momentum.

``--screen`` prints the losses of many settings on seed 100, which is not among the reported ones, with 4 workers and 24
local steps: the settings compared here, and the defaults of the package's strategies, were chosen from them. It prints
those of three learning rates too. On the text 0.003 is the best of them for DDP and for the others; on the digits a
higher rate is better for all, so a loss below DDP's there says little.

There is no target: the numbers are for the methods' cards and for their defaults. Each run has one thread, and runs
share the cores: only losses are compared, not times.
"""

import functools
import itertools
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from _report import arguments, publish, table

SEEDS, SCREENING_SEED = (0, 1, 2), 100
STEPS, RISE = 384, 20
TASKS = ("text", "digits")
LR = {"text": 3e-3, "digits": 3e-3}
BATCH = {"text": 16, "digits": 64}
LENGTH, VALIDATION_WINDOWS = 128, 384
MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}


class Method(NamedTuple):
    """One way to train.

    Attributes:
        name: ``"DDP"``, ``"LocalSGD"``, ``"SlowMo"``, ``"DiLoCo"`` or ``"CO2"``.
        variant: ``"blocking"``, or of a delayed exchange ``"paper"`` or ``"corrected"``.
        outer_lr: Of the outer step.
        outer_momentum: Of the outer step.
        penalty: CO2's ``staleness_penalty``.
        clip: CO2's ``momentum_clip``.
    """

    name: str
    variant: str = "blocking"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    penalty: Any = 1.0
    clip: float | None = None

    def __str__(self) -> str:
        if self.name in ("DDP", "LocalSGD"):
            return self.name + (f" {self.variant}" if self.variant != "blocking" else "")
        parts = [self.name, *([self.variant] if self.variant != "blocking" else [])]
        parts.append(f"{self.outer_lr:g}/{self.outer_momentum:g}")
        parts += ["gap"] if self.penalty == "gap" else []
        parts += [f"clip {self.clip:g}"] if self.clip is not None else []
        return " ".join(parts)


class Job(NamedTuple):
    """One run of training.

    Attributes:
        task: One of ``TASKS``.
        method: How.
        local_steps: Of a round.
        workers: How many.
        warmup: Steps by DDP first.
        seed: Of the initial weights and the order of the samples.
        steps: Optimizer steps in all.
        lr: Peak of the learning rate.
    """

    task: str
    method: Method
    local_steps: int
    workers: int
    warmup: int
    seed: int
    steps: int
    lr: float


DDP, LOCAL_SGD = Method("DDP"), Method("LocalSGD")
VARIANTS = ("paper", "corrected")
RATES, MOMENTA = (1.0, 0.7, 0.5), (0.0, 0.2, 0.5)
# The package's defaults, chosen by --screen; beside them CO2 with momentum, clip and penalty, the settings of DiLoCo's
# paper, the best of the paper's CO2, and the defaults of CO2's public code.
CHOSEN = Method("CO2", "corrected")
PAPER = Method("CO2", "paper", outer_lr=0.7)
DILOCO = Method("DiLoCo", outer_momentum=0.3)
METHODS = (
    LOCAL_SGD,
    Method("SlowMo", outer_momentum=0.2),
    DILOCO,
    Method("DiLoCo", outer_lr=0.7, outer_momentum=0.9),
    CHOSEN,
    Method("CO2", "corrected", outer_momentum=0.2),
    Method("CO2", "corrected", outer_momentum=0.5, clip=0.03),
    Method("CO2", "corrected", penalty="gap"),
    PAPER,
    Method("CO2", "paper", outer_momentum=0.5),
)
# On the text, which takes most of the time, the others are run at 24 local steps after a warm-up by 4 workers only.
EVERYWHERE = (DDP, LOCAL_SGD, DILOCO, CHOSEN, PAPER)
SHORT_ROUNDS = (DDP, LOCAL_SGD, CHOSEN)


# ----------------------------------------------------------------------------- the tasks


class Task(NamedTuple):
    """What is trained on what.

    Attributes:
        build: Returns a new module.
        loss: The mean loss of a module on the training samples of these indices.
        samples: Number of training samples.
        evaluate: The validation loss of a module.
    """

    build: Callable[[], Any]
    loss: Callable[[Any, Any], Any]
    samples: int
    evaluate: Callable[[Any], float]


@functools.cache
def load(task: str) -> Task:
    """Return a task, with its data in memory."""
    return _text() if task == "text" else _digits()


def _text() -> Task:
    import torch

    from lightning_stable.data.text import TextDataModule
    from lightning_stable.recipes.causal_lm import CausalLM

    datamodule = TextDataModule(sequence_length=LENGTH, batch_size=1, seed=0, max_bytes=2_000_000)
    datamodule.setup("fit")
    parts = []
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        windows = loader.dataset
        parts.append(torch.stack([windows[index]["input_ids"] for index in range(len(windows))]))
    train, held = parts[0], parts[1][:: max(1, len(parts[1]) // VALIDATION_WINDOWS)][:VALIDATION_WINDOWS]

    def loss(module: Any, indices: Any) -> Any:
        return module(input_ids=train[indices], labels=train[indices]).loss

    def evaluate(module: Any) -> float:
        chunks = held.split(64)
        return sum(float(module(input_ids=c, labels=c).loss) * len(c) for c in chunks) / len(held)

    return Task(lambda: CausalLM(MODEL), loss, len(train), evaluate)


def _digits() -> Task:
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch.nn.functional import cross_entropy

    from lightning_stable.recipes.image_classifier import ImageClassifier

    pixels, classes = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16.0, classes, test_size=450, stratify=classes, random_state=0)
    images, held = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    labels, held_labels = (torch.tensor(part) for part in parts[2:])

    def loss(module: Any, indices: Any) -> Any:
        return cross_entropy(module(images[indices]), labels[indices])

    def evaluate(module: Any) -> float:
        return float(cross_entropy(module(held), held_labels))

    return Task(lambda: ImageClassifier(width=128, architecture="mlp"), loss, len(images), evaluate)


# ----------------------------------------------------------------------------- the simulation


class Worker:
    """A module whose weights are one flat tensor, and its optimizer."""

    def __init__(self, module: Any, clip: float | None) -> None:
        import torch

        self.module, self.clip = module, clip
        parameters = list(module.parameters())
        self.weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameter, part in zip(parameters, self.weights.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view_as(parameter)
        self.optimizer = module.configure_optimizers()
        for group in self.optimizer.param_groups:
            group["fused"] = True  # the same update, in a fraction of the time

    def step(self, loss: Callable[[Any], Any], lr: float) -> None:
        """Take one optimizer step."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss(self.module).backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Return copies of the weights and the optimizer's state."""
        import copy

        return {"weights": self.weights.clone(), "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.weights.copy_(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


class Rounds:
    """The rounds of a local-update method over workers that all start from the same weights."""

    def __init__(self, method: Method, workers: list[Worker]) -> None:
        self.method, self.workers = method, workers
        self.anchor = [workers[0].weights.clone()]
        self.starts = [self.anchor[0].clone() for _ in workers]
        self.pending: Any = None
        self.outer = _outer_step(method, self.anchor)

    def end(self, lr: float) -> None:
        """End a round whose last local step had the learning rate ``lr``."""
        moved = self._movements()
        arrived = self.pending
        self.pending = (_mean(moved), lr)
        if self.method.variant == "blocking":
            arrived, self.pending = self.pending, None
        self._take(arrived)
        corrected = self.method.variant == "corrected"
        self._start([self.anchor[0] - own if corrected else self.anchor[0] for own in moved])

    def consolidate(self) -> None:
        """Take in the exchange under way and the unfinished round; all workers are equal after it."""
        moved = self._movements()
        self._take(self.pending)
        self.pending = None
        self.anchor[0].sub_(_mean(moved))
        self._start([self.anchor[0] for _ in moved])

    def _take(self, arrived: Any) -> None:
        """Take the outer step with a mean movement and the learning rate of its round, if one has arrived."""
        if arrived is not None:
            self.outer([arrived[0]], arrived[1])

    def _movements(self) -> list[Any]:
        return [start - worker.weights for start, worker in zip(self.starts, self.workers, strict=True)]

    def _start(self, weights: list[Any]) -> None:
        for start, worker, new in zip(self.starts, self.workers, weights, strict=True):
            start.copy_(new)
            worker.weights.copy_(new)


def _mean(tensors: list[Any]) -> Any:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)


def _outer_step(method: Method, anchor: list[Any]) -> Callable[[list[Any], float], None]:
    """Return a function of a mean movement and a learning rate that steps the anchor."""
    from lightning_stable.functional.co2 import init_co2, update_co2
    from lightning_stable.functional.diloco import init_diloco, update_diloco
    from lightning_stable.functional.local_sgd import update_local_sgd
    from lightning_stable.functional.slowmo import init_slowmo, update_slowmo

    outer = {"outer_lr": method.outer_lr, "outer_momentum": method.outer_momentum}
    state: Any = {
        "CO2": lambda: init_co2(anchor, outer_momentum=method.outer_momentum),
        "SlowMo": lambda: init_slowmo(anchor),
        "DiLoCo": lambda: init_diloco(anchor),
    }.get(method.name, lambda: None)()

    def step(delta: list[Any], lr: float) -> None:
        nonlocal state
        if method.name == "CO2":
            extra = {"momentum_clip": method.clip, "staleness_penalty": method.penalty}
            state = update_co2(state, anchor, delta, **outer, **extra)
        elif method.name == "SlowMo":
            state = update_slowmo(state, anchor, delta, learning_rate=lr, **outer)
        elif method.name == "DiLoCo":
            state = update_diloco(state, anchor, delta, **outer)
        else:
            update_local_sgd(anchor, delta)

    return step


def learning_rate(job: Job, step: int) -> float:
    """Return the rate of a step."""
    return job.lr * min(1.0, (step + 1) / RISE) * 0.5 * (1.0 + math.cos(math.pi * step / job.steps))


def train(job: Job, snapshots: Path) -> tuple[Job, float, float]:
    """Run a job; return it with its final validation loss, and its seconds."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    module = fit(job, snapshots).module.eval()
    with torch.no_grad():
        return job, load(job.task).evaluate(module), time.perf_counter() - started


def fit(job: Job, snapshots: Path) -> Worker:
    """Train, and return one of the workers, all of which are equal at the end.

    DDP leaves its state after a quarter of the steps in ``snapshots``, from where other methods take their warm-up.
    """
    import torch

    task = load(job.task)
    batches = samples_of(job).view(job.steps, -1)
    torch.manual_seed(job.seed)
    first = Worker(task.build(), clip=1.0)
    snapshot = snapshots / f"{job.task}-{job.seed}-{job.steps}-{job.lr:g}.pt"
    if job.method != DDP:
        if job.warmup:
            first.load(torch.load(snapshot))
        _simulate(job, task, batches, first)
        return first
    for step in range(job.steps):
        if step == job.steps // 4:
            torch.save(first.state(), snapshot)
        first.step(functools.partial(task.loss, indices=batches[step]), learning_rate(job, step))
    return first


def _simulate(job: Job, task: Task, batches: Any, first: Worker) -> None:
    """Train in rounds after the warm-up, with ``first`` as one of the workers."""
    workers = [first]
    for _ in range(job.workers - 1):
        workers.append(Worker(task.build(), clip=1.0))
        workers[-1].load(first.state())
    rounds = Rounds(job.method, workers)
    for step in range(job.warmup, job.steps):
        lr = learning_rate(job, step)
        for worker, part in zip(workers, batches[step].chunk(job.workers), strict=True):
            worker.step(functools.partial(task.loss, indices=part), lr)
        if (step + 1 - job.warmup) % job.local_steps == 0:
            rounds.end(lr)
    rounds.consolidate()


def samples_of(job: Job) -> Any:
    """Return the indices of the training samples in the order in which a job takes them."""
    import torch

    wanted, samples = BATCH[job.task] * job.steps, load(job.task).samples
    generator = torch.Generator().manual_seed(job.seed)
    epochs = [torch.randperm(samples, generator=generator) for _ in range(-(-wanted // samples))]
    return torch.cat(epochs)[:wanted]


# ----------------------------------------------------------------------------- the plans


def run(jobs: Iterable[Job], processes: int) -> dict[Job, float]:
    """Run the jobs, those of DDP first, as the others' warm-up is theirs; return the losses."""
    jobs = list(dict.fromkeys(jobs))
    losses: dict[Job, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        for stage in (True, False):
            chosen = [job for job in jobs if (job.method == DDP) == stage]
            for job, loss, seconds in pool.map(functools.partial(train, snapshots=Path(folder)), chosen):
                losses[job] = loss
                print(
                    f"{job.task}, {job.method}, {job.local_steps} local steps, {job.workers} workers, warm-up "
                    f"{job.warmup}, seed {job.seed}, rate {job.lr:g}: {loss:.4f} ({seconds:.0f} s)",
                    flush=True,
                )
    return losses


def _job(task: str, method: Method, *, steps: int = STEPS, **changes: Any) -> Job:
    usual = {"local_steps": 24, "workers": 4, "warmup": steps // 4, "seed": SCREENING_SEED, "lr": LR[task]}
    if method == DDP:
        changes = {**changes, "local_steps": 1, "workers": 1, "warmup": 0}
    return Job(task, method, steps=steps, **{**usual, **changes})


def screening(task: str, warmup: bool) -> list[Method]:
    """Return the settings of the screening: all on the digits, those nearer to the question on the dearer text."""
    every = [DDP, LOCAL_SGD]
    every += [Method("SlowMo", "blocking", *outer) for outer in ((1.0, 0.2), (1.0, 0.5), (0.7, 0.2), (0.7, 0.5))]
    every += [Method("DiLoCo", "blocking", lr, beta) for lr in (1.0, 0.7, 0.5) for beta in (0.3, 0.5, 0.9)]
    every += [Method("SlowMo", "corrected", 1.0, 0.5), Method("DiLoCo", "corrected", 1.0, 0.3)]
    every += [Method("CO2", "corrected", 1.0, 0.7)]
    grid = itertools.product(VARIANTS, (1.0, "gap"), RATES, MOMENTA)
    every += [Method("CO2", variant, lr, beta, penalty) for variant, penalty, lr, beta in grid]
    clips = itertools.product(VARIANTS, (0.0, 0.5), (0.01, 0.03))
    every += [Method("CO2", variant, 1.0, beta, 1.0, clip) for variant, beta, clip in clips]
    if task == "digits":
        return every
    return [method for method in every if _worth_it(method, warmup)]


def _worth_it(method: Method, warmup: bool) -> bool:
    """Return whether a setting is screened on the text too."""
    outer = (method.outer_lr, method.outer_momentum)
    if not warmup:
        return method in (DDP, LOCAL_SGD, Method("SlowMo", outer_momentum=0.5))
    if method.name == "SlowMo":
        return outer in ((1.0, 0.2), (1.0, 0.5))
    if method.name == "DiLoCo":
        return outer in ((0.7, 0.9), (0.7, 0.5), (0.7, 0.3), (1.0, 0.3))
    if method.clip is not None:
        return method[1:4] == ("paper", 1.0, 0.5)
    return method.penalty == 1.0 or outer in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0))


def screen() -> tuple[str, dict[str, Any]]:
    """Run the screening; return the report and the result."""
    tuned = (DDP, LOCAL_SGD, Method("CO2", "corrected", outer_momentum=0.2))
    quarters = (STEPS // 4, 0)
    jobs = [_job(task, m, warmup=w) for task in TASKS for w in quarters for m in screening(task, w > 0)]
    jobs += [_job(task, method, lr=lr) for task in TASKS for method in tuned for lr in (1e-3, 1e-2)]
    losses = run(jobs, os.cpu_count() or 1)

    def shown(task: str, method: Method, **changes: Any) -> str:
        loss = losses.get(_job(task, method, **changes))
        return "" if loss is None else f"{loss:.4f}"

    rows = [
        [str(m), *(shown(task, m, warmup=w) for task in TASKS for w in quarters)] for m in screening("digits", True)
    ]
    rates = (1e-3, 3e-3, 1e-2)
    tuning = [[str(m), *(shown(task, m, lr=lr) for task in TASKS for lr in rates)] for m in tuned]
    text = "\n\n".join(
        [
            f"Validation loss, 4 workers, 24 local steps, seed {SCREENING_SEED}; outer rate/momentum",
            table(["Method", *(f"{task}, {kind}" for task in TASKS for kind in ("warm-up", "none"))], rows),
            "The same with warm-up at three learning rates",
            table(["Method", *(f"{task}, {lr:g}" for task in TASKS for lr in rates)], tuning),
        ]
    )
    return text, _result(losses, (SCREENING_SEED,), STEPS)


def compare(seeds: tuple[int, ...], steps: int, tasks: tuple[str, ...], processes: int) -> tuple[str, dict[str, Any]]:
    """Run the chosen settings; return the report and the result."""
    quarter = steps // 4
    usual = (24, 4, quarter)
    conditions = [usual, (24, 4, 0), (48, 4, quarter), (24, 2, quarter), (6, 4, quarter)]

    def job(task: str, method: Method, condition: tuple[int, int, int], seed: int) -> Job:
        names = ("local_steps", "workers", "warmup")
        return _job(task, method, steps=steps, seed=seed, **dict(zip(names, condition, strict=True)))

    def runs(task: str, method: Method, condition: tuple[int, int, int]) -> bool:
        if task == "digits" or condition == usual:
            return True
        return method in (SHORT_ROUNDS if condition[0] == 6 else EVERYWHERE)

    every = [
        job(task, method, condition, seed)
        for task, condition, seed, method in itertools.product(tasks, conditions, seeds, (DDP, *METHODS))
        if runs(task, method, condition)
    ]
    losses = run(every, processes)
    texts = []
    for task in tasks:
        rows = []
        for method in (DDP, *METHODS):
            groups = [
                [losses[job(task, method, condition, seed)] for seed in seeds] if runs(task, method, condition) else []
                for condition in conditions
            ]
            rows.append([str(method), *(_spread(group) if group else "" for group in groups)])
        head = ["τ 24", "τ 24, no warm-up", "τ 48", "τ 24, 2 workers", "τ 6"]
        title = (
            f"{task.capitalize()}: validation loss after {steps} steps, {len(seeds)} seeds, mean ± standard deviation"
        )
        texts += [
            f"{title}; 4 workers and a warm-up of {quarter} steps where not said",
            table(["Method", *head], rows),
        ]
    return "\n\n".join(texts), _result(losses, seeds, steps)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def _result(losses: dict[Job, float], seeds: tuple[int, ...], steps: int) -> dict[str, Any]:
    runs = [
        {**{name: value for name, value in job._asdict().items() if name != "method"}, "method": job.method._asdict()}
        | {"validation_loss": loss}
        for job, loss in losses.items()
    ]
    settings = {"seeds": list(seeds), "steps": steps, "model": MODEL, "lr": LR, "batch": BATCH, "rise": RISE}
    return {"settings": settings, "runs": runs}


def main() -> None:
    options = arguments(__doc__, screen="print the losses of many settings on one other seed, and stop")
    if options.screen:
        publish("co2_quality_screening", *screen(), quick=options.quick)
        return
    # One process more to start costs more than the smoke test.
    plan = ((0,), 8, TASKS[1:], 1) if options.quick else (SEEDS, STEPS, TASKS, os.cpu_count() or 1)
    text, result = compare(*plan)
    publish("co2_quality", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
