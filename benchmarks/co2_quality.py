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
import os
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _co2_quality_runs import BATCH, DDP, LOCAL_SGD, MODEL, RISE, Job, Method, train
from _pool import run_jobs
from _report import arguments, publish, table

SEEDS, SCREENING_SEED = (0, 1, 2), 100
STEPS = 384
TASKS = ("text", "digits")
LR = {"text": 3e-3, "digits": 3e-3}
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


# ----------------------------------------------------------------------------- the plans


def run(jobs: Iterable[Job], processes: int) -> dict[Job, float]:
    """Run the jobs, those of DDP first, as the others' warm-up is theirs; return the losses."""
    jobs = list(dict.fromkeys(jobs))
    with tempfile.TemporaryDirectory() as folder:
        job_of = functools.partial(train, snapshots=Path(folder))
        losses = run_jobs(job_of, [job for job in jobs if job.method == DDP], processes, _told)
        return losses | run_jobs(job_of, [job for job in jobs if job.method != DDP], processes, _told)


def _told(job: Job, loss: float) -> str:
    return (
        f"{job.task}, {job.method}, {job.local_steps} local steps, {job.workers} workers, warm-up {job.warmup}, seed "
        f"{job.seed}, rate {job.lr:g}: {loss:.4f}"
    )


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
