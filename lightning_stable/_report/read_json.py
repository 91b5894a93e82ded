"""Reads the JSON files of this library's callbacks and of sweeps: what is not as it should be is refused."""

import json
import math
from pathlib import Path
from typing import Any

from lightning_stable._report.run import Points, Run, append

__all__ = ["FILE_NAME", "FORMAT", "read_gap", "read_numerics", "read_record", "read_sweep"]

FILE_NAME = "stability_report.json"
FORMAT = 1


def read_record(path: Path, run: Run) -> None:
    """Take what StabilityReport wrote."""
    record = _object(path, FORMAT)
    rows = record["series"]
    columns = {name: rows[name] for name in ("step", "optimizer", "loss", "gradient_norm", "seconds", "lr")}
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("its columns differ in length")
    series: dict[str, Points] = {}
    for step, optimizer, loss, norm, seconds, rates in zip(*columns.values(), strict=True):
        end = f"/{optimizer}" if optimizer else ""
        values = {"stability_report/loss": loss, "stability_report/gradient_norm": norm}
        values |= {f"stability_report/lr{f'-{place}' if place else ''}": rate for place, rate in enumerate(rates)}
        for name, value in values.items():
            append(series.setdefault(name + end, []), int(step), _value(value))
        if not optimizer and seconds is not None:
            append(series.setdefault("seconds", []), int(step), float(seconds))
    run.series.update({name: points for name, points in series.items() if any(not math.isnan(v) for _, v in points)})
    for name, points in record["metrics"].items():
        run.series.setdefault(name, [(int(step), _value(value)) for step, value in points])
    run.record, run.seconds = record, record.get("seconds")


def read_gap(path: Path, run: Run) -> None:
    """Take what StabilityGap wrote."""
    gap = _object(path, 1)
    names = {task["task"]: task["name"] or f"task {task['task']}" for task in gap["tasks"]}
    curves: dict[str, dict[int, Points]] = {}
    for weights, entries in gap["series"].items():
        for entry in entries:
            points = zip(entry["steps"], entry["scores"], strict=True)
            curves.setdefault(weights, {})[entry["task"]] = [(int(step), _value(score)) for step, score in points]
    run.gap = {
        "score": str(gap["score"]),
        "higher_is_better": bool(gap["higher_is_better"]),
        "names": names,
        "curves": curves,
        "switches": [(int(switch["step"]), int(switch["task"])) for switch in gap["switches"]],
        "summary": {weights: [dict(row) for row in rows] for weights, rows in gap["summary"].items()},
    }


def read_numerics(path: Path, run: Run) -> None:
    """Take what NumericsMonitor wrote, line by line; the last one may be cut."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and isinstance(report.get("layers"), dict) and isinstance(report.get("step"), int):
            run.numerics.append(report)
    if not run.numerics:
        run.notes.append(f"{path.name} holds no report.")


def read_sweep(path: Path, run: Run) -> None:
    """Take what a sweep wrote."""
    sweep = _object(path, None)
    cells = [
        {name: cell.get(name) for name in ("precision", "lr", "share", "ended", "failed", "median")}
        for cell in sweep["cells"]
    ]
    run.sweep = {"cells": cells, "runs": [dict(entry) for entry in sweep["runs"]]}


def _object(path: Path, known: int | None) -> dict[str, Any]:
    """Return the object in a file, of a known format."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"it holds {type(found).__name__}, not an object")
    if known is not None and found.get("format") != known:
        raise ValueError(f"its format is {found.get('format')!r}, and this version reads {known}")
    return found


def _value(value: Any) -> float:
    """Return a number; null stands for what is none."""
    return math.nan if value is None else float(value)
