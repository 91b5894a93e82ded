"""What sharpness-aware training costs: samples a second with SAF, MESA, SAM and LookSAM, against plain training.

Two workloads, each a real ``Trainer.fit`` of the package's own modules with AdamW:

* ``images``: the convolutional network of 0.1 million parameters over scikit-learn's digits, enlarged to 32x32.
* ``text``: a Llama of 0.27 million parameters over windows of 128 bytes from the standard library's source text. A
  sample has 128 predictions of 256 classes, so SAF keeps the 8 largest of each (``top_k``), and in a line of its own
  all of them, which takes fifteen times the memory.

Variants: ``base`` has no callback; SAF and MESA have their term in every timed step; SAM acts on each step, LookSAM on
each fifth. ``SAM, peer`` is pytorch-optimizer's SAM in a hand-written step under manual optimisation, which its two
passes need: without accumulation and clipping, and its second pass logs too.

The fits run in one process, a thread each, and take turns: five steps (an interval of LookSAM), then the next variant's
five, in an order that is reversed from round to round. One thread runs at a time; the others wait. The first epoch
warms up and gives SAF its records. A turn lasts from one ``on_train_batch_start`` to another, loading included. The
ratio of a variant to the base is taken within each round; the table shows medians over the rounds, and quartiles. The
ratio in the thread's processor time is less disturbed by other load on the machine.

Targets, of the base's samples a second: SAF at least 0.97, MESA 0.72, SAM 0.48, LookSAM 0.80. Counting passes, with a
backward pass as costly as two forward passes, the last three would be 0.75, 0.5 and 0.83.
"""

import functools
import logging
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_optimizer
import torch
from _report import arguments, publish, table, verdict
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import interpolate
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks.mesa import MESA
from lightning_stable.callbacks.saf import SAF
from lightning_stable.callbacks.sam import SAM
from lightning_stable.data.digits import DigitsDataModule
from lightning_stable.data.text import TextDataModule
from lightning_stable.recipes.causal_lm import CausalLM
from lightning_stable.recipes.image_classifier import ImageClassifier

ROUNDS = 40
EPOCH = 20
INTERVAL = 5
TARGETS = {"SAF": 0.97, "MESA": 0.72, "SAM": 0.48, "LookSAM": 0.80}
LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        build: Makes the module, or the one that does SAM by hand.
        dataset: Training data, as many samples as an epoch takes.
        batch_size: Samples in a batch.
        saf: Arguments of SAF.
    """

    build: Callable[[bool], LightningModule]
    dataset: Dataset[Any]
    batch_size: int
    saf: dict[str, Any]


class ByHand(LightningModule):
    """Two passes and a step by pytorch-optimizer's SAM; the other base class has the loss and its optimizer."""

    @override
    def training_step(self, *args: Any) -> Tensor:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = super(ByHand, self).training_step(*args)
            self.manual_backward(loss)
            return loss

        loss = closure()
        optimizer.step(closure)
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        base: Any = super().configure_optimizers()
        groups = [{key: group[key] for key in ("params", "lr", "betas", "weight_decay")} for group in base.param_groups]
        return pytorch_optimizer.SAM(groups, AdamW, rho=0.05)


class ImageClassifierByHand(ByHand, ImageClassifier):
    """The image classifier with SAM by hand."""


class CausalLMByHand(ByHand, CausalLM):
    """The language model with SAM by hand."""


class Turns(Callback):
    """Lets a fit go on for a turn of some steps at a time, and times each turn.

    Args:
        warmup: Steps that come before the first turn, without a pause.
        steps: Steps of a turn.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.seconds: list[tuple[float, float]] = []
        self.finished = False
        self.failure: Exception | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._began = (0.0, 0.0)

    def start(self, fit: Callable[[], None]) -> None:
        """Start a fit in a thread of its own; return when its first turn can begin."""

        def run() -> None:
            torch.set_num_threads(1)
            try:
                fit()
            except Exception as error:
                self.failure = error
            self._paused.release()

        threading.Thread(target=run, daemon=True).start()
        self._wait()

    def take(self) -> None:
        """Let the fit have its turn."""
        self._go.release()
        self._wait()

    def finish(self) -> None:
        """Let the fit come to its end."""
        self.finished = True
        self.take()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        steps = trainer.fit_loop.epoch_loop.total_batch_idx - self.warmup
        if steps < 0 or steps % self.steps:
            return
        if steps:
            self.seconds.append((time.perf_counter() - self._began[0], time.thread_time() - self._began[1]))
        self._paused.release()
        self._go.acquire()
        trainer.should_stop = self.finished
        self._began = (time.perf_counter(), time.thread_time())

    def _wait(self) -> None:
        self._paused.acquire()
        if self.failure is not None:
            raise self.failure


def variants(workload: Workload) -> dict[str, Callback | None]:
    """Return a fresh callback for each variant that has one."""
    saf = {"start_epoch": 1, "lag_epochs": 1, **workload.saf}
    return {
        "base": None,
        "SAF": SAF(**saf),
        **({"SAF, all classes": SAF(**{**saf, "top_k": None})} if "top_k" in saf else {}),
        "MESA": MESA(start_epoch=1, logits=workload.saf.get("logits")),
        "SAM": SAM(),
        "LookSAM": SAM(variant="looksam", interval=INTERVAL),
        "SAM, peer": None,
    }


def images(width: int, batch_size: int, steps: int) -> Workload:
    """Return the image workload with an epoch of ``steps`` batches."""
    datamodule = DigitsDataModule()
    datamodule.setup("fit")
    pixels, labels = datamodule.train_dataloader().dataset.tensors  # type: ignore[attr-defined]
    count = steps * batch_size
    enlarged = interpolate(pixels[:count], size=(32, 32), mode="bilinear", align_corners=False)

    def build(by_hand: bool) -> LightningModule:
        return (ImageClassifierByHand if by_hand else ImageClassifier)(image_size=32, width=width)

    return Workload(build, TensorDataset(enlarged, labels[:count]), batch_size, {})


def text(layers: int, batch_size: int, steps: int) -> Workload:
    """Return the text workload with an epoch of ``steps`` batches."""
    datamodule = TextDataModule(sequence_length=128, max_bytes=200_000)
    datamodule.setup("fit")
    windows = Subset(datamodule.train_dataloader().dataset, range(steps * batch_size))

    def build(by_hand: bool) -> LightningModule:
        return (CausalLMByHand if by_hand else CausalLM)({**LANGUAGE_MODEL, "num_hidden_layers": layers})

    return Workload(build, windows, batch_size, {"logits": "model.lm_head", "top_k": 8})


def fit(workload: Workload, name: str, turns: Turns) -> None:
    """Train a variant until its turns are over."""
    seed_everything(0, verbose=False)
    module = workload.build(name == "SAM, peer")
    module.automatic_optimization = name != "SAM, peer"
    callback = variants(workload)[name]
    trainer = Trainer(
        max_epochs=-1,
        callbacks=[turns] if callback is None else [turns, callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(workload.dataset, batch_size=workload.batch_size, shuffle=True))
    if name.startswith(("SAF", "MESA")) and not trainer.callback_metrics[f"{name.partition(',')[0].lower()}_loss"] > 0:
        raise RuntimeError(f"The term of {name} was not active in the timed steps.")


def measure(workload: Workload, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the numbers of each variant."""
    warmup = len(workload.dataset) // workload.batch_size  # type: ignore[arg-type] # sized
    found = {name: Turns(warmup, INTERVAL) for name in variants(workload)}
    for name, turns in found.items():
        turns.start(functools.partial(fit, workload, name, turns))
    for index in range(rounds):
        for name in list(found)[:: 1 if index % 2 else -1]:
            found[name].take()
    for turns in found.values():
        turns.finish()
    base = found["base"].seconds
    return {name: _summary(turns.seconds, base, workload.batch_size) for name, turns in found.items()}


def _summary(turns: list[tuple[float, float]], base: list[tuple[float, float]], batch_size: int) -> dict[str, Any]:
    """Return the numbers of a variant from wall and processor seconds of its turns, and of the base's."""
    wall, processor = (
        [theirs[clock] / own[clock] for own, theirs in zip(turns, base, strict=True)] for clock in range(2)
    )
    rates = [INTERVAL * batch_size / own[0] for own in turns]
    return {
        "step_ms": statistics.median(own[0] for own in turns) / INTERVAL * 1e3,
        "samples_per_second": statistics.median(rates),
        "samples_per_second_quartiles": _quartiles(rates),
        "ratio": statistics.median(wall),
        "ratio_quartiles": _quartiles(wall),
        "processor_ratio": statistics.median(processor),
        "processor_ratio_quartiles": _quartiles(processor),
        "raw_wall_and_processor_seconds_of_turns": turns,
    }


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4)
    return [low, high]


def report(name: str, workload: Workload, results: dict[str, dict[str, Any]]) -> str:
    """Return the table of a workload."""
    parameters = sum(parameter.numel() for parameter in workload.build(False).parameters())
    rows = [
        [
            variant,
            f"{r['step_ms']:.1f}",
            f"{r['samples_per_second']:.0f} ({_range(r['samples_per_second_quartiles'], 0)})",
            f"{r['processor_ratio']:.3f} ({_range(r['processor_ratio_quartiles'], 3)})",
            f"{TARGETS[variant]:.2f}" if variant in TARGETS else "",
            f"{r['ratio']:.3f} ({_range(r['ratio_quartiles'], 3)})",
        ]
        for variant, r in results.items()
    ]
    head = ["Variant", "Step, ms", "Samples/s", "Ratio in processor time", "Target", "Ratio to base"]
    return f"{name}: {parameters / 1e6:.2f} million parameters, batches of {workload.batch_size}\n\n{table(head, rows)}"


def _range(quartiles: list[float], digits: int) -> str:
    return " to ".join(f"{value:.{digits}f}" for value in quartiles)


def compare(workloads: dict[str, Workload], rounds: int) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    load = os.getloadavg()[0]
    results = {name: measure(workload, rounds) for name, workload in workloads.items()}
    met = {
        f"{name}: {variant} at least {target}": found[variant]["ratio"] >= target
        for name, found in results.items()
        for variant, target in TARGETS.items()
    }
    title = (
        f"{torch.get_num_threads()} thread, float32, {rounds} rounds of {INTERVAL} steps; medians and quartiles; "
        f"load of the machine before: {load:.1f}"
    )
    tables = [report(name, workload, results[name]) for name, workload in workloads.items()]
    words = "; ".join(f"{target}: {verdict(kept)}" for target, kept in met.items())
    settings = {
        "language_model": LANGUAGE_MODEL,
        "batch_size": {name: workload.batch_size for name, workload in workloads.items()},
        "saf": {name: workload.saf for name, workload in workloads.items()},
        "looksam_interval": INTERVAL,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "steps_of_a_turn": INTERVAL,
        "load_before": load,
    }
    text = "\n\n".join([title, *tables, f"Targets: {words}."])
    return text, {"settings": settings, "workloads": results, "targets": met}


def main() -> None:
    options = arguments(__doc__)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.quick:
        outcome = compare({"images": images(4, 8, INTERVAL), "text": text(1, 2, INTERVAL)}, 2)
    else:
        outcome = compare({"images": images(32, 64, EPOCH), "text": text(2, 16, EPOCH)}, ROUNDS)
    publish("sharpness_cost", *outcome, quick=options.quick)


if __name__ == "__main__":
    main()
