"""What the gradient stabilisers buy: spikes and a rate too high for a language model, and grokking without decay.

**Spikes and a high rate.** A Llama of 0.14 million parameters trains by AdamW on the standard library's source text,
400 steps of 16 windows of 128 bytes, under three conditions: as usual; with *spikes*, where after the first eighth each
step has a chance of 5 % that the gradients of 3 random tensors (of 21) are multiplied by 1000; and with a *high rate*,
ten times the best. It does so by itself, with the Trainer's clipping by norm (``gradient_clip_val=1.0``), with
StableSPAM, and with SpikeGuard, which skips or clips. Spikes and data are the same for each method. Everything but the
rate has its default; the rate is AdamW's best of 0.001, 0.003 and 0.01 without spikes, on seed 100, which is not among
the reported ones (``--tune`` prints these losses, and the other methods' at these rates). A run *diverged* if its final
validation loss is not finite or above ln 256, that of guessing.

**Grokking** (arXiv 2501.04697). A perceptron 118-128-128-59 without biases learns addition modulo 59 from 60 % of all
pairs, full batch, by AdamW without weight decay (rate 0.01, betas 0.9 and 0.99, eps 1e-25; the released code, read in a
fork, takes 0.999 with StableMax): with cross-entropy and with StableMax's, each in float32 and in float64 (which the
released code takes for StableMax); with OrthoGrad and cross-entropy; and for scale with cross-entropy and the usual
cure, a weight decay of 1.
Reported are the steps until 95 % of the held-out pairs are right, at which a run ends; the share of training samples
whose softmax, in float32, has collapsed at the end (StableMax's loss has no softmax: there it tells of the logits
only); and the share whose loss is exactly 0 in its own precision. The paper has 113 and 40 %; this is smaller, so that
it ends within minutes, and has a larger share, since from 40 % of so few pairs StableMax needs more steps than there is
time for.

There is no target for the language model: the numbers are for the methods' cards. For grokking the paper's claims are
the targets, with every seed: cross-entropy never gets there, StableMax (in float64) and OrthoGrad do.

Each run has one thread, and runs share the cores: only losses and step counts are compared, not times.
"""

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from _pool import run_jobs
from _report import arguments, publish, table, verdict

SEEDS = (0, 1, 2)
TUNING_SEED = 100

LR, HIGH_LR = 3e-3, 3e-2
LM_STEPS = 400
SPIKE_CHANCE, SPIKE_TENSORS, SPIKE_FACTOR = 0.05, 3, 1000.0
BATCH_SIZE, LENGTH = 16, 128
VALIDATION_WINDOWS = 512
MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
CONDITIONS = ("usual", "spikes", "high rate")
STABILISERS = ("AdamW", "clipping by norm", "StableSPAM", "SpikeGuard", "SpikeGuard, clip")

MODULUS, SHARE, WIDTH = 59, 0.6, 128
GROKKING_STEPS = 8000
GROKKED, EVALUATE_EVERY = 0.95, 20
GROKKERS = (
    "cross-entropy",
    "cross-entropy, float64",
    "StableMax",
    "StableMax, float64",
    "OrthoGrad",
    "cross-entropy, weight decay",
)


class Job(NamedTuple):
    """One run of training.

    Attributes:
        condition: One of ``CONDITIONS``, or ``"grokking"``.
        method: One of ``STABILISERS``, or of ``GROKKERS``.
        seed: Of the initial weights, the order of the data, the spikes, and which pairs are held out.
        steps: At most so many optimizer steps.
        lr: The learning rate.
    """

    condition: str
    method: str
    seed: int
    steps: int
    lr: float


def train(job: Job) -> tuple[Job, dict[str, Any], float]:
    """Run a job; return it with its numbers and its seconds."""
    # Imported here: the parent process only hands out jobs.
    import logging

    import torch
    from lightning.pytorch import seed_everything

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    started = time.perf_counter()
    seed_everything(job.seed, verbose=False)
    found = _grok(job) if job.condition == "grokking" else _language_model(job)
    return job, found, time.perf_counter() - started


def _trainer(**settings: Any) -> Any:
    from lightning.pytorch import Trainer

    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **settings)


def _language_model(job: Job) -> dict[str, Any]:
    """Train the language model; return its final validation loss in nats a byte, and what was spiked and refused."""
    from torch.utils.data import DataLoader, Subset

    from lightning_stable.callbacks import SpikeGuard, StableSPAM
    from lightning_stable.data.text import TextDataModule
    from lightning_stable.recipes.causal_lm import CausalLM

    callbacks = {
        "StableSPAM": lambda: [StableSPAM()],
        "SpikeGuard": lambda: [SpikeGuard()],
        "SpikeGuard, clip": lambda: [SpikeGuard(action="clip")],
    }.get(job.method, list)()
    datamodule = TextDataModule(sequence_length=LENGTH, batch_size=BATCH_SIZE, seed=0, max_bytes=10_000 * job.steps)
    datamodule.setup("fit")
    # After the split, so that all seeds have the same files held out and each its own order.
    datamodule.seed = job.seed
    injected = _spikes(job)
    module = CausalLM(MODEL, lr=job.lr)
    trainer = _trainer(
        max_steps=job.steps,
        callbacks=[injected, *callbacks],
        gradient_clip_val=1.0 if job.method == "clipping by norm" else None,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule)
    refused = sum(int(trainer.callback_metrics.get(f"spike_guard/{name}", 0)) for name in ("skipped", "clipped"))
    windows = datamodule.val_dataloader().dataset
    spread = range(0, len(windows), max(1, len(windows) // VALIDATION_WINDOWS))[:VALIDATION_WINDOWS]
    loader = DataLoader(Subset(windows, spread), batch_size=64)
    loss = _trainer().validate(module, loader, verbose=False)[0]["val_loss"]
    return {
        "validation_loss": loss,
        "diverged": not (math.isfinite(loss) and loss <= math.log(256)),
        "spikes": injected.count,
        "refused": refused,
    }


def _spikes(job: Job) -> Any:
    """Return the callback that makes spikes, if the condition has some, and counts them."""
    import torch
    from lightning.pytorch import Callback

    generator = torch.Generator().manual_seed(job.seed)
    chance = SPIKE_CHANCE if job.condition == "spikes" else 0.0

    class Spikes(Callback):
        """Acts at the end of the backward pass, before anything that watches or changes gradients."""

        count = 0

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step < job.steps // 8 or float(torch.rand((), generator=generator)) >= chance:
                return
            self.count += 1
            gradients = [parameter.grad for parameter in pl_module.parameters()]
            for place in torch.randperm(len(gradients), generator=generator)[:SPIKE_TENSORS].tolist():
                gradients[place].mul_(SPIKE_FACTOR)

    return Spikes()


def _grok(job: Job) -> dict[str, Any]:
    """Train on modular addition until it is grokked; return the steps, and what became of the training samples."""
    import torch
    from lightning.pytorch import Callback, LightningModule
    from torch import nn
    from torch.nn.functional import one_hot
    from torch.utils.data import DataLoader

    from lightning_stable.callbacks import OrthoGrad
    from lightning_stable.functional.softmax_collapse import softmax_collapse
    from lightning_stable.functional.stablemax import StableMaxCrossEntropyLoss

    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(job.seed))
    inputs, sums = one_hot(pairs, MODULUS).flatten(1).float()[order], (pairs.sum(1) % MODULUS)[order]
    held = int(SHARE * len(pairs))
    loss_type = StableMaxCrossEntropyLoss if job.method.startswith("StableMax") else nn.CrossEntropyLoss
    criterion, precision = loss_type(reduction="none"), torch.float64 if "float64" in job.method else torch.float32

    class Perceptron(LightningModule):
        """Adds two numbers; its one batch is all there is."""

        def __init__(self) -> None:
            super().__init__()
            sizes = (2 * MODULUS, WIDTH, WIDTH, MODULUS)
            layers = [nn.Linear(*pair, bias=False) for pair in itertools.pairwise(sizes)]
            self.network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return criterion(self.network(inputs[:held]).to(precision), sums[:held]).mean()

        def configure_optimizers(self) -> Any:
            decay = 1.0 if job.method == "cross-entropy, weight decay" else 0.0
            return torch.optim.AdamW(self.parameters(), lr=job.lr, betas=(0.9, 0.99), eps=1e-25, weight_decay=decay)

    class Watch(Callback):
        """Evaluates now and then, and ends the run where it has grokked."""

        accuracy = 0.0
        grokked_at: int | None = None

        @torch.no_grad()
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % EVALUATE_EVERY:
                return
            right = pl_module.network(inputs[held:]).argmax(1) == sums[held:]
            self.accuracy = float(right.float().mean())
            if self.accuracy >= GROKKED:
                self.grokked_at = trainer.global_step
                trainer.should_stop = True

    watch, module = Watch(), Perceptron()
    callbacks = [OrthoGrad(), watch] if job.method == "OrthoGrad" else [watch]
    _trainer(max_steps=job.steps, callbacks=callbacks).fit(module, DataLoader(range(job.steps), batch_size=None))
    with torch.no_grad():
        logits = module.network(inputs[:held])
        values = criterion(logits.to(precision), sums[:held])
    return {
        "steps": watch.grokked_at,
        "test_accuracy": watch.accuracy,
        "training_accuracy": float((logits.argmax(1) == sums[:held]).float().mean()),
        "collapsed": float(softmax_collapse(logits).float().mean()),
        "zero_loss": float((values == 0).float().mean()),
    }


def run(jobs: Iterable[Job]) -> dict[Job, dict[str, Any]]:
    """Run jobs on all cores; return the numbers of each."""
    return run_jobs(train, jobs, None, _told)


def _told(job: Job, numbers: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {_short(value)}" for name, value in numbers.items())
    return f"{job.condition}, {job.method}, seed {job.seed}, rate {job.lr:g}: {shown}"


def tune() -> None:
    """Print the losses at candidate rates on the tuning seed."""
    run(Job("usual", method, TUNING_SEED, LM_STEPS, lr) for method in STABILISERS for lr in (1e-3, 3e-3, 1e-2))


def compare(
    seeds: tuple[int, ...], conditions: tuple[str, ...], lm_steps: int, grokking_steps: int
) -> tuple[str, dict[str, Any]]:
    """Run everything; return the report and the result."""
    jobs = [Job("grokking", method, seed, grokking_steps, 1e-2) for seed in seeds for method in GROKKERS]
    jobs += [
        Job(condition, method, seed, lm_steps, HIGH_LR if condition == "high rate" else LR)
        for seed in seeds
        for condition in conditions
        for method in STABILISERS
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job, numbers in run(jobs).items():
        groups.setdefault((job.condition, job.method), []).append(numbers)
    steps = {method: [numbers["steps"] for numbers in groups["grokking", method]] for method in GROKKERS}
    never = all(found is None for method in GROKKERS[:2] for found in steps[method])
    does = {method: None not in steps[method] for method in ("StableMax, float64", "OrthoGrad")}
    text = "\n".join(
        [
            f"Language model, {lm_steps} steps: validation loss in nats a byte, mean ± standard deviation over "
            f"{len(seeds)} seeds, without the runs that diverged; diverged runs and refused updates are totals\n",
            _language_table(groups, conditions),
            f"\nAddition modulo {MODULUS}, at most {grokking_steps} steps: each of {len(seeds)} seeds\n",
            _grokking_table(groups),
            "",
            f"Cross-entropy never groks: {verdict(never)}. "
            + " ".join(f"{method} groks with every seed: {verdict(met)}." for method, met in does.items()),
        ]
    )
    result = {
        "settings": {
            "seeds": list(seeds),
            "tuned_on_seed": TUNING_SEED,
            "language_model": {
                "model": MODEL,
                "steps": lm_steps,
                "batch_size": BATCH_SIZE,
                "lr": LR,
                "high_lr": HIGH_LR,
                "gradient_clip_val": 1.0,
                "spikes": {
                    "from_step": lm_steps // 8,
                    "chance": SPIKE_CHANCE,
                    "tensors": SPIKE_TENSORS,
                    "factor": SPIKE_FACTOR,
                },
            },
            "grokking": {"modulus": MODULUS, "share": SHARE, "width": WIDTH, "steps": grokking_steps, "lr": 1e-2},
        },
        "runs": [
            {"condition": condition, "method": method, "seed": seed, **numbers}
            for (condition, method), runs in groups.items()
            for seed, numbers in zip(seeds, runs, strict=True)
        ],
        "targets": {
            "cross_entropy_never_groks": never,
            "stablemax_groks": does["StableMax, float64"],
            "orthograd_groks": does["OrthoGrad"],
        },
    }
    return text, result


def _language_table(groups: dict[tuple[str, str], list[dict[str, Any]]], conditions: tuple[str, ...]) -> str:
    """Return the losses, a column for each condition, and their ratios to AdamW's in the first one."""
    rows = []
    base = _mean_loss(groups[conditions[0], STABILISERS[0]])
    for method in STABILISERS:
        runs = [groups[condition, method] for condition in conditions]
        rows.append(
            [
                method,
                *(_spread([numbers["validation_loss"] for numbers in _kept(group)]) for group in runs),
                " ".join(str(len(group) - len(_kept(group))) for group in runs),
                " ".join(str(sum(numbers["refused"] for numbers in group)) for group in runs)
                if "Guard" in method
                else "",
                *(f"{_mean_loss(group) / base:.3f}" for group in runs),
            ]
        )
    ratios = [f"{condition}, ratio" for condition in conditions]
    return table(["Method", *conditions, "Diverged", "Refused", *ratios], rows)


def _kept(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [numbers for numbers in runs if not numbers["diverged"]]


def _mean_loss(runs: list[dict[str, Any]]) -> float:
    losses = [numbers["validation_loss"] for numbers in _kept(runs)]
    return statistics.fmean(losses) if losses else math.nan


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def _grokking_table(groups: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """Return the numbers of each seed."""
    rows = []
    for method in GROKKERS:
        runs = groups["grokking", method]
        shares = [
            " ".join(f"{numbers[name] * 100:.1f}" for numbers in runs)
            for name in ("test_accuracy", "collapsed", "zero_loss")
        ]
        rows.append([method, " ".join(str(numbers["steps"] or "never") for numbers in runs), *shares])
    return table(["Method", "Steps to 95 %", "Test accuracy, %", "Collapsed, %", "Loss exactly 0, %"], rows)


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> None:
    options = arguments(__doc__, tune="print the losses at candidate rates on the tuning seed, and stop")
    if options.tune:
        tune()
        return
    text, result = (
        compare((0,), CONDITIONS[1:2], 8, 40) if options.quick else compare(SEEDS, CONDITIONS, LM_STEPS, GROKKING_STEPS)
    )
    publish("gradient_stabilisers", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
