"""What StabilityReport costs a training step, beside what a Trainer can log without it, and what its page costs.

A small network, 206 thousand parameters in 16 tensors, trains by AdamW on 64 samples a step on the CPU: steps of a few
milliseconds, of which a callback takes a larger share than of those of a real model. Every variant is a real
``Trainer.fit`` with a CSVLogger; the fits take turns in one process, in an order that is reversed from round to round.

* ``no callback``: the training alone.
* ``StabilityReport``: the callback, without its page, which is timed apart.
* ``monitors of the host``: Lightning's LearningRateMonitor and a callback that logs the norm over all gradients by
  ``torch.nn.utils.get_total_norm`` through ``self.log``: rate and norm at each step, no times, spikes or page.

Times are processor time of the one thread, which other load on the machine disturbs less than the clock on the wall. A
step is the time of a whole fit but its first steps, over its steps: what is read or written only now and then counts,
too. The overhead of a variant is, in each round, its step minus that of the training alone, as a share of the latter;
the table shows the median over the rounds and its quartiles.

The page is that of a run of 10 000 steps with a record and a log: the median time of reading the folder and writing it.

Target: StabilityReport costs no more than the monitors of the host.
"""

import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _report import arguments, publish, table, verdict
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable._report.page import write_page
from lightning_stable._report.read import read_run
from lightning_stable._report.write import as_json
from lightning_stable.callbacks import StabilityReport

ROUNDS = 7
STEPS = 800
SKIPPED = 20
LAYERS, WIDTH, BATCH = 8, 160, 64
PAGE_STEPS, PAGES = 10_000, 3


class GradientNorm(Callback):
    """Logs the norm over all gradients at each step, as a user of the host would."""

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.log("gradient_norm", nn.utils.get_total_norm(gradients))


class Clock(Callback):
    """Notes the time when the steps that count begin and when they have ended."""

    begun = ended = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIPPED:
            self.begun = time.process_time()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = time.process_time()


class Network(LightningModule):
    """A stack of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self.layers(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=1e-4)


VARIANTS: dict[str, Callable[[], list[Callback]]] = {
    "no callback": list,
    "StabilityReport": lambda: [StabilityReport(html=False)],
    "monitors of the host": lambda: [LearningRateMonitor("step"), GradientNorm()],
}


def fit(callbacks: Sequence[Callback], steps: int, folder: str) -> float:
    """Train some steps, and return the processor time of one."""
    torch.manual_seed(0)
    clock = Clock()
    data = TensorDataset(*(torch.randn(BATCH * (steps + SKIPPED), WIDTH) for _ in range(2)))
    trainer = Trainer(
        max_steps=steps + SKIPPED,
        callbacks=[*callbacks, clock],
        logger=CSVLogger(folder),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Network(), DataLoader(data, batch_size=BATCH))
    return (clock.ended - clock.begun) / steps


def time_page(steps: int, repeats: int) -> list[float]:
    """Write the page of a run of so many steps, and return how long it took each time."""
    losses = [1 + 2 * math.exp(-step / 900) + 0.1 * math.sin(12.9 * step * step) for step in range(steps)]
    record = {
        "format": 1,
        "steps": steps,
        "series": {
            "step": list(range(1, steps + 1)),
            "optimizer": [0] * steps,
            "loss": losses,
            "gradient_norm": [1 + 0.3 * math.cos(3.7 * step * step) for step in range(steps)],
            "seconds": [0.01 * step for step in range(steps)],
            "lr": [[0.1]] * steps,
        },
        "metrics": {},
    }
    taken = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stability_report.json").write_text(as_json(record))
        rows = [f"{step},{loss},{loss + 0.1 if step % 100 == 99 else ''}" for step, loss in enumerate(losses)]
        (folder / "metrics.csv").write_text("\n".join(["step,train_loss,val_loss", *rows]))
        for _ in range(repeats + 1):
            began = time.process_time()
            write_page([read_run(folder)], folder / "report.html")
            taken.append(time.process_time() - began)
    return taken[1:]  # the first one imports what draws


def compare(rounds: int, steps: int, page_steps: int, pages: int) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for index in range(rounds):
        for name in list(VARIANTS)[:: 1 if index % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(fit(VARIANTS[name](), steps, folder))
        print(f"round {index + 1} of {rounds}: done", flush=True)
    base, rows, results = found["no callback"], [], {}
    for name, taken in found.items():
        shares = [own / plain - 1 for own, plain in zip(taken, base, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        step = statistics.median(taken)
        results[name] = {"step_ms": 1e3 * step, "overhead": middle, "quartiles": [low, high], "raw_seconds": taken}
        share = f"{middle:.1%} ({low:.1%} to {high:.1%})" if name != "no callback" else ""
        rows.append([name, f"{1e3 * step:.3f}", share])
    ours, peer = (found[name] for name in ("StabilityReport", "monitors of the host"))
    ratio = statistics.median(own / other for own, other in zip(ours, peer, strict=True))
    seconds = statistics.median(page_times := time_page(page_steps, pages))
    text = "\n".join(
        [
            f"{LAYERS} layers of width {WIDTH}, {BATCH} samples a step, {torch.get_num_threads()} thread, {rounds} "
            f"rounds of {steps} steps\n",
            table(["Variant", "Step, ms", "Overhead / step"], rows),
            "",
            f"Page of {page_steps} steps: {seconds:.2f} s.",
            f"Step with StabilityReport / with the monitors of the host: {ratio:.3f} (target: at most 1: "
            f"{verdict(ratio <= 1)}).",
        ]
    )
    result = {
        "settings": {"layers": LAYERS, "width": WIDTH, "batch": BATCH, "rounds": rounds, "steps": steps},
        "variants": results,
        "page": {"steps": page_steps, "seconds": seconds, "raw_seconds": page_times},
        "ratio": ratio,
        "targets": {"no_more_than_the_monitors_of_the_host": ratio <= 1},
    }
    return text, result


def main() -> None:
    options = arguments(__doc__)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, result = compare(2, 40, 500, 1) if options.quick else compare(ROUNDS, STEPS, PAGE_STEPS, PAGES)
    publish("stability_report", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
