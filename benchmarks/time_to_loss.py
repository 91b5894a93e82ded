"""How long it takes to reach DDP's final loss when a slow link joins two workers.

Two measurements together. How long a step takes, for each method and link, is read from the newest result of
``co2_overlap.py``, which has to be run first. What a step is worth is simulated here: the same language model, workers,
batches and local steps, with the simulation of ``co2_quality.py``, which a test holds to the strategies.

DDP trains for 192 steps, and its validation loss at the end is the goal. The other methods may train longer: 1, 1.25,
1.5 and 2 times as many steps, each run with a schedule of its own length (a rise over 20 steps, a cosine to zero, as
DDP's), and the shortest run counts that ends with at most that loss. No run is cut short: within a longer schedule
any method, DDP too, is past a loss sooner than at the end of a short one. Each method is tried from scratch and after
24 synchronous steps, which take as long as DDP's; CO2 in both variants, DiLoCo with our settings and its paper's; and
what counts is the shortest time.

Time = synchronous steps x DDP's seconds a step + further steps x the method's seconds a step + the exchanges at the
end. Start-up is left out, for all methods. One seed, and coarse lengths: differences of a few percent are chance.

Targets: where DDP's rate is under 0.3 of no communication, CO2 reaches the goal in at most half of DDP's time; where
the transfer takes at least half of the local steps, it does so before LocalSGD and DiLoCo.
"""

import functools
import json
import math
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from _co2_quality_runs import DDP, LOCAL_SGD, Method, Rounds, Worker, load
from _report import arguments, publish, table, verdict
from co2_quality import CHOSEN, DILOCO, PAPER

STEPS, LENGTHS = 192, (1.0, 1.25, 1.5, 2.0)
LR, RISE, SEED = 3e-3, 20, 0
WARMUPS = (0, 1 / 8)  # of DDP's steps
METHODS = {
    "LocalSGD": (LOCAL_SGD,),
    "DiLoCo": (DILOCO, Method("DiLoCo", outer_lr=0.7, outer_momentum=0.9)),
    "CO2": (CHOSEN, PAPER),
}
# At the end CO2 waits for the exchange under way, and then all average what is left.
EXCHANGES_AT_END = {"LocalSGD": 1, "DiLoCo": 1, "CO2": 2}
OURS, SLOW, HALF = "CO2", 0.3, 0.5
TINY = {"model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


class Setup(NamedTuple):
    """What all runs share.

    Attributes:
        workers: How many.
        batch: Sequences a worker takes for a step.
        local_steps: Of a round.
        steps: Steps of DDP.
        lengths: How long other runs are, in steps of DDP.
        tiny: Train the smallest model there is.
    """

    workers: int
    batch: int
    local_steps: int
    steps: int
    lengths: tuple[float, ...]
    tiny: bool


class Run(NamedTuple):
    """How a method came to the goal.

    Attributes:
        method: How it was trained.
        warmup: Synchronous steps.
        reached: Steps of the run that did, None if none did.
        losses: The validation loss at the end of each run, by its length.
    """

    method: Method
    warmup: int
    reached: int | None
    losses: dict[float, float]


# ----------------------------------------------------------------------------- the simulation


@functools.cache
def task(tiny: bool) -> Any:
    """Return the text, and how to build the model of ``co2_overlap.py``."""
    from lightning_stable.recipes.causal_lm import CausalLM

    return load("text")._replace(build=lambda: CausalLM({**TINY, "num_attention_heads": 2} if tiny else None))


def train(setup: Setup, method: Method, warmup: int, steps: int) -> float:
    """Train, and return the validation loss at the end."""
    import torch

    torch.manual_seed(SEED)
    text, batches = task(setup.tiny), _batches(setup, steps)
    workers, rounds = [Worker(text.build(), clip=1.0)], None
    for step in range(steps):
        lr = LR * min(1.0, (step + 1) / RISE) * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        if method != DDP and step == warmup:
            rounds = _begin(setup, method, workers)
        for worker, part in zip(workers, batches[step].chunk(len(workers)), strict=True):
            worker.step(functools.partial(text.loss, indices=part), lr)
        if rounds is not None and (step + 1 - warmup) % setup.local_steps == 0:
            rounds.end(lr)
    if rounds is not None:
        rounds.consolidate()
    workers[0].module.eval()
    with torch.no_grad():
        loss: float = text.evaluate(workers[0].module)
    return loss


def _batches(setup: Setup, steps: int) -> Any:
    """Return the indices of the samples of each step, the same for all methods."""
    import torch

    wanted, samples = setup.workers * setup.batch * steps, task(setup.tiny).samples
    generator = torch.Generator().manual_seed(SEED)
    epochs = [torch.randperm(samples, generator=generator) for _ in range(-(-wanted // samples))]
    return torch.cat(epochs)[:wanted].view(steps, -1)


def _begin(setup: Setup, method: Method, workers: list[Worker]) -> Rounds:
    """Add the other workers, equal to the first one, and begin the first round."""
    for _ in range(setup.workers - 1):
        workers.append(Worker(task(setup.tiny).build(), clip=1.0))
        workers[-1].load(workers[0].state())
    return Rounds(method, workers)


def reach(setup: Setup, method: Method, warmup: int, goal: float) -> Run:
    """Train longer and longer until a run ends at the goal or below it."""
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    losses: dict[float, float] = {}
    for length in setup.lengths:
        steps = int(length * setup.steps)
        losses[length] = train(setup, method, warmup, steps)
        if losses[length] <= goal:
            return Run(method, warmup, steps, losses)
    return Run(method, warmup, None, losses)


def simulate(setup: Setup, processes: int) -> tuple[float, dict[str, list[Run]]]:
    """Return DDP's final loss, and the runs of the other methods."""
    alone = setup._replace(lengths=(1.0,))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        goal = pool.submit(reach, alone, DDP, 0, -math.inf).result().losses[1.0]
        print(f"DDP: {goal:.4f} after {setup.steps} steps", flush=True)
        warmups = [int(share * setup.steps) for share in WARMUPS]
        waiting = {
            name: [pool.submit(reach, setup, method, warmup, goal) for method in methods for warmup in warmups]
            for name, methods in METHODS.items()
        }
        return goal, {name: [each.result() for each in futures] for name, futures in waiting.items()}


# ----------------------------------------------------------------------------- the times


def newest_rates() -> dict[str, Any] | None:
    """Return the newest result of ``co2_overlap.py``, None if there is none."""
    found = sorted((Path(__file__).parent / "results").glob("co2_overlap-*.json"), key=lambda path: path.name)
    result: dict[str, Any] | None = json.loads(found[-1].read_text()) if found else None
    return result


def seconds(run: Run, name: str, link: dict[str, Any]) -> float:
    """Return how long a run takes to the goal over a link, infinite if it does not reach it."""
    if run.reached is None:
        return math.inf
    step, synchronous = (float(link["methods"][each]["seconds"]) for each in (name, "DDP"))
    local = run.reached - run.warmup
    at_end = EXCHANGES_AT_END[name] * float(link["transfer_seconds"])
    return run.warmup * synchronous + local * step + at_end


def times(setup: Setup, runs: dict[str, list[Run]], link: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each method the shortest time over a link, and the run that has it."""
    found: dict[str, dict[str, Any]] = {
        "DDP": {"seconds": setup.steps * link["methods"]["DDP"]["seconds"], "run": "DDP"}
    }
    for name in METHODS:
        best = min(runs[name], key=lambda run: seconds(run, name, link))
        found[name] = {"seconds": seconds(best, name, link), "run": _words(best)}
    return found


def _words(run: Run) -> str:
    reached = "not reached" if run.reached is None else f"{run.reached} steps"
    return f"{run.method}, {f'{run.warmup} synchronous' if run.warmup else 'from scratch'}, {reached}"


def report(setup: Setup, goal: float, runs: dict[str, list[Run]], links: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the report and the times."""
    losses = [
        [_words(run), *(f"{run.losses[length]:.3f}" if length in run.losses else "" for length in setup.lengths)]
        for name in METHODS
        for run in runs[name]
    ]
    rows, targets, found = [], [], {}
    for name, link in links.items():
        mine = found[name] = times(setup, runs, link)
        ours, ddp = mine[OURS]["seconds"], mine["DDP"]["seconds"]
        share = link["methods"]["DDP"]["share"]
        shown = ["" if math.isinf(each["seconds"]) else f"{each['seconds']:.0f}" for each in mine.values()]
        rows.append([name, f"{share:.2f}", *shown, "" if math.isinf(ours) else f"{ours / ddp:.2f}"])
        if share < SLOW:
            targets.append(f"{name}, half of DDP's time: {verdict(ours <= HALF * ddp)} ({mine[OURS]['run']})")
        if link["transfer_seconds"] >= HALF * link["round_seconds"]:
            for peer in ("LocalSGD", "DiLoCo"):
                targets.append(f"{name}, before {peer}: {verdict(ours < mine[peer]['seconds'])}")
    text = "\n\n".join(
        [
            f"DDP ends with a validation loss of {goal:.4f} after {setup.steps} steps; the others with, after so many "
            "times the steps",
            table(["run", *(f"{length:g} x" for length in setup.lengths)], losses),
            "Seconds to that loss, empty if not reached",
            table(["link", "DDP's share", "DDP", *METHODS, "CO2 / DDP"], rows),
            f"Targets: where DDP has less than {SLOW} of the rate without communication, CO2 takes at most half of\n"
            "its time; where the transfer takes half of the local steps, CO2 is before LocalSGD and DiLoCo.\n"
            + "\n".join(targets or ["There is no such link."]),
        ]
    )
    return text, found


def example() -> dict[str, Any]:
    """Return made-up rates for the smoke test, in the form of a result of ``co2_overlap.py``."""
    step = {"DDP": 1.0, "LocalSGD": 0.2, "DiLoCo": 0.2, "CO2": 0.1}
    methods = {name: {"seconds": each, "share": 0.1 / each} for name, each in step.items()}
    link = {"transfer_seconds": 0.3, "round_seconds": 0.4, "methods": methods}
    return {"settings": {"batch": 2, "tau": 4}, "links": {"made-up": link}}


def main() -> None:
    quick = arguments(__doc__).quick
    rates = example() if quick else newest_rates()
    if rates is None:
        sys.exit("time_to_loss needs the rates of each method: run co2_overlap first (make bench-co2_overlap).")
    batch, tau = rates["settings"]["batch"], rates["settings"]["tau"]
    setup = Setup(2, batch, tau, 8 if quick else STEPS, LENGTHS[:1] if quick else LENGTHS, quick)
    goal, runs = simulate(setup, 1 if quick else os.cpu_count() or 1)
    text, found = report(setup, goal, runs, rates["links"])
    settings = {**setup._asdict(), "lr": LR, "seed": SEED, "rates_of": rates.get("date"), "goal": goal}
    results = {name: [{**run._asdict(), "method": str(run.method)} for run in each] for name, each in runs.items()}
    publish("time_to_loss", text, {"settings": settings, "times": found, "runs": results}, quick=quick)


if __name__ == "__main__":
    main()
