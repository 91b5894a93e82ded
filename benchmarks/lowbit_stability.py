"""Which rates training in few bits bears, and whether sharpness tells before it fails.

A Llama of 0.1 million parameters (the package's causal language model) trains on the standard library's source text,
300 steps of 16 windows of 64 bytes, by AdamW with a rate that rises over 20 steps and falls by a cosine to zero: by
itself, with gradients clipped to a norm of 1, and with StableSPAM at its defaults, all called as functions in a plain
loop. (No moments are reset: that would come later than the last step.) Weights, inputs and gradients of all linear
layers but the head are quantized, in the forward product and in both backward products:

* ``e8m7``, ``e8m5``, ``e8m3``, ``e7m7``: mantissa and exponent cut as in *To FP8 and Back Again* (arXiv 2405.18710):
  low bits of the mantissa masked, no scale; ``e7m7`` saturates, and is cut to zero below its smallest value.
* ``e4m3/e5m2``: weights and inputs in the first, gradients in the second, a scale for each tensor, to the nearest.
* ``int8`` with a scale for each row, ``int4 group:128`` and ``nvfp4``: weights and inputs to the nearest, gradients
  rounded stochastically. The layers are 64 or 128 wide, so a group of 128 is a whole row, filled up with zeros.

A run *diverged* if its final validation loss is not finite or above 1.3 times that of the fp32 run by AdamW with the
same seed at its best rate. Losses are computed in the run's own format. So small a model with norms seldom explodes: a
run that has diverged here has mostly stalled. The sharpness is that of the last token's logits over the 16 windows of a
training step (closed form with epsilon 1e-3, see :mod:`lightning_stable.functional.logit_sharpness`).

The papers' claims, each with the rule by which this says yes or no; the numbers are for the cards, there is no target:

* *Mantissa cuts narrow the range of stable rates* (2405.18710): with AdamW and with clipping together, the share that
  diverged does not fall from fp32 over ``e8m7`` and ``e8m5`` to ``e8m3``, and is higher for ``e8m3`` than for fp32.
* *One bit of exponent fewer breaks training* (the same): a higher share for ``e7m7`` than for ``e8m7``.
* *Sharpness rises before training diverges* (the same): a run departs at the first ten steps from which on its training
  loss stays 5 % above the median of the runs that were kept at its rate. Its sharpness over the twenty steps before is
  compared with the median of those runs at the same steps. Yes if it is higher in two thirds of the runs; undecided
  with fewer than three runs that have such steps.
* *StableSPAM widens the range* (arXiv 2502.17055): over all formats but fp32, a smaller share diverged than with AdamW
  and with clipping.

Each run has one thread, and runs share the cores: only losses are compared, not times.
"""

import itertools
import math
import os
import statistics
from collections.abc import Iterable
from typing import Any

from _lowbit_runs import BATCH, BIN, LENGTH, MODEL, RISE, Job, train
from _pool import run_jobs
from _report import arguments, publish, table

FORMATS = ("fp32", "e8m7", "e8m5", "e8m3", "e7m7", "e4m3/e5m2", "int8", "int4 group:128", "nvfp4")
METHODS = ("AdamW", "AdamW, clipping", "StableSPAM")
SEEDS = (0, 1, 2)
# The best of AdamW in fp32, and three towards the highest that it bears.
RATES = (3e-3, 3e-2, 6e-2, 1e-1)
STEPS = 300
TOLERANCE, DEPARTURE = 1.3, 1.05
# Bins before the departure that are looked at, and how many runs it takes for a verdict.
BEFORE, ENOUGH, MOST = 2, 3, 2 / 3
SHOWN_STEPS = (20, 40, 60, 100, 150, 200, 300)

Found = dict[Job, dict[str, Any]]


def run(jobs: list[Job], processes: int) -> Found:
    """Run jobs, and say of each whether it diverged."""
    found = run_jobs(train, jobs, processes, _told)
    for job, numbers in found.items():
        own = [n for j, n in found.items() if (j.format, j.method, j.seed) == ("fp32", "AdamW", job.seed)]
        reference = min(_loss(n) for n in own)
        numbers["diverged"] = not _loss(numbers) <= TOLERANCE * reference
    return found


def _told(job: Job, numbers: dict[str, Any]) -> str:
    return f"{job.format}, {job.method}, seed {job.seed}, rate {job.lr:g}: {_loss(numbers):.4f}"


def _loss(numbers: dict[str, Any]) -> float:
    loss: float | None = numbers["validation_loss"]
    return math.inf if loss is None else loss


# ----------------------------------------------------------------------------- the tables


def chosen(found: Found, formats: Iterable[str], methods: Iterable[str]) -> list[dict[str, Any]]:
    """Return the numbers of the runs of some formats and methods."""
    formats, methods = tuple(formats), tuple(methods)
    return [numbers for job, numbers in found.items() if job.format in formats and job.method in methods]


def share(runs: list[dict[str, Any]]) -> float:
    """Return which share of runs has diverged."""
    return statistics.fmean(numbers["diverged"] for numbers in runs)


def ranges(found: Found, formats: tuple[str, ...]) -> str:
    """Return the table of the shares that diverged, in all and at each rate."""
    rates = sorted({job.lr for job in found})
    rows = []
    for name in formats:
        counts = []
        for method, lr in itertools.product(METHODS, rates):
            runs = [n for j, n in found.items() if (j.format, j.method, j.lr) == (name, method, lr)]
            counts.append(str(sum(n["diverged"] for n in runs)))
        shares = [f"{share(chosen(found, [name], [method])):.0%}" for method in METHODS]
        parts = [" ".join(counts[i : i + len(rates)]) for i in range(0, len(counts), len(rates))]
        rows.append([name, *itertools.chain.from_iterable(zip(shares, parts, strict=True))])
    shares = [f"{share(chosen(found, formats, [method])):.0%}" for method in METHODS]
    rows.append(["all", *itertools.chain.from_iterable((s, "") for s in shares)])
    head = itertools.chain.from_iterable((method, "by rate") for method in METHODS)
    return table(["Format", *head], rows)


def losses(found: Found, formats: tuple[str, ...]) -> str:
    """Return the table of the final losses at the best rate of each format and method."""
    rates = sorted({job.lr for job in found})
    rows = []
    for name in formats:
        cells = []
        for method in METHODS:
            groups = {
                lr: [_loss(n) for j, n in found.items() if (j.format, j.method, j.lr) == (name, method, lr)]
                for lr in rates
            }
            best = min(rates, key=lambda lr: statistics.fmean(groups[lr]))
            cells.append(f"{_spread(groups[best])} at {best:g}")
        rows.append([name, *cells])
    return table(["Format", *METHODS], rows)


def sharpness(found: Found, steps: int) -> str:
    """Return the table of the mean sharpness at fixed steps, of the runs of a rate that were kept and that diverged."""
    bins = {step: step // BIN - 1 for step in SHOWN_STEPS if step <= steps} or {steps: 0}
    rows = []
    for lr, diverged in itertools.product(sorted({job.lr for job in found}), (False, True)):
        runs = [n["sharpness"] for j, n in found.items() if j.lr == lr and n["diverged"] == diverged]
        if not runs:
            continue
        there = [[values[i] for values in runs if i < len(values)] for i in bins.values()]
        rows.append(
            [f"{lr:g}, {'diverged' if diverged else 'kept'}", str(len(runs)), *(f"{_mean(part):.3f}" for part in there)]
        )
    return table(["Rate", "Runs", *(f"step {step}" for step in bins)], rows)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def _spread(values: list[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "not finite"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


# ----------------------------------------------------------------------------- the claims


def rises(found: Found) -> list[dict[str, float]]:
    """Return of each diverged run that has steps before its departure where that was and how sharp it was before.

    ``ratio`` is the mean sharpness over the bins before, by the median of the runs that were kept at the same rate.
    """
    results = []
    for lr in sorted({job.lr for job in found}):
        kept = [n for j, n in found.items() if j.lr == lr and not n["diverged"]]
        if not kept:
            continue
        usual = [statistics.median(values) for values in zip(*(n["losses"] for n in kept), strict=True)]
        calm = [statistics.median(values) for values in zip(*(n["sharpness"] for n in kept), strict=True)]
        for numbers in (n for j, n in found.items() if j.lr == lr and n["diverged"]):
            departure = _departure(numbers["losses"], usual)
            if departure >= BEFORE:
                window = slice(departure - BEFORE, departure)
                ratio = statistics.fmean(numbers["sharpness"][window]) / statistics.fmean(calm[window])
                results.append({"lr": lr, "step": departure * BIN, "ratio": ratio})
    return results


def _departure(values: list[float], usual: list[float]) -> int:
    """Return the first bin from which on a run's loss stays above the usual one."""
    place = len(values)
    while place and not values[place - 1] <= DEPARTURE * usual[place - 1]:
        place -= 1
    return place


def claims(found: Found, formats: tuple[str, ...]) -> tuple[list[str], dict[str, bool | None]]:
    """Return a sentence for each claim, and whether it holds; ``None`` where there is too little to tell."""
    cuts = [name for name in ("fp32", "e8m7", "e8m5", "e8m3") if name in formats]
    shares = {name: share(chosen(found, [name], METHODS[:2])) for name in formats}
    path = [shares[name] for name in cuts]
    narrow = path == sorted(path) and path[-1] > path[0]
    low = formats[1:]
    by_method = {method: share(chosen(found, low, [method])) for method in METHODS}
    widens = by_method["StableSPAM"] < min(by_method[method] for method in METHODS[:2])
    rising = rises(found)
    above = sum(entry["ratio"] > 1 for entry in rising)
    rise = above >= MOST * len(rising) if len(rising) >= ENOUGH else None
    diverged = sum(numbers["diverged"] for numbers in found.values())
    median = f", median ratio {statistics.median(e['ratio'] for e in rising):.2f}" if rising else ""
    verdicts: dict[str, bool | None] = {"mantissa_cuts_narrow": narrow, "sharpness_rises_before": rise}
    lines = [
        f"Mantissa cuts narrow the range of stable rates: {_says(narrow)} "
        f"({', '.join(f'{name} {shares[name]:.0%}' for name in cuts)} diverged).",
        f"Sharpness rises before training diverges: {_says(rise)} (higher than in the kept runs in {above} of "
        f"{len(rising)} runs that depart{median}; {diverged} diverged in all).",
    ]
    if {"e7m7", "e8m7"} <= set(formats):
        verdicts["exponent_cut_breaks"] = breaks = shares["e7m7"] > shares["e8m7"]
        lines.append(
            f"One bit of exponent fewer breaks training: {_says(breaks)} (e7m7 {shares['e7m7']:.0%}, e8m7 "
            f"{shares['e8m7']:.0%})."
        )
    verdicts["stable_spam_widens"] = widens
    found_shares = ", ".join(f"{method} {value:.0%}" for method, value in by_method.items())
    lines.append(f"StableSPAM widens the range: {_says(widens)} ({found_shares} over all formats but fp32).")
    return lines, verdicts


def _says(holds: bool | None) -> str:
    return "undecided" if holds is None else "yes" if holds else "no"


# ----------------------------------------------------------------------------- the whole


def compare(
    formats: tuple[str, ...], seeds: tuple[int, ...], rates: tuple[float, ...], steps: int, processes: int
) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    grid = itertools.product(seeds, rates, formats, METHODS)
    found = run([Job(name, method, seed, lr, steps) for seed, lr, name, method in grid], processes)
    guessing = next(iter(found.values()))["guessing"]
    lines, verdicts = claims(found, formats)
    shown = ", ".join(f"{lr:g}" for lr in rates)
    text = "\n\n".join(
        [
            f"Share that diverged over {len(seeds)} seeds and the rates {shown}, and how many at each; {steps} steps",
            ranges(found, formats),
            "Final validation loss in nats a byte at the best rate, mean ± standard deviation over the seeds; guessing "
            f"by the frequencies of bytes has {guessing:.2f}",
            losses(found, formats),
            f"Sharpness of the last token's logits in percent, mean over all formats and methods and {BIN} steps",
            sharpness(found, steps),
            "\n".join(lines),
        ]
    )
    settings = {
        "model": MODEL,
        "batch": BATCH,
        "length": LENGTH,
        "rise": RISE,
        "steps": steps,
        "seeds": list(seeds),
        "rates": list(rates),
        "tolerance": TOLERANCE,
        "departure": DEPARTURE,
        "bin": BIN,
        "guessing": guessing,
    }
    runs = [
        {
            **{name: value for name, value in job._asdict().items() if name != "steps"},
            **{name: numbers[name] for name in ("validation_loss", "diverged")},
            # On one line each: there are thousands.
            **{name: " ".join(f"{value:.4g}" for value in numbers[name]) for name in ("losses", "sharpness")},
        }
        for job, numbers in found.items()
    ]
    return text, {"settings": settings, "claims": verdicts, "before_departure": rises(found), "runs": runs}


def main() -> None:
    options = arguments(__doc__)
    plan = (FORMATS, SEEDS, RATES, STEPS, os.cpu_count() or 1)
    if options.quick:
        plan = (("fp32", "e8m3", "int4 group:128"), (0,), (3e-3,), 4, 1)
    publish("lowbit_stability", *compare(*plan), quick=options.quick)


if __name__ == "__main__":
    main()
