"""What importing the package costs, beyond Python's start and beyond Lightning itself.

Each statement runs in a fresh process of the same interpreter; the two of a pair take turns, in an order that reverses
from round to round, and the median over the rounds is shown. Files are in the page cache and bytecode is written, as
after an installation (by a round before the first that counts). Besides elapsed time there is the processor time of
the process, which other load disturbs less. Differences and
ratios are taken within a round, between neighbours in time, and their median is reported.

Targets: ``import lightning_stable`` under 30 ms beyond Python's start, and ``from lightning_stable.callbacks import
EMA`` within 5 % of ``import lightning.pytorch``.
"""

import os
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

from _report import arguments, publish, table, verdict

STATEMENTS = {
    "start": "pass",
    "package": "import lightning_stable",
    "host": "import lightning.pytorch",
    "ema": "from lightning_stable.callbacks import EMA",
}
# What is compared with what, and how often: the short ones more often, for their times scatter more.
PAIRS = (("start", "package", 51), ("host", "ema", 9))
# Without this variable the bytecode of a source checkout is kept, as an installer keeps that of the other packages.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


class Cost(NamedTuple):
    """Seconds of one process: elapsed, and of processor time (user and system)."""

    elapsed: float
    processor: float


def measure(statement: str) -> Cost:
    """Run a statement in a fresh interpreter and return what it took."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", statement], env=_ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{statement!r} ended with exit code {process.returncode}.")
    return Cost(elapsed, usage.ru_utime + usage.ru_stime)


def collect(quick: bool) -> dict[str, list[Cost]]:
    """Measure the statements of each pair in turns."""
    costs: dict[str, list[Cost]] = {name: [] for name in STATEMENTS}
    for first, second, rounds in PAIRS:
        for index in range(-1, 1 if quick else rounds):
            for name in (first, second) if index % 2 else (second, first):
                cost = measure(STATEMENTS[name])
                if index >= 0:
                    costs[name].append(cost)
    return costs


def compare(quick: bool) -> tuple[str, dict[str, Any]]:
    """Return the report and the result."""
    costs = collect(quick)
    rows, medians = [], {}
    for name, statement in STATEMENTS.items():
        elapsed = [cost.elapsed * 1e3 for cost in costs[name]]
        processor = [cost.processor * 1e3 for cost in costs[name]]
        medians[name] = {"elapsed_ms": statistics.median(elapsed), "processor_ms": statistics.median(processor)}
        spread = f"{min(elapsed):.0f} to {max(elapsed):.0f}"
        shown = [f"{medians[name]['elapsed_ms']:.1f}", spread, f"{medians[name]['processor_ms']:.1f}"]
        rows.append([f"`{statement}`", str(len(elapsed)), *shown])
    beyond = {
        field: statistics.median(
            (getattr(ours, field) - getattr(base, field)) * 1e3
            for ours, base in zip(costs["package"], costs["start"], strict=True)
        )
        for field in Cost._fields
    }
    ratio = {
        field: statistics.median(
            getattr(ours, field) / getattr(peer, field) for ours, peer in zip(costs["ema"], costs["host"], strict=True)
        )
        for field in Cost._fields
    }
    small, near = beyond["elapsed"] < 30, ratio["elapsed"] <= 1.05
    text = "\n".join(
        [
            "Fresh processes, median, ms\n",
            table(["Statement", "Rounds", "Elapsed", "Range", "Processor"], rows),
            "",
            f"import lightning_stable beyond Python's start: {beyond['elapsed']:.1f} ms elapsed, "
            f"{beyond['processor']:.1f} ms of processor time (target: under 30 ms: {verdict(small)}).",
            f"from lightning_stable.callbacks import EMA / import lightning.pytorch: {ratio['elapsed']:.3f} elapsed, "
            f"{ratio['processor']:.3f} of processor time (target: at most 1.05: {verdict(near)}).",
        ]
    )
    result = {
        "median": medians,
        "package_beyond_start_ms": beyond,
        "ema_over_host": ratio,
        "raw": {name: [cost._asdict() for cost in found] for name, found in costs.items()},
        "targets": {"package_under_30_ms": small, "ema_within_5_percent": near},
    }
    return text, result


def main() -> None:
    options = arguments(__doc__)
    text, result = compare(options.quick)
    publish("import_time", text, result, quick=options.quick)


if __name__ == "__main__":
    main()
