"""Pictures of what StabilityGap, NumericsMonitor and strategies with local steps have found."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning_stable._report.draw import COLORS, Chart, HeatMap, Line, Panel
from lightning_stable._report.run import Points, Run, finite, median

__all__ = ["gap_charts", "gap_table", "numerics_maps", "numerics_table", "round_facts"]

_WEIGHTS = {"live": "live weights", "ema": "averaged weights"}
_MOST_TASKS, _MOST_LAYERS, _MOST_COLUMNS = 8, 40, 160
_OPERANDS = ("weights", "activations", "gradients")
_SHARES = {"underflow": "share that became 0", "saturation": "share beyond the largest"}


def gap_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the curves of each task: of one run its weight sets, of several the runs, with averages where they are."""
    tasks: dict[int, str] = {}
    for run in runs:
        tasks.update(run.gap.get("names", {}))
    panels: list[Panel] = []
    for task in sorted(tasks)[:_MOST_TASKS]:
        lines: list[Line] = []
        for place, run in enumerate(run for run in runs if run.gap):
            curves: dict[str, dict[int, Points]] = run.gap["curves"]
            shown = [weights for weights in ("live", "ema") if task in curves.get(weights, {})]
            for weights in shown if len(runs) == 1 else shown[-1:]:
                color = COLORS[1 if weights == "live" else 0] if len(runs) == 1 else COLORS[place % len(COLORS)]
                label = _WEIGHTS[weights] if len(runs) == 1 else run.name
                lines.append(Line("" if panels else label, curves[weights][task], color))
        switches = [(step, str(new)) for step, new in _first_gap(runs).get("switches", [])]
        named = [(step, f"task {new}" if len(switches) < 6 else new) for step, new in switches]
        unit = "\n".join(_broken(tasks[task]))
        panels.append(Panel(lines, unit, switches=[(s, "" if panels else name) for s, name in named]))
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return []
    gap = _first_gap(runs)
    better = "higher" if gap["higher_is_better"] else "lower"
    text = f"{gap['score']} of each task, {better} is better. Dashed lines: the next task begins."
    return [Chart("stability_gap", "Score of each task", panels, text, wide=True, tall=1.25, shared=True)]


def gap_table(run: Run) -> tuple[list[str], list[list[str]]] | None:
    """Return heading and rows of what was summed up at the end of each task."""
    keys = {
        "average_accuracy": "mean",
        "forgetting": "forgetting",
        "min_accuracy": "lowest since learnt",
        "gap_depth": "gap depth",
        "gap_recovery": "steps to recover",
        "gap_recovered": "recovered",
    }
    rows = []
    for weights, entries in run.gap.get("summary", {}).items():
        for entry in entries:
            name = run.gap["names"].get(entry.get("task"), entry.get("task"))
            cells = [_cell(key, entry.get(key), run.gap["score"] == "accuracy") for key in keys]
            rows.append([_WEIGHTS.get(weights, weights), str(name), str(entry.get("step")), *cells])
    return (["weights", "after task", "step", *keys.values()], rows) if rows else None


def numerics_maps(run: Run) -> list[HeatMap]:
    """Return a heat map of layers over steps for each operand: underflow, and saturation where there is some."""
    maps = []
    for measure, unit in _SHARES.items():
        for operand in _OPERANDS:
            cells = _cells(run, operand, measure)
            worst = {layer: max((v for v in row if v is not None), default=-1.0) for layer, row in cells.items()}
            if not worst or max(worst.values()) < 0 or (measure == "saturation" and max(worst.values()) <= 0):
                continue
            chosen = set(sorted(worst, key=lambda layer: -worst[layer])[:_MOST_LAYERS])
            rows = [layer for layer in cells if layer in chosen]
            steps, values = _joined([report["step"] for report in run.numerics], [cells[layer] for layer in rows])
            hidden = len(cells) - len(rows)
            text = f"The worst {len(rows)} layers; {hidden} more are left out." if hidden else ""
            name = f"numerics_{measure}_{operand}"
            maps.append(HeatMap(name, f"{measure.capitalize()} of {operand}", rows, steps, values, unit, text))
    return maps


def numerics_table(run: Run) -> tuple[list[str], list[list[str]]] | None:
    """Return heading and rows of the worst layers at the last report."""
    if not run.numerics:
        return None
    found = []
    for layer, operands in run.numerics[-1]["layers"].items():
        for operand, entry in operands.items():
            under, over, ratio = (entry.get(name) for name in ("underflow", "saturation", "sqnr"))
            found.append((under or 0.0, [layer, operand, str(entry.get("format") or "")], (under, over), ratio))
    found.sort(key=lambda each: -each[0])
    rows = [
        [*names, *("-" if share is None else f"{share:.3%}" for share in shares), "-" if db is None else f"{db:.1f} dB"]
        for _, names, shares, db in found[:10]
    ]
    return ["layer", "operand", "format", "underflow", "saturation", "signal to noise"], rows


def round_facts(run: Run) -> list[tuple[str, str]]:
    """Return what is known of a run's rounds of local steps: names and values."""
    strategy: dict[str, Any] = run.record.get("strategy", {})
    ends: list[int] = run.record.get("rounds", [])
    if not ends and "local_steps" not in strategy:
        return []
    facts = [("Strategy", str(strategy.get("name", "")))]
    facts += [(name.replace("_", " ").capitalize(), _said(strategy[name])) for name in strategy if name != "name"]
    facts.append(("Rounds that ended", str(len(ends))))
    if len(ends) > 1:
        facts.append(("Steps of a round, median", f"{median([b - a for a, b in pairwise(ends)]):g}"))
    cost = _cost_of_exchange(finite(run.of("seconds")), set(ends))
    if cost is not None:
        at, other = cost
        facts.append(("A step at the end of a round", f"{1e3 * at:.3g} ms, others {1e3 * other:.3g} ms"))
        facts.append(("Time that exchanges take", f"{max(0.0, at - other) * len(ends):.3g} s in all"))
    return facts


def _cost_of_exchange(seconds: Points, ends: set[int]) -> tuple[float, float] | None:
    """Return the median time of a step that ends a round, and of one that does not."""
    steps = [(now[0], now[1] - before[1]) for before, now in pairwise(seconds) if now[0] == before[0] + 1]
    # A step is noted before its update is made: what comes after a round's last one shows in the next.
    at = [took for step, took in steps if step - 1 in ends]
    other = [took for step, took in steps if step - 1 not in ends]
    return (median(at), median(other)) if at and other else None


def _first_gap(runs: Sequence[Run]) -> dict[str, Any]:
    return next((run.gap for run in runs if run.gap), {})


def _cells(run: Run, operand: str, measure: str) -> dict[str, list[float | None]]:
    """Return the values of each layer, one a report."""
    layers = dict.fromkeys(layer for report in run.numerics for layer in report["layers"])
    found = {
        layer: [report["layers"].get(layer, {}).get(operand, {}).get(measure) for report in run.numerics]
        for layer in layers
    }
    return {layer: row for layer, row in found.items() if any(value is not None for value in row)}


def _joined(steps: list[int], rows: list[list[float | None]]) -> tuple[list[int], list[list[float | None]]]:
    """Return at most so many columns, each the worst of those that share it."""
    count = len(steps)
    if count <= _MOST_COLUMNS:
        return steps, rows
    ends = [(part + 1) * count // _MOST_COLUMNS for part in range(_MOST_COLUMNS)]
    parts = list(pairwise([0, *ends]))
    joined = [[max((v for v in row[a:b] if v is not None), default=None) for a, b in parts] for row in rows]
    return [steps[end - 1] for end in ends], joined


def _cell(key: str, value: Any, percent: bool) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    if key == "gap_recovered":
        return f"{value:.0%}"
    return f"{100 * value:.1f}%" if percent and key != "gap_recovery" else f"{value:.4g}"


def _said(value: Any) -> str:
    return "none" if value is None else ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _broken(name: str) -> list[str]:
    """Return a name in at most two short lines."""
    words, lines = name.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 14 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:2]
