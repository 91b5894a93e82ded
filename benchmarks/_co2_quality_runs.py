"""What `co2_quality` and `time_to_loss` run: two tasks, and workers that are simulated one after the other."""

import functools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "BATCH",
    "DDP",
    "LOCAL_SGD",
    "MODEL",
    "RISE",
    "Job",
    "Method",
    "Rounds",
    "Task",
    "Worker",
    "fit",
    "learning_rate",
    "load",
    "samples_of",
    "train",
]

RISE = 20
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
