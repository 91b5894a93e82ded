"""How fast training runs when a slow link joins two workers: CO2 against no communication, DDP and blocking averages.

Two network namespaces are joined by a pair of virtual devices that a token bucket limits in both directions. One worker
trains in each, with one thread, by a real ``Trainer`` (``num_nodes=2, devices=1``, gloo over the link): the package's
causal language model of 0.9 million parameters on sequences of 128 bytes of the standard library. It needs root and
iproute2, and ends with an error without them (``--quick`` then runs over the loopback, without limits).

* ``no communication``: both workers train at the same time, each alone.
* ``DDP``: the host's, gradients averaged at each step.
* ``LocalSGD``, ``DiLoCo``, ``CO2``: this package's strategies with the same local steps; the first two wait for the
  exchange, CO2 does not.
* ``host's post-local SGD``: DDPStrategy with PostLocalSGDState and ``model_averaging_period``. Its hook is for GPUs:
  on a CPU nothing says so and gradients are averaged at each step. The table of bytes shows what it did.
* ``torchft DiLoCo``, and ``delayed`` by a quarter of the local steps, as in its example: measured if torchft can be
  imported, and named as missing if not. The delayed one discards the steps made during the delay.

A rate is that of whole rounds after a first one (two of CO2, one of the others), summed over the workers; for methods
that communicate at each step, of nine steps after the first ones. Methods take turns, in an order that reverses from
repeat to repeat; a repeat's rate is divided by that of no communication in the same repeat, and medians are shown. The
transfer is one bare all-reduce of all parameters in float32.

Targets: where the local steps take longer than the transfer, CO2 has at least 0.95 of the rate without communication,
and more than every peer.

A second part shows what a slow worker does to the other one. The host broadcasts from rank 0 at every batch, so that
its strategies tie the workers together at each step even if they exchange nothing (``host's loop, local``: its DDP
strategy without the wrapping). In *one slow*, worker 1 stalls before each step, and what counts is a step of worker 0
within a round. In *in turns* each worker stalls before every other step, when the other one does not: over a round both
lose the same, and a method that ties them only at its end loses nothing further. Targets: within 10 % of workers on
their own.
"""

import statistics
import sys
from typing import Any

from _namespaces import Link, problem
from _pair import Pair
from _report import arguments, publish, table, verdict

LINKS = (1000, 200, 100, 50, 20)  # Mbit/s
TAU, BATCH, REPEATS, ROUNDS = 24, 6, 3, 2
# Steps left out and counted of methods that communicate at each step, and left out of no communication.
STEPS_OF_DDP, STEPS_TO_WARM_UP = (3, 9), 8
ALONE, OURS = "no communication", "CO2"
EACH_STEP = ("DDP", "host's post-local SGD")
BLOCKING = ("LocalSGD", "DiLoCo")
TORCHFT = ("torchft DiLoCo", "torchft DiLoCo, delayed")
TARGET = 0.95
TIED = ("DDP", "host's loop, local", "LocalSGD", "CO2")
STALL, STALL_BATCH, SLACK = 0.1, 2, 1.10


def windows(method: str, tau: int, rounds: int) -> tuple[int, int]:
    """Return the number of steps that a fit leaves out, and of those that count."""
    if method in EACH_STEP:
        return STEPS_OF_DDP
    if method == ALONE:
        return min(tau, STEPS_TO_WARM_UP), tau * rounds
    return tau, tau * (rounds if method == OURS else 1)


def measure(pair: Pair, method: str, tau: int, rounds: int, batch: int, **settings: Any) -> dict[str, Any]:
    """Run one fit on both workers.

    Returns:
        ``rate`` in samples a second of both workers, ``seconds`` of a step, ``sent``: 10^6 bytes a worker sends for a
        step, and ``differ``: whether the workers' weights differ within a round.
    """
    skipped, counted = windows(method, tau, rounds)
    steps = skipped + counted
    found = pair.run("_overlap_jobs:fit", method=method, tau=tau, steps=steps, batch=batch, **settings)
    seconds = [(run["ends"][steps - 1] - run["ends"][skipped - 1]) / counted for run in found]
    return {
        "rate": sum(batch / each for each in seconds),
        "seconds": max(seconds),
        # A step earlier, when no exchange has just been launched and none is under way.
        "sent": max(run["sent"][steps - 2] - run["sent"][skipped - 2] for run in found) / counted / 1e6,
        "differ": found[0]["weights"] != found[1]["weights"],
    }


def compare(pair: Pair, methods: list[str], plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measure all methods in turns over the present link; return medians, and shares of no communication."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for number in range(plan["repeats"]):
        for method in methods if number % 2 == 0 else reversed(methods):
            settings = {"quick": plan["quick"]}
            runs[method].append(measure(pair, method, plan["tau"], plan["rounds"], plan["batch"], **settings))
    found = {}
    for method, each in runs.items():
        shares = [run["rate"] / alone["rate"] for run, alone in zip(each, runs[ALONE], strict=True)]
        found[method] = {
            **{key: statistics.median(run[key] for run in each) for key in ("rate", "seconds", "sent")},
            "share": statistics.median(shares),
            "shares": shares,
            "differ": each[0]["differ"],
        }
    return found


def stalls(pair: Pair, plan: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measure what stalls of one worker do to the other one.

    Returns:
        For each method ``step``, seconds of a step of worker 0 within a round while worker 1 stalls, and ``rate``, in
        samples a second of both workers, while they stall in turns.
    """
    found: dict[str, dict[str, float]] = {}
    # A second round counts, also for methods that exchange at each step.
    tau, skipped, steps = plan["tau"], plan["tau"], 2 * plan["tau"]
    for method in (ALONE, *plan["tied"]):
        ends = {}
        for who in ("one", "turns"):
            settings = {"stalls": {"who": who, "seconds": STALL}, "quick": plan["quick"]}
            runs = pair.run("_overlap_jobs:fit", method=method, tau=tau, steps=steps, batch=STALL_BATCH, **settings)
            ends[who] = [run["ends"] for run in runs]
        first = ends["one"][0]
        rounds = [(each[steps - 1] - each[skipped - 1]) / tau for each in ends["turns"]]
        found[method] = {
            "step": (first[steps - 2] - first[skipped - 1]) / (tau - 1),
            "rate": sum(STALL_BATCH / each for each in rounds),
        }
    return found


def report_rates(links: dict[str, Any], methods: list[str]) -> str:
    """Return the tables of rates and shares with the targets."""
    others = [method for method in methods if method not in (ALONE, OURS)]
    rows, shares, targets = [], [], []
    for name, link in links.items():
        found, round_seconds = link["methods"], link["round_seconds"]
        times = [f"{link['transfer_seconds']:.3f}", f"{round_seconds:.2f}"]
        rows.append([name, *times, *(f"{found[method]['rate']:.1f}" for method in methods)])
        shares.append([name, *(f"{found[method]['share']:.2f}" for method in [*others, OURS])])
        hidden = round_seconds >= link["transfer_seconds"]
        best = max(others, key=lambda method: found[method]["rate"])
        ahead = found[OURS]["rate"] > found[best]["rate"]
        link["targets"] = {"hidden": hidden, "rate": found[OURS]["share"] >= TARGET, "ahead": ahead}
        ours = (
            f"CO2 has {found[OURS]['share']:.3f} ({verdict(found[OURS]['share'] >= TARGET)}), the best peer, {best}, "
            f"{found[best]['share']:.3f} (ahead of it: {verdict(ahead)}); DDP {found['DDP']['share']:.3f}"
        )
        targets.append(f"{name}: {ours}" if hidden else f"{name}: a round does not hide the transfer, no target")
    return "\n\n".join(
        [
            "Samples a second of both workers; seconds of one transfer and of the local steps of a round",
            table(["link", "transfer", "a round", *methods], rows),
            "Share of the rate without communication",
            table(["link", *others, OURS], shares),
            f"Targets: at least {TARGET} of the rate without communication, and more than every peer.\n"
            + "\n".join(targets),
        ]
    )


def report_bytes(link: dict[str, Any], methods: list[str]) -> str:
    """Return the table of what was sent, over one of the links, and what the host's post-local SGD did."""
    found = link["methods"]
    rows = [[m, "yes" if found[m]["differ"] else "no", f"{found[m]['sent']:.3f}"] for m in methods]
    text = table(["method", "weights differ within a round", "MB sent a step and worker"], rows)
    host = found.get("host's post-local SGD")
    if host is not None:
        did = "keeps local weights within a round" if host["differ"] else "averages gradients at each step, as DDP does"
        text += f"\n\nThe host's post-local SGD, on this CPU, {did}."
    return text


def report_stalls(found: dict[str, dict[str, float]]) -> str:
    """Return the table of the part with a slow worker."""
    rows = []
    for method, mine in found.items():
        times, share = mine["step"] / found[ALONE]["step"], mine["rate"] / found[ALONE]["rate"]
        ours = method in ("LocalSGD", "CO2")
        met = (f" ({verdict(times <= SLACK)})", f" ({verdict(share >= 1 / SLACK)})") if ours else ("", "")
        rows.append(
            [
                method,
                f"{1e3 * mine['step']:.0f}",
                f"{times:.2f}{met[0]}",
                f"{mine['rate']:.1f}",
                f"{share:.2f}{met[1]}",
            ]
        )
    head = ["method", "one slow: ms a step of the other", "of on its own", "in turns: samples/s", "of on their own"]
    return f"Workers that stall for {1e3 * STALL:.0f} ms\n\n{table(head, rows)}"


def run(link: Link | None, plan: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Measure everything; return the report and the result."""
    with Pair(link) as pair:
        facts = pair.run("_overlap_jobs:start")[0]
        missing = facts["torchft"]
        methods = [*plan["methods"], *(() if missing or plan["quick"] else TORCHFT)]
        links: dict[str, Any] = {}
        for megabits in plan["links"]:
            if link is not None:
                link.limit(megabits)
            seconds = pair.run("_overlap_jobs:transfer", numel=facts["parameters"], repeats=5)
            found = compare(pair, methods, plan)
            links[f"{megabits} Mbit/s" if link else "loopback"] = {
                "transfer_seconds": statistics.median(max(both) for both in zip(*seconds, strict=True)),
                "round_seconds": plan["tau"] * found[ALONE]["seconds"],
                "methods": found,
            }
            print(
                megabits,
                "Mbit/s, samples/s:",
                {method: round(found[method]["rate"], 1) for method in methods},
                flush=True,
            )
        if link is not None:
            link.limit(max(plan["links"]))
        stalled = stalls(pair, plan)
    peer = f"torchft is not measured: {missing}." if missing else "torchft is measured." if not plan["quick"] else ""
    text = "\n\n".join([report_rates(links, methods), report_bytes(links[next(iter(links))], methods), peer])
    text += "\n\n" + report_stalls(stalled)
    return text, {"settings": {**plan, **facts, "stall": STALL}, "links": links, "stalls": stalled}


def main() -> None:
    quick = arguments(__doc__).quick
    reason = problem()
    if reason is not None and not quick:
        sys.exit(f"co2_overlap limits a link between two network namespaces, which cannot be done here: {reason}.")
    plan: dict[str, Any] = {"tau": TAU, "batch": BATCH, "repeats": REPEATS, "rounds": ROUNDS, "quick": quick}
    plan |= {"links": LINKS, "methods": [ALONE, OURS, *BLOCKING, *EACH_STEP], "tied": TIED}
    if quick:
        plan |= {"tau": 6, "batch": 1, "repeats": 1, "rounds": 1, "links": LINKS[:1], "methods": [ALONE, "DDP", OURS]}
        plan |= {"tied": (OURS,)}
    if reason is None:
        with Link() as link:
            text, result = run(link, plan)
    else:
        text, result = run(None, plan)
        text += f"\n\nOver the loopback, without limits: {reason}."
    publish("co2_overlap", text, result, quick=quick)


if __name__ == "__main__":
    main()
