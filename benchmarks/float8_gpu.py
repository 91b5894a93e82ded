"""What float8 buys on a GPU: Float8Precision, each recipe, against bfloat16 on Llama-style blocks with torch.compile.

A causal language model of bytes (the standard library's source text): an embedding, blocks as of Llama (RMSNorm,
causal attention with rotary positions, SwiGLU of 8/3 of the width in multiples of 256) and a head, which stays in high
precision. For each width the blocks are compiled, and trained by fused AdamW in real ``Trainer.fit`` calls that differ
in the precision plugin alone: the host's ``bf16-true``, and Float8Precision(recipe, compute="bf16-true"). With
``--mixed`` both are ``bf16-mixed``, where weights stay in float32. The fits take turns in an order that is reversed
from round to round; each begins with the same weights and sees the same batches.

Tokens a second are those of the median step by the clock on the wall, between two steps of which the device is waited
for, the first steps of a fit (compilation) left out; the ratio is that of medians over the rounds. Losses agree if the
mean loss of the last ten steps is within 2 % of bfloat16's.

It needs a GPU of compute capability 8.9 or higher and refuses elsewhere, with exit code 2. ``--quick`` trains a tiny
model with emulated float8 on any machine, without compiling: it says nothing about speed.

Target: at least 1.25 times the tokens a second of bfloat16 at width 4096, with the best recipe.
"""

import logging
import statistics
import sys
import time
import warnings
from typing import Any, NamedTuple

import torch
from _report import arguments, publish, table, verdict
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from typing_extensions import override

from lightning_stable.data.text import TextDataModule
from lightning_stable.precision.float8 import Float8Precision

NEEDED = (8, 9)
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
TARGET, TARGET_WIDTH, AGREEMENT = 1.25, 4096, 0.02
LAST = 10


class Size(NamedTuple):
    """What is trained, and how long."""

    widths: dict[int, int]  # blocks for each width
    head_width: int
    batch_size: int
    length: int
    steps: int
    skipped: int
    rounds: int
    compile: bool


FULL = Size({1024: 8, 2048: 4, 4096: 2}, 128, 4, 2048, 60, 15, 3, compile=True)
QUICK = Size({32: 2}, 16, 2, 32, 12, 2, 1, compile=False)


class Block(nn.Module):
    """A block as of Llama: seven linear layers without biases, and two norms."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        inner = 256 * -(-width * 8 // (3 * 256)) if width >= 256 else 2 * width
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    @override
    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        normed = self.norms[0](x)
        q, k, v = (layer(normed).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for layer in self.qkv)
        mixed = scaled_dot_product_attention(_turn(q, cosine, sine), _turn(k, cosine, sine), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.norms[1](x)
        return x + self.down(silu(self.gate(normed)) * self.up(normed))


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate queries or keys by their position."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cosine.to(x.dtype) + turned * sine.to(x.dtype)


class ByteModel(LightningModule):
    """The language model; the last name makes the default filter leave its head alone."""

    def __init__(self, width: int, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, size.head_width) for _ in range(size.widths[width]))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
        angles = torch.arange(size.length)[:, None] / 1e4 ** torch.linspace(0, 1, size.head_width // 2 + 1)[:-1]
        self.register_buffer("cosine", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sine", angles.sin().repeat(1, 2), persistent=False)
        self.losses: list[Tensor] = []

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.embedding(batch["input_ids"])
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        logits = self.head(self.norm(x[:, :-1])).float()
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)


class Clock(Callback):
    """Notes when each step begins, the device done with what came before."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.begins.append(time.perf_counter())


class Fit(NamedTuple):
    """What one fit gave."""

    seconds: float  # of the median step
    losses: list[float]


def fit(width: int, recipe: str | None, size: Size, compute: str, device: str) -> Fit:
    """Train from the beginning, and time it."""
    seed_everything(0, verbose=False)
    torch._dynamo.reset()
    module = ByteModel(width, size)
    if size.compile:
        for block in module.blocks:
            block.compile(fullgraph=True)
    data = TextDataModule(sequence_length=size.length, batch_size=size.batch_size)
    clock = Clock()
    plugin: dict[str, Any] = {"plugins": [Float8Precision(recipe, compute=compute)]} if recipe else {}
    trainer = Trainer(
        max_steps=size.steps,
        callbacks=[clock],
        accelerator=device,
        devices=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(plugin or {"precision": compute}),
    )
    trainer.fit(module, datamodule=data)
    times = [later - earlier for earlier, later in zip(clock.begins, clock.begins[1:], strict=False)]
    return Fit(statistics.median(times[size.skipped :]), torch.stack(module.losses).tolist())


def compare(size: Size, compute: str, device: str) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    found: dict[int, dict[str, list[Fit]]] = {}
    kinds = {"bfloat16": None, **{recipe: recipe for recipe in RECIPES}}
    for width in size.widths:
        found[width] = {name: [] for name in kinds}
        for index in range(size.rounds):
            for name in list(kinds)[:: 1 if index % 2 else -1]:
                found[width][name].append(fit(width, kinds[name], size, compute, device))
            print(f"width {width}, round {index + 1} of {size.rounds}: done", flush=True)
    results, rows = summarise(found, size)
    best = max(results[str(max(size.widths))][recipe]["ratio"] for recipe in RECIPES)
    agree = all(abs(entry["loss_ratio"] - 1) <= AGREEMENT for width in results.values() for entry in width.values())
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU, emulated"
    lines = [
        f"{name}, {compute}, {size.batch_size} x {size.length} tokens a step, {size.rounds} rounds of {size.steps} "
        f"steps ({size.skipped} left out){', compiled' if size.compile else ''}\n",
        table(["Width", "Precision", "Tokens/s", "Ratio", "Last loss", "Loss / bf16"], rows),
        "",
        f"Best ratio at width {max(size.widths)}: {best:.2f} (target at {TARGET_WIDTH}: {TARGET}: "
        f"{verdict(best >= TARGET)}).",
        f"Losses within {AGREEMENT:.0%} of bfloat16's: {verdict(agree)}.",
    ]
    result = {
        "gpu": name,
        "settings": {**size._asdict(), "compute": compute},
        "widths": results,
        "targets": {"ratio_at_width_4096": best >= TARGET, "losses_within_2_percent": agree},
    }
    return "\n".join(lines), result


def summarise(found: dict[int, dict[str, list[Fit]]], size: Size) -> tuple[dict[str, Any], list[list[str]]]:
    """Return the numbers of each width and precision, and the rows of the table."""
    results: dict[str, Any] = {}
    rows = []
    for width, fits in found.items():
        seconds = {name: statistics.median(run.seconds for run in runs) for name, runs in fits.items()}
        last = {name: statistics.fmean(runs[0].losses[-LAST:]) for name, runs in fits.items()}
        results[str(width)] = {
            name: {
                "tokens_per_second": size.batch_size * size.length / seconds[name],
                "ratio": seconds["bfloat16"] / seconds[name],
                "last_loss": last[name],
                "loss_ratio": last[name] / last["bfloat16"],
                "raw_seconds": [run.seconds for run in runs],
                "losses": runs[0].losses,
            }
            for name, runs in fits.items()
        }
        rows += [
            [
                str(width),
                name,
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['ratio']:.2f}",
                f"{entry['last_loss']:.4f}",
                f"{entry['loss_ratio']:.4f}",
            ]
            for name, entry in results[str(width)].items()
        ]
    return results, rows


def missing_hardware() -> str | None:
    """Return what is missing on this machine, in words; ``None`` if nothing is."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return None if found >= NEEDED else f"{name} has compute capability {found[0]}.{found[1]}"


def main() -> None:
    options = arguments(__doc__, mixed="compute in bf16-mixed, with weights in float32, in place of bf16-true")
    missing = missing_hardware()
    if missing and not options.quick:
        print(
            f"float8_gpu needs a GPU of compute capability {NEEDED[0]}.{NEEDED[1]} or higher, and {missing}. Nothing "
            "was measured. To try float8 here, use Float8Precision on the CPU (emulated) or SimulatedPrecision.",
            file=sys.stderr,
        )
        sys.exit(2)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    compute = "bf16-mixed" if options.mixed else "bf16-true"
    size, device = (QUICK, "cpu") if options.quick else (FULL, "cuda")
    text, result = compare(size, compute, device)
    publish("float8_gpu_mixed" if options.mixed else "float8_gpu", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
