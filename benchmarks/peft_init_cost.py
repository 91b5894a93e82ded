"""What starting adapters costs, in time and memory: this package's initialisers against peft's, on the same data.

Two stacks of linear layers in float32, 8 of 2048 x 2048 and 2 of 4096 x 4096, with singular values that fall like the
inverse root of their number; adapters of rank 16, alpha 16. Ours is what :class:`Adapters` does when a fit begins (a
fit of zero steps): it looks for the layers, checks them, takes fingerprints of their weights, runs the data, puts the
adapters in and starts them. peft's is ``get_peft_model`` with what its guides put before it: ``preprocess_loraga``, or
``initialize_lora_eva_weights`` after it. Both see the same batches.

* ``LoRA`` starts as peft does: what is left is the cost of ``Adapters`` itself.
* ``PiSSA`` is peft's ``pissa_niter_4``, whose search has as many directions as it keeps, beside ours of three
  iterations and 8 directions more. ``factors alone``: of adapters that are there already, without anything else.
  ``Residual`` is how much larger the Frobenius norm of what is left in the base is than the least one possible, which a
  full SVD gives.
* ``EVA`` sees 8 batches of 512 rows, which is all that both do: a threshold of 1 is never passed. ``until settled`` has
  the usual threshold and up to 64 batches; each side stops where it finds its own components settled. A good part of
  both times is that of the layers, through which batches have to pass; peft passes the first one twice.
* ``LoRA-GA`` takes the gradient of 4 batches of 32 rows.
* LoLDU and SVFit have no peer in peft.

Times are processor time with one thread; both sides take turns in one process, in an order that is reversed from round
to round. The ratio is that of neighbours; the tables have medians over the rounds. EVA, LoRA-GA and OLoRA run in every
other round, full SVDs and EVA until settled once.

Memory is the largest resident size of a process while adapters are put in, minus that before, in a process for each
measurement that loaded all libraries and adapted a tiny stack before. It includes the adapters. ``LoRA-GA`` is in units
of one layer's gradient. Ours sums gradients in the CPU's memory, and has one at a time on the device: on a CPU, the
only device here, both are one memory. So the sums are subtracted for the device's part, and both numbers are given.

Targets: PiSSA within 1.1 times of peft's ``pissa_niter_4`` with a smaller residual; EVA at most half of peft's time on
the same batches, and no more memory for 16 batches than for 4, within one batch; LoRA-GA at most two layers' gradients.
"""

import gc
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from _peft_init_jobs import CASES, RANK, ROWS, Case, Stack, Trial, by_peft, ours, passing, peak, quiet, seconds, weights
from _report import arguments, publish, table, verdict

STACKS = ((8, 2048), (2, 4096))
ROUNDS = 6
FULL = "PiSSA, full SVD"
EVA = {count: f"EVA, {count} batches" for count in (4, 8, 16)}
TIMED = tuple(name for name in CASES if name not in (EVA[4], EVA[16]))
WEIGHED = ("PiSSA", *EVA.values(), "LoRA-GA", "OLoRA", "LoLDU", "SVFit")
PISSA_TARGET, EVA_TARGET, GRADIENT_TARGET = 1.1, 0.5, 2.0
MIB = 2.0**20


class Plan(NamedTuple):
    """How much to measure.

    Attributes:
        stacks: Number and width of the layers of each stack.
        rounds: Repeats of each time at most.
        rows: Rows of a batch, for initialisers that see data.
        processes: Measurements of memory at once, each in a process of its own; 0 for this process.
    """

    stacks: tuple[tuple[int, int], ...]
    rounds: int
    rows: dict[str, int]
    processes: int


Times = dict[str, dict[str, list[Trial]]]


def _sides(case: Case) -> dict[str, Any]:
    return {"ours": ours} if case.peer is None else {"peft": by_peft, "ours": ours}


def measure_times(count: int, width: int, plan: Plan) -> Times:
    """Return the trials of each case and side."""
    tiny, parameters = weights(2, 64), weights(count, width)
    times: Times = {name: {side: [] for side in _sides(CASES[name])} for name in TIMED}
    for name in TIMED:
        for adapt in _sides(CASES[name]).values():
            seconds(adapt, CASES[name], Stack(tiny), min(_rows(name, plan), 48))  # loads what is loaded once
    gc.freeze()
    for index in range(plan.rounds):
        for name in TIMED[:: -1 if index % 2 else 1]:
            if index % CASES[name].every:
                continue
            for side, adapt in list(_sides(CASES[name]).items())[:: -1 if index % 2 else 1]:
                times[name][side].append(seconds(adapt, CASES[name], Stack(parameters), _rows(name, plan)))
        print(f"{count} x {width}: round {index + 1} of {plan.rounds} done", flush=True)
    return times


def measure_memory(plan: Plan) -> dict[tuple[str, str, int], float]:
    """Return the bytes of each case, side and width."""
    jobs = {
        (name, side, width): (name, side == "ours", count, width, _rows(name, plan))
        for name in WEIGHED
        for side in _sides(CASES[name])
        for count, width in plan.stacks
    }
    if plan.processes == 0:
        return dict(zip(jobs, map(peak, jobs.values()), strict=True))
    # Freed memory goes back to the system at once, or resident memory would show what came before.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with multiprocessing.get_context("spawn").Pool(plan.processes, maxtasksperchild=1) as pool:
        return dict(zip(jobs, pool.imap(peak, jobs.values()), strict=True))


def _rows(name: str, plan: Plan) -> int:
    return plan.rows.get(CASES[name].init, 1)


# ----------------------------------------------------------------------------- what is made of them


def medians(times: Times) -> dict[str, dict[str, Any]]:
    """Return of each case the median times, the ratio with its range, residuals, and batches seen."""
    found: dict[str, dict[str, Any]] = {}
    least = min(trial.residual for trials in times[FULL].values() for trial in trials)
    for name, sides in times.items():
        entry: dict[str, Any] = {side: statistics.median(t.seconds for t in trials) for side, trials in sides.items()}
        if "peft" in sides:
            ratios = [own.seconds / other.seconds for own, other in zip(sides["ours"], sides["peft"], strict=True)]
            entry |= {"ratio": statistics.median(ratios), "ratios": ratios}
        if CASES[name].init == "pissa":
            entry["excess"] = {s: statistics.median(t.residual for t in ts) / least - 1 for s, ts in sides.items()}
        entry["passes"] = {side: trials[0].passes for side, trials in sides.items()}
        found[name] = entry
    return found


def times_table(found: dict[str, dict[str, Any]]) -> str:
    """Return the table of the times on one stack."""
    rows = []
    for name, entry in found.items():
        ratio = ""
        if "ratio" in entry:
            ratio = f"{entry['ratio']:.2f}"
            ratio += f" ({min(entry['ratios']):.2f} to {max(entry['ratios']):.2f})" if len(entry["ratios"]) > 1 else ""
        excess = [f"{entry['excess'][side]:.1e}" if "excess" in entry else "" for side in ("peft", "ours")]
        peft = f"{entry['peft']:.3f}" if "peft" in entry else ""
        rows.append([name, peft, f"{entry['ours']:.3f}", ratio, *excess])
    return table(["Start", "peft, s", "Ours, s", "Ours / peft", "Residual, peft", "Residual, ours"], rows)


def memory_table(memory: dict[tuple[str, str, int], float], plan: Plan) -> str:
    """Return the table of the memory."""
    rows = []
    for name in WEIGHED:
        cells = []
        for _, width in plan.stacks:
            for side in ("peft", "ours"):
                bytes_ = memory.get((name, side, width))
                cells.append("" if bytes_ is None else f"{bytes_ / MIB:.0f}")
        rows.append([name, *cells])
    heads = [f"{side}, {count} x {width}²" for count, width in plan.stacks for side in ("peft", "Ours")]
    return table(["Start", *heads], rows)


def gradients(memory: dict[tuple[str, str, int], float], plan: Plan) -> list[dict[str, float]]:
    """Return of each stack how many layers' gradients LoRA-GA takes, and ours beside the sums on the CPU."""
    found = []
    for count, width in plan.stacks:
        peft, own = (memory["LoRA-GA", side, width] / (4.0 * width * width) for side in ("peft", "ours"))
        found.append({"layers": count, "width": width, "peft": peft, "ours": own, "beside_sums": own - count})
    return found


def _verdicts(
    results: list[dict[str, dict[str, Any]]], memory: dict[tuple[str, str, int], float], plan: Plan
) -> Iterator[tuple[str, bool, str]]:
    """Yield name, outcome and words of each target."""
    ratios = [found["PiSSA"]["ratio"] for found in results]
    alone = [found["PiSSA, factors alone"]["ratio"] for found in results]
    smaller = all(found["PiSSA"]["excess"]["ours"] < found["PiSSA"]["excess"]["peft"] for found in results)
    fast = max(ratios) <= PISSA_TARGET
    yield "pissa_time", fast, f"PiSSA within {PISSA_TARGET} of peft's time: {_list(ratios)}; alone {_list(alone)}"
    yield "pissa_residual", smaller, "PiSSA's residual smaller than peft's"
    ratios = [found[EVA[8]]["ratio"] for found in results]
    yield "eva_time", max(ratios) <= EVA_TARGET, f"EVA at most {EVA_TARGET} of peft's time: {_list(ratios)}"
    grown = [_growth(memory, side, plan) for side in ("ours", "peft")]
    words = f"EVA with 16 batches no more memory than with 4: {_list(grown[0])} batches more (peft {_list(grown[1])})"
    yield "eva_memory", max(grown[0]) <= 1, words
    units = gradients(memory, plan)
    in_all, beside, peft = ([unit[key] for unit in units] for key in ("ours", "beside_sums", "peft"))
    words = f"LoRA-GA at most {GRADIENT_TARGET:.0f} gradients on the device, beside the sums: {_list(beside)}"
    yield "lora_ga_memory_on_the_device", max(beside) <= GRADIENT_TARGET, words
    words = f"LoRA-GA at most {GRADIENT_TARGET:.0f} gradients with the sums: {_list(in_all)} (peft {_list(peft)})"
    yield "lora_ga_memory_in_all", max(in_all) <= GRADIENT_TARGET, words


def _growth(memory: dict[tuple[str, str, int], float], side: str, plan: Plan) -> list[float]:
    """Return how many batches' memory 16 batches take more than 4, of each stack."""
    return [
        (memory[EVA[16], side, width] - memory[EVA[4], side, width]) / (4.0 * plan.rows["eva"] * width)
        for _, width in plan.stacks
    ]


def _list(values: list[float]) -> str:
    return " and ".join(f"{value:.2f}" for value in values)


def compare(plan: Plan) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    quiet()
    torch.set_num_threads(1)
    times = [measure_times(count, width, plan) for count, width in plan.stacks]
    forward = [
        passing(Stack(weights(count, width)), CASES[EVA[8]].batches, plan.rows["eva"]) for count, width in plan.stacks
    ]
    memory = measure_memory(plan)
    results = [medians(each) for each in times]
    parts = []
    for (count, width), found, alone in zip(plan.stacks, results, forward, strict=True):
        passes = found["EVA, until settled"]["passes"]
        parts.append(
            f"Processor time, {count} layers of {width} x {width}, at most {plan.rounds} rounds\n\n"
            f"{times_table(found)}\n\nThe layers alone take {alone:.3f} s for EVA's 8 batches. EVA was "
            f"settled after {passes['ours']} batches of ours and {passes['peft'] - 1} of peft's."
        )
    judged = list(_verdicts(results, memory, plan))
    parts += [
        f"Most memory in use beyond the weights, MiB\n\n{memory_table(memory, plan)}",
        "\n".join(f"{words}: {verdict(met)}." for _, met, words in judged),
    ]
    result = {
        "settings": {"stacks": plan.stacks, "rounds": plan.rounds, "rank": RANK, "rows": plan.rows},
        "times": [
            {"layers": count, "width": width, "cases": found, "layers_alone_seconds": alone}
            for (count, width), found, alone in zip(plan.stacks, results, forward, strict=True)
        ],
        "memory_bytes": [{"case": c, "side": s, "width": w, "bytes": value} for (c, s, w), value in memory.items()],
        "lora_ga_gradients": gradients(memory, plan),
        "targets": {name: met for name, met, _ in judged},
    }
    return "\n\n".join(parts), result


def main() -> None:
    plan = Plan(STACKS, ROUNDS, ROWS, os.cpu_count() or 1)
    if arguments(__doc__).quick:
        plan = Plan(((2, 64),), 1, {"eva": 48, "lora_ga": 16}, 0)
    publish("peft_init_cost", *compare(plan), quick=plan.stacks != STACKS)


if __name__ == "__main__":
    main()
