"""Reads the JSON files of this library's callbacks and of sweeps: what is not as it should be is refused."""

import json
import math
from pathlib import Path
from typing import Any

from lightning_stable._report.checked import checked_record, number, numbers_in, share, step
from lightning_stable._report.run import Points, Run, append

__all__ = ["FILE_NAME", "FORMAT", "read_gap", "read_numerics", "read_record", "read_sweep"]

FILE_NAME = "stability_report.json"
FORMAT = 1


def read_record(path: Path, run: Run) -> None:
    """Take what StabilityReport wrote."""
    record, damaged = checked_record(_object(path, FORMAT))
    rows = record["series"]
    columns = {name: rows[name] for name in ("step", "optimizer", "loss", "gradient_norm", "seconds", "lr")}
    # What is not finite is null and known, what nobody knows is null, too.
    columns |= {name: rows.get(name, [True] * len(rows["step"])) for name in ("loss_known", "gradient_norm_known")}
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("its columns differ in length")
    series: dict[str, Points] = {}
    for at, optimizer, loss, norm, seconds, rates, *known in zip(*columns.values(), strict=True):
        end = f"/{optimizer}" if optimizer else ""
        both = zip(("stability_report/loss", "stability_report/gradient_norm"), (loss, norm), known, strict=True)
        values = {name: value for name, value, told in both if told}
        values |= {f"stability_report/lr{f'-{place}' if place else ''}": rate for place, rate in enumerate(rates)}
        for name, value in values.items():
            append(series.setdefault(name + end, []), step(at), number(value))
        if not optimizer and seconds is not None:
            append(series.setdefault("seconds", []), step(at), number(seconds))
    validated = {str(name): _in_order(points) for name, points in record["metrics"].items()}
    run.series.update({name: points for name, points in series.items() if any(not math.isnan(v) for _, v in points)})
    run.record, run.seconds, run.validated = record, record.get("seconds"), validated
    if damaged:
        run.notes.append(f"{path.name}: what it has under {', '.join(damaged)} is damaged and left out.")
    if unknown := record.get("unknown", {}).get("loss"):
        run.notes.append(
            f"The loss of {unknown:,} steps is not known: training_step returned none, or manual optimisation went by "
            "loss.backward() in place of self.manual_backward(loss)."
        )


def read_gap(path: Path, run: Run) -> None:
    """Take what StabilityGap wrote."""
    gap = _object(path, 1)
    names = {step(task["task"]): str(task["name"] or f"task {task['task']}") for task in gap["tasks"]}
    curves: dict[str, dict[int, Points]] = {}
    for weights, entries in gap["series"].items():
        for entry in entries:
            points = zip(entry["steps"], entry["scores"], strict=True)
            curves.setdefault(weights, {})[step(entry["task"])] = [(step(at), number(score)) for at, score in points]
    run.gap = {
        "score": str(gap["score"]),
        "higher_is_better": bool(gap["higher_is_better"]),
        "names": names,
        "curves": curves,
        "switches": [(step(switch["step"]), step(switch["task"])) for switch in gap["switches"]],
        "summary": {
            weights: [{**row, "task": step(row["task"])} for row in rows] for weights, rows in gap["summary"].items()
        },
    }


def read_numerics(path: Path, run: Run) -> None:
    """Take what NumericsMonitor wrote, line by line; the last one may be cut."""
    lines, damaged = path.read_text(encoding="utf-8").splitlines(), 0
    for place, line in enumerate(lines):
        try:
            run.numerics.append(_numerics(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            damaged += place < len(lines) - 1
    if not run.numerics:
        run.notes.append(f"{path.name} holds no report.")
    elif damaged:
        run.notes.append(f"{path.name}: {damaged} of its {len(lines)} lines are damaged and left out.")


def read_sweep(path: Path, run: Run) -> None:
    """Take what a sweep wrote."""
    sweep = _object(path, None)
    cells = [
        {
            "precision": cell.get("precision"),
            "lr": cell.get("lr"),
            **{name: share(cell.get(name)) for name in ("share", "median")},
            **{name: step(cell.get(name) or 0) for name in ("ended", "failed")},
        }
        for cell in sweep["cells"]
    ]
    run.sweep = {"cells": cells, "runs": [dict(entry) for entry in sweep["runs"]]}


def _in_order(points: Any) -> Points:
    found: Points = []
    for at, value in points:
        append(found, step(at), number(value))
    return found


def _object(path: Path, known: int | None) -> dict[str, Any]:
    """Return the object in a file, of a known format."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"it holds {type(found).__name__}, not an object")
    if known is not None and found.get("format") != known:
        raise ValueError(f"its format is {found.get('format')!r}, and this version reads {known}")
    return found


def _numerics(report: Any) -> dict[str, Any]:
    """Return a report of NumericsMonitor, whose shares are numbers."""
    layers = {
        str(layer): {
            str(operand): numbers_in(entry, "underflow", "saturation", "sqnr") for operand, entry in operands.items()
        }
        for layer, operands in report["layers"].items()
    }
    return {"step": step(report["step"]), "layers": layers}
