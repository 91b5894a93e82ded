"""What a weight average costs a training step, in time and memory: ours, Lightning's, and timm's formula.

A residual network of 25 million parameters in 384 tensors trains on batches of 4, so that reading the weights is a
large part of a step, as it is when a real model's average is costly. Every variant is a real ``Trainer.fit`` of a few
steps; the fits take turns in one process, in an order that is reversed from round to round. The input is random: only
times are measured.

* ``none``: no average.
* ``ours``: :class:`lightning_stable.callbacks.EMA`.
* ``lightning``: ``EMAWeightAveraging`` as shipped, which averages with ``get_ema_avg_fn``.
* ``lightning, multi``: Lightning's ``WeightAveraging`` with torch's ``get_ema_multi_avg_fn``, which its EMA refuses.
* ``timm formula``: torch's ``AveragedModel`` with the update of timm's ModelEmaV3 (a fused lerp, decay warmed up by
  ``1 - (1 + t) ** (-2 / 3)``), called by a callback of five lines; ours runs once more with the same warmup.

A step is the time from one ``on_train_batch_start`` to the next, the first two of a fit left out. The overhead of a
variant is, in each round, the median step with it minus the median step without; the table shows the median over the
rounds and its quartiles. ``In the hook`` is the time spent within the callback's ``on_train_batch_end`` alone, which
other load on the machine disturbs less. Memory counts the tensors that the callback holds and the module does not.

Target: ours at most half of Lightning's overhead, with one extra copy of the weights.
"""

import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _report import arguments, publish, table, verdict
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks import EMA

ROUNDS = 15
STEPS = 10
SKIPPED = 2
BLOCKS = 96
WIDTH = 512
BATCH_SIZE = 4
DECAY = 0.999
TARGET = 0.5


class Block(nn.Module):
    """A residual block of four tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.relu(self.linear(self.norm(x)))


class Network(LightningModule):
    """Many small tensors, little arithmetic."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.blocks(batch[0]).square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class TimmFormula(Callback):
    """The plain use of torch's AveragedModel, with timm's formula."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.average = AveragedModel(pl_module, multi_avg_fn=timm_update)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.average.update_parameters(pl_module)


@torch.no_grad()
def timm_update(average: list[Tensor], live: list[Tensor], taken: Tensor) -> None:
    """The update of timm's ModelEmaV3 with warmup, gamma 1 and power 2/3."""
    decay = min(DECAY, 1 - (1 + int(taken)) ** (-2 / 3))
    torch._foreach_lerp_(average, live, 1 - decay)


class Clock(Callback):
    """Notes when each step begins, and how long another callback's update takes."""

    def __init__(self, watched: Callback | None) -> None:
        self.begins: list[float] = []
        self.hooks: list[float] = []
        if watched is not None:
            update = watched.on_train_batch_end

            @functools.wraps(update)
            def timed(*args: Any, **kwargs: Any) -> None:
                began = time.perf_counter()
                update(*args, **kwargs)
                self.hooks.append(time.perf_counter() - began)

            watched.on_train_batch_end = timed  # type: ignore[method-assign]

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.begins.append(time.perf_counter())


VARIANTS: dict[str, Callable[[], Callback | None]] = {
    "none": lambda: None,
    "ours": lambda: EMA(decay=DECAY),
    "ours, warmup": lambda: EMA(decay=DECAY, warmup="power"),
    "lightning": lambda: EMAWeightAveraging(decay=DECAY),
    "lightning, multi": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "timm formula": TimmFormula,
}


def fit(module: Network, callback: Callback | None, steps: int) -> tuple[float, float, int]:
    """Train a few steps; return seconds of a step, seconds in the hook (medians), and bytes the callback holds."""
    clock = Clock(callback)
    inputs = torch.randn(BATCH_SIZE * steps, module.blocks[0].linear.in_features)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[clock] if callback is None else [clock, callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs), batch_size=BATCH_SIZE))
    times = [later - earlier for earlier, later in zip(clock.begins, clock.begins[1:], strict=False)][SKIPPED:]
    hook = statistics.median(clock.hooks[SKIPPED:]) if callback is not None else 0.0
    own = {tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    held = {t.data_ptr(): t.nbytes for t in _tensors(callback) if t.data_ptr() not in own}
    return statistics.median(times), hook, sum(held.values())


def _tensors(holder: Any) -> list[Tensor]:
    """Return the tensors within a callback, at any depth of its dicts, lists and modules."""
    if isinstance(holder, Tensor):
        return [holder]
    if isinstance(holder, nn.Module):
        return [*holder.parameters(), *holder.buffers()]
    if isinstance(holder, Callback):
        holder = {name: value for name, value in vars(holder).items() if name != "on_train_batch_end"}
    if isinstance(holder, dict):
        holder = list(holder.values())
    elif type(holder).__module__.startswith("lightning_stable.callbacks"):
        holder = list(vars(holder).values())
    return [tensor for item in holder for tensor in _tensors(item)] if isinstance(holder, (list, tuple)) else []


def summarise(
    found: dict[str, list[tuple[float, float, int]]], weights: int
) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """Return the numbers of each variant and the rows of the table."""
    results: dict[str, dict[str, Any]] = {}
    for name, runs in found.items():
        overhead = [(run[0] - base[0]) * 1e3 for run, base in zip(runs, found["none"], strict=True)]
        low, middle, high = statistics.quantiles(overhead, n=4)
        results[name] = {
            "step_ms": statistics.median(run[0] for run in runs) * 1e3,
            "overhead_ms": middle,
            "overhead_quartiles_ms": [low, high],
            "hook_ms": statistics.median(run[1] for run in runs) * 1e3,
            "extra_bytes": runs[0][2],
            "extra_copies": runs[0][2] / weights,
            "raw_step_and_hook_seconds": [run[:2] for run in runs],
        }
    peer = results["lightning"]
    rows = [["none", f"{results['none']['step_ms']:.1f}", *[""] * 5]]
    rows += [
        [
            name,
            f"{r['step_ms']:.1f}",
            f"{r['overhead_ms']:.1f} ({r['overhead_quartiles_ms'][0]:.1f} to {r['overhead_quartiles_ms'][1]:.1f})",
            f"{r['hook_ms']:.1f}",
            f"{r['extra_copies']:.2f} ({r['extra_bytes'] / 2**20:.1f} MiB)",
            f"{r['overhead_ms'] / peer['overhead_ms']:.2f}",
            f"{r['hook_ms'] / peer['hook_ms']:.2f}",
        ]
        for name, r in results.items()
        if name != "none"
    ]
    return results, rows


def compare(rounds: int, steps: int, blocks: int, width: int) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    torch.manual_seed(0)
    module = Network(blocks, width)
    sizes = [parameter.numel() for parameter in module.parameters()]
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in VARIANTS}
    for index in range(-1, rounds):
        for name in list(VARIANTS)[:: 1 if index % 2 else -1]:
            measured = fit(module, VARIANTS[name](), steps)
            if index >= 0:
                found[name].append(measured)
    results, rows = summarise(found, weights=4 * sum(sizes))
    ours, peer = results["ours"], results["lightning"]
    ratio, hook = ours["overhead_ms"] / peer["overhead_ms"], ours["hook_ms"] / peer["hook_ms"]
    fast, small = ratio <= TARGET, abs(ours["extra_copies"] - 1) < 0.01
    head = ["Average", "Step, ms", "Overhead, ms", "In the hook, ms", "Extra copies", "Overhead ratio", "Hook ratio"]
    text = "\n".join(
        [
            f"{sum(sizes) / 1e6:.1f} million parameters in {len(sizes)} tensors, float32, batches of {BATCH_SIZE}, "
            f"{torch.get_num_threads()} thread, {rounds} rounds of {steps} steps; ratios are to 'lightning'\n",
            table(head, rows),
            "",
            f"Ours / Lightning: {ratio:.2f} of the overhead (target: at most {TARGET}: {verdict(fast)}), {hook:.2f} of "
            f"the time in the hook; {ours['extra_copies']:.2f} extra copies of the weights (target: one: "
            f"{verdict(small)}).",
        ]
    )
    result = {
        "settings": {
            "parameters": sum(sizes),
            "tensors": len(sizes),
            "batch_size": BATCH_SIZE,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "steps": steps,
        },
        "variants": results,
        "overhead_ours_over_lightning": ratio,
        "hook_ours_over_lightning": hook,
        "targets": {"overhead_at_most_half": fast, "one_extra_copy": small},
    }
    return text, result


def main() -> None:
    options = arguments(__doc__)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, result = compare(2, 6, 8, 64) if options.quick else compare(ROUNDS, STEPS, BLOCKS, WIDTH)
    publish("ema", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
