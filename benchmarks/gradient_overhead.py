"""What the gradient transforms cost a training step: StableSPAM, OrthoGrad, SpikeGuard, and the peers' optimizers.

A transformer without embeddings, 25 million parameters in 224 tensors, trains by AdamW on 1024 tokens a step. Every
variant is a real ``Trainer.fit`` of a few steps; the fits take turns in one process, in an order that is reversed from
round to round. The input and the target are random and new at each step: only times are measured.

* ``AdamW``: no transform.
* ``StableSPAM``, ``OrthoGrad``, ``SpikeGuard``: the callbacks of :mod:`lightning_stable.callbacks` with AdamW.
* ``clip by norm``: the Trainer's ``gradient_clip_val``, for scale.
* ``peer StableSPAM``: pytorch_optimizer's optimizer, which is Adam with the transform, also with ``foreach=True``.
* ``peer OrthoGrad``: pytorch_optimizer's wrapper around AdamW, also with ``foreach=True``.

Times are processor time of the one thread, which other load on the machine disturbs less than the clock on the wall. A
step is the time from one ``on_train_batch_start`` to the next, the first of a fit left out. ``Update`` is the part from
the end of the backward pass to the end of the optimizer step: all that differs between the variants (the guard also
reads the loss), without the forward and backward passes and their noise. The overhead of a variant is, in each round,
its median update minus that of AdamW, as a share of AdamW's step in that round; the table shows the median over the
rounds and its quartiles. ``In the hook`` is the time within the callback's ``on_before_optimizer_step`` alone.

Targets: StableSPAM at most 8 % of the step, OrthoGrad at most 4 %.
"""

import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _report import arguments, publish, table, verdict
from lightning.pytorch import Callback, LightningModule, Trainer
from pytorch_optimizer import OrthoGrad as PeerOrthoGrad
from pytorch_optimizer import StableSPAM as PeerStableSPAM
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss, scaled_dot_product_attention
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable.callbacks import OrthoGrad, SpikeGuard, StableSPAM

ROUNDS = 3
STEPS = 4
SKIPPED = 1
BLOCKS = 14
WIDTH = 384
HEADS = 6
SEQUENCES, LENGTH = 8, 128
LR = 1e-4
TARGETS = {"StableSPAM": 0.08, "OrthoGrad": 0.04}


class Block(nn.Module):
    """A transformer block of 16 tensors: six linear layers and two norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.attention[:3])
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention[3](mixed)
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Network(LightningModule):
    """A stack of blocks and the optimizer under test."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.optimizer: Callable[[Any], Optimizer] = _adamw

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return mse_loss(self.blocks(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())


def _adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=LR)


class Variant(NamedTuple):
    """What one fit has.

    Attributes:
        callback: Builds the callback under test.
        optimizer: Builds the optimizer.
        clip: The Trainer's ``gradient_clip_val``.
    """

    callback: Callable[[], Callback | None] = lambda: None
    optimizer: Callable[[Any], Optimizer] = _adamw
    clip: float | None = None


VARIANTS = {
    "AdamW": Variant(),
    "StableSPAM": Variant(StableSPAM),
    "OrthoGrad": Variant(OrthoGrad),
    # Judges from the third step on, and finds no spikes: a skipped update would cost nothing.
    "SpikeGuard": Variant(lambda: SpikeGuard(threshold=1e9, warmup_steps=2)),
    "clip by norm": Variant(clip=1.0),
    "peer StableSPAM": Variant(optimizer=lambda parameters: PeerStableSPAM(parameters, lr=LR)),
    "peer StableSPAM, foreach": Variant(optimizer=lambda parameters: PeerStableSPAM(parameters, lr=LR, foreach=True)),
    "peer OrthoGrad": Variant(optimizer=lambda parameters: PeerOrthoGrad(_adamw(parameters))),
    "peer OrthoGrad, foreach": Variant(optimizer=lambda parameters: PeerOrthoGrad(_adamw(parameters), foreach=True)),
}


class Times(NamedTuple):
    """Medians over the steps of a fit, in seconds of processor time."""

    step: float
    update: float
    hook: float


class Clock(Callback):
    """Notes when each step begins, how long its update takes, and how long the watched callback's hook takes.

    It comes first among the callbacks, so that an update's time holds all hooks of the others.
    """

    def __init__(self, watched: Callback | None) -> None:
        self.begins: list[float] = []
        self.updates: list[float] = []
        self.hooks: list[float] = []
        self._backward_end = 0.0
        if watched is not None:
            hook = watched.on_before_optimizer_step

            @functools.wraps(hook)
            def timed(*args: Any, **kwargs: Any) -> None:
                began = time.process_time()
                hook(*args, **kwargs)
                self.hooks.append(time.process_time() - began)

            watched.on_before_optimizer_step = timed  # type: ignore[method-assign]

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.begins.append(time.process_time())

    @override
    def on_after_backward(self, *_: Any) -> None:
        self._backward_end = time.process_time()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.updates.append(time.process_time() - self._backward_end)


def fit(module: Network, variant: Variant, steps: int) -> Times:
    """Train a few steps and time them."""
    callback = variant.callback()
    clock = Clock(callback)
    module.optimizer = variant.optimizer
    width = module.blocks[0].down.out_features
    data = TensorDataset(*(torch.randn(SEQUENCES * steps, LENGTH, width) for _ in range(2)))
    trainer = Trainer(
        max_steps=steps,
        callbacks=[clock] if callback is None else [clock, callback],
        gradient_clip_val=variant.clip,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=SEQUENCES))
    module.zero_grad()
    times = [later - earlier for earlier, later in zip(clock.begins, clock.begins[1:], strict=False)]
    return Times(
        statistics.median(times[SKIPPED:]),
        statistics.median(clock.updates[SKIPPED:]),
        statistics.median(clock.hooks[SKIPPED:]) if callback is not None else 0.0,
    )


def summarise(found: dict[str, list[Times]]) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """Return the numbers of each variant and the rows of the table."""
    results: dict[str, dict[str, Any]] = {}
    base = found["AdamW"]
    for name, runs in found.items():
        shares = [(run.update - plain.update) / plain.step for run, plain in zip(runs, base, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        step, update, hook = (statistics.median(values) for values in zip(*runs, strict=True))
        results[name] = {
            "step_ms": step * 1e3,
            "update_ms": update * 1e3,
            "hook_ms": hook * 1e3,
            "hook_share_of_step": hook / statistics.median(run.step for run in base),
            "overhead_share_of_step": middle,
            "overhead_quartiles": [low, high],
            "raw_seconds": runs,
        }
    plain = results["AdamW"]
    rows = [["AdamW", f"{plain['step_ms']:.0f}", f"{plain['update_ms']:.1f}", "", "", ""]]
    rows += [
        [
            name,
            f"{r['step_ms']:.0f}",
            f"{r['update_ms']:.1f}",
            f"{r['hook_ms']:.1f}" if r["hook_ms"] else "",
            f"{r['hook_share_of_step']:.1%}" if r["hook_ms"] else "",
            f"{r['overhead_share_of_step']:.1%} ({r['overhead_quartiles'][0]:.1%} to {r['overhead_quartiles'][1]:.1%})",
        ]
        for name, r in results.items()
        if name != "AdamW"
    ]
    return results, rows


def compare(rounds: int, steps: int, blocks: int, width: int) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    torch.manual_seed(0)
    module = Network(blocks, width)
    sizes = [parameter.numel() for parameter in module.parameters()]
    found: dict[str, list[Times]] = {name: [] for name in VARIANTS}
    for index in range(rounds):
        for name in list(VARIANTS)[:: 1 if index % 2 else -1]:
            found[name].append(fit(module, VARIANTS[name], steps))
        print(f"round {index + 1} of {rounds}: done", flush=True)
    results, rows = summarise(found)
    met = {name: results[name]["overhead_share_of_step"] <= limit for name, limit in TARGETS.items()}
    head = ["Variant", "Step, ms", "Update, ms", "In the hook, ms", "Hook / step", "Overhead / step"]
    text = "\n".join(
        [
            f"{sum(sizes) / 1e6:.1f} million parameters in {len(sizes)} tensors, float32, {SEQUENCES * LENGTH} tokens "
            f"a step, {torch.get_num_threads()} thread, {rounds} rounds of {steps} steps\n",
            table(head, rows),
            "",
            *(
                f"{name}: {results[name]['overhead_share_of_step']:.1%} of the step (target: at most {limit:.0%}: "
                f"{verdict(met[name])})."
                for name, limit in TARGETS.items()
            ),
        ]
    )
    result = {
        "settings": {
            "parameters": sum(sizes),
            "tensors": len(sizes),
            "tokens": SEQUENCES * LENGTH,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "steps": steps,
        },
        "variants": results,
        "targets": {f"{name.lower()}_at_most_{limit * 100:.0f}_percent": met[name] for name, limit in TARGETS.items()},
    }
    return text, result


def main() -> None:
    options = arguments(__doc__)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    text, result = compare(2, 3, 2, 48) if options.quick else compare(ROUNDS, STEPS, BLOCKS, WIDTH)
    publish("gradient_overhead", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
