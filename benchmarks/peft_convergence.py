"""Whether adapters that start right learn faster: fine-tuning of a small language model from code to prose.

A Llama of 0.9 million parameters over bytes (the package's causal language model) is pretrained on the standard
library's code without docstrings and comments, and fine-tuned on just these, in windows of 128 bytes. Files are split
first: prose is held out of files that nothing was trained on, half of it to choose learning rates by, half to compare
by. The checkpoint is made by this script, in minutes, and not kept.

Adapters have rank 8 and alpha 8 on all linear layers of the blocks, and are those that :class:`Adapters` makes in a
real ``Trainer`` fit. ``LoRA-GA of peft`` starts by peft's ``preprocess_loraga``, with the batches that ours takes.
``LoLDU`` and ``SVFit`` train 8 numbers a layer. ``full`` trains all weights. AdamW without weight decay, a rate that
rises over the first 4 % of the steps and falls by a cosine to zero; batches of 8 windows. The rate of each method is
that of the same four whose final loss on the tuning part was lowest with seed 0, at the full number of steps; losses
are of the validation part. The seed is that of the adapters and of the order of the data.

*Steps to LoRA's* are the steps after which a run is below the final loss of the LoRA run of the same seed for the first
time, between two evaluations in proportion; with a rate that falls to zero most of the way is made late.

The claims of the papers, that PiSSA (arXiv 2404.02948), LoRA-GA (2407.05000) and EVA (2410.07170) are faster than LoRA,
each with the rule by which this says yes or no: yes if the runs of all seeds reach LoRA's final loss in fewer steps and
end below it; no if none does; else undecided. The numbers are for the cards, there is no target.

Each run has one thread, and runs share the cores: only losses are compared, not times.
"""

import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _peft_picture import draw
from _peft_runs import METHODS, Job, Sizes, pretrain, train
from _pool import run_jobs
from _report import arguments, publish, table

SEEDS = (0, 1, 2)
RATES = (2.5e-3, 6e-3, 1.5e-2, 4e-2)
SIZES = Sizes(
    width=128,
    layers=4,
    max_bytes=8_000_000,
    pretraining_steps=1200,
    pretraining_batch=16,
    steps=160,
    batch=8,
    every=20,
    windows=64,
)
TINY = Sizes(32, 1, 300_000, pretraining_steps=2, pretraining_batch=2, steps=4, batch=2, every=2, windows=2)
SHOWN_STEPS = (0, 20, 40, 60, 80, 120, 160)
CLAIMS = ("PiSSA", "LoRA-GA", "LoRA-GA of peft", "EVA")

Found = dict[Job, dict[str, Any]]


# ----------------------------------------------------------------------------- the runs


def run(jobs: Iterable[Job], processes: int) -> Found:
    """Run jobs, and return the numbers of each."""
    return run_jobs(train, jobs, processes, _told)


def _told(job: Job, numbers: dict[str, Any]) -> str:
    return f"{job.method}, seed {job.seed}, rate {job.lr:g}: {_final(numbers):.4f}"


def best_rates(found: Found) -> dict[str, float]:
    """Return for each method the rate whose loss on the tuning part is lowest."""
    best: dict[str, float] = {}
    for method in METHODS:
        losses = {job.lr: numbers["tuning"] for job, numbers in found.items() if job.method == method}
        best[method] = min(losses, key=lambda lr: losses[lr] if math.isfinite(losses[lr]) else math.inf)
    return best


def steps_to(losses: dict[int, float], goal: float) -> float:
    """Return after how many steps a curve is at ``goal`` for the first time; infinite if it never is."""
    points = list(losses.items())
    if points[0][1] <= goal:
        return 0.0
    for (before, high), (after, low) in itertools.pairwise(points):
        if low <= goal:
            return before + (after - before) * (high - goal) / (high - low)
    return math.inf


def _final(numbers: dict[str, Any]) -> float:
    losses: dict[int, float] = numbers["losses"]
    return losses[max(losses)]


# ----------------------------------------------------------------------------- what is made of them


def summarise(chosen: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return of each method its final losses, its steps to LoRA's final loss, seed by seed, and the median curve."""
    goals = [_final(numbers) for numbers in chosen["LoRA"]]
    found = {}
    for method, runs in chosen.items():
        steps = [steps_to(numbers["losses"], goal) for numbers, goal in zip(runs, goals, strict=True)]
        curve = {step: statistics.median(n["losses"][step] for n in runs) for step in runs[0]["losses"]}
        finals = [_final(numbers) for numbers in runs]
        found[method] = {"final": finals, "steps": steps, "curve": curve, "trained": runs[0]["trained"]}
    return found


def final_table(found: dict[str, dict[str, Any]], rates: dict[str, float]) -> str:
    """Return the table of the ends of all methods."""
    last = max(found["LoRA"]["curve"])
    rows = []
    for method, entry in found.items():
        median = statistics.median(entry["steps"])
        steps = f"{median:.0f}" if math.isfinite(median) else f"over {last}"
        by_seed = " ".join(f"{value:.0f}" if math.isfinite(value) else "-" for value in entry["steps"])
        spread = statistics.stdev(entry["final"]) if len(entry["final"]) > 1 else 0.0
        loss = f"{statistics.fmean(entry['final']):.4f} ± {spread:.4f}"
        rows.append([method, f"{entry['trained']:,}", f"{rates[method]:g}", loss, steps, by_seed])
    return table(["Method", "Trained", "Rate", "Final loss", "Steps to LoRA's", "by seed"], rows)


def curve_table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of the median losses at some steps."""
    every = list(found["LoRA"]["curve"])
    shown = [step for step in every if step in SHOWN_STEPS] if len(every) > len(SHOWN_STEPS) else every
    rows = [[method, *(f"{entry['curve'][step]:.3f}" for step in shown)] for method, entry in found.items()]
    return table(["Method", *(f"step {step}" for step in shown)], rows)


def rate_table(found: Found) -> str:
    """Return the table of the final losses of seed 0 by rate."""
    rates = sorted({job.lr for job in found})
    rows = []
    for method in METHODS:
        losses = {job.lr: _final(n) for job, n in found.items() if job.method == method and job.seed == SEEDS[0]}
        rows.append([method, *(f"{losses[lr]:.4f}" if lr in losses else "" for lr in rates)])
    return table(["Method", *(f"rate {lr:g}" for lr in rates)], rows)


def claims(found: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, bool | None]]:
    """Return a sentence for each claim, and whether it holds; ``None`` where seeds do not agree."""
    lora = found["LoRA"]
    lines, verdicts = [], {}
    for method in CLAIMS:
        entry = found[method]
        wins = [
            own < reference and final < goal
            for own, reference, final, goal in zip(
                entry["steps"], lora["steps"], entry["final"], lora["final"], strict=True
            )
        ]
        holds = True if all(wins) else None if any(wins) else False
        gain = statistics.fmean(goal - final for goal, final in zip(lora["final"], entry["final"], strict=True))
        says = "undecided" if holds is None else "yes" if holds else "no"
        where = "below" if gain > 0 else "above"
        lines.append(
            f"{method} is faster than LoRA: {says} ({sum(wins)} of {len(wins)} seeds; it ends {abs(gain):.4f} {where} "
            "LoRA on average)."
        )
        verdicts[method] = holds
    return lines, verdicts


def _edges(rates: dict[str, float], grid: tuple[float, ...]) -> str:
    """Say which methods have their best rate at the end of the grid, beyond which may be a better one."""
    low, high = ([m for m, lr in rates.items() if lr == edge and len(grid) > 1] for edge in (grid[0], grid[-1]))
    parts = [f"{', '.join(found)} at the {word}" for found, word in ((low, "lowest"), (high, "highest")) if found]
    return f"The best rate is at an end of the grid for {'; '.join(parts)}." if parts else ""


# ----------------------------------------------------------------------------- the whole


def compare(
    sizes: Sizes, seeds: tuple[int, ...], rates: tuple[float, ...], processes: int
) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the report, the result, and the summary of each method."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = pretrain(folder, sizes, processes)
        print(f"Pretrained: {start:.4f} on prose", flush=True)
        tuned = run([Job(m, seeds[0], lr, folder, sizes) for lr in rates for m in METHODS], processes)
        best = best_rates(tuned)
        rest = run([Job(m, seed, best[m], folder, sizes) for seed in seeds[1:] for m in METHODS], processes)
        every = tuned | rest
        chosen = {m: [every[Job(m, seed, best[m], folder, sizes)] for seed in seeds] for m in METHODS}
    found = summarise(chosen)
    lines, verdicts = claims(found)
    shown = ", ".join(f"{lr:g}" for lr in rates)
    text = "\n\n".join(
        [
            f"Validation loss in nats a byte after {sizes.steps} steps on prose, mean ± standard deviation over "
            f"{len(seeds)} seeds, each at its best rate of {shown}; {start:.4f} before",
            final_table(found, best),
            "Validation loss along the way, medians over the seeds",
            curve_table(found),
            "Final validation loss by rate, seed 0",
            rate_table(tuned),
            "\n".join([*lines, *filter(None, [_edges(best, rates)])]),
        ]
    )
    result = {
        "settings": {**sizes._asdict(), "seeds": list(seeds), "rates": list(rates), "pretrained": start},
        "claims": verdicts,
        "methods": {
            method: {
                "rate": best[method],
                "trained": entry["trained"],
                "final": entry["final"],
                "steps_to_lora": [value if math.isfinite(value) else None for value in entry["steps"]],
            }
            for method, entry in found.items()
        },
        "runs": [
            {
                "method": job.method,
                "seed": job.seed,
                "lr": job.lr,
                "tuning": numbers["tuning"],
                # On one line: there are many.
                "losses": " ".join(f"{step}:{loss:.4f}" for step, loss in numbers["losses"].items()),
            }
            for job, numbers in every.items()
        ],
    }
    return text, result, found


def main() -> None:
    quick = arguments(__doc__).quick
    if quick:
        text, result, found = compare(TINY, SEEDS[:1], RATES[1:2], 1)
    else:
        text, result, found = compare(SIZES, SEEDS, RATES, os.cpu_count() or 1)
    publish("peft_convergence", text, result, quick=quick)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "picture.png" if quick else _newest_result().with_suffix(".png")
        curves = {method: entry["curve"] for method, entry in found.items()}
        draw(path, curves, statistics.median(found["LoRA"]["final"]), len(found["LoRA"]["final"]))


def _newest_result() -> Path:
    """Return the path of the result that was just written."""
    results = Path(__file__).parent / "results"
    return max(results.glob("peft_convergence-*.json"), key=lambda path: path.stat().st_mtime_ns)


if __name__ == "__main__":
    main()
