"""The file ``stability_gap.json``: written, read with every field checked, and summed up as a table.

Standard library only: ``lightning-stable plot`` reads it without torch.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "GRADIENTS",
    "WEIGHTS",
    "check_record",
    "read_record",
    "recovery_share",
    "summary_table",
    "write_record",
]

FILE_NAME = "stability_gap.json"
FORMAT = 1
WEIGHTS = {"live": "live", "ema": "EMA"}
"""The weight sets that have a series, with their names in tables and pictures."""

GRADIENTS = ("plasticity", "stability", "cosine")
"""What is known of the gradients at each step of theirs."""


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record and check it.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON, or not a record of this format; the message names the file and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    check_record(record, str(path))
    checked: dict[str, Any] = record
    return checked


def write_record(record: dict[str, Any], path: str | Path) -> None:
    """Write a record, whole or not at all: a reader never sees half a file.

    Args:
        record: The record; numbers that are not finite are written as null.
        path: The file; its folder is made if it is missing.

    Raises:
        ValueError: If the record is not as readers expect it; the message names the field.
    """
    path = Path(path)
    plain = _finite(record)
    check_record(plain, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # One line a field: people can look into it, and a series is not a line for each number.
    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in plain.items())
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def recovery_share(record: dict[str, Any]) -> float:
    """Return which share of a fall has to be made up for to count as recovered; nine tenths where a file is silent."""
    share: float = record.get("recovery_share", 0.9)
    return share


def check_record(record: Any, where: str) -> None:
    """Raise ``ValueError`` unless a record has every field, of the right kind.

    Args:
        record: What was read, or is about to be written.
        where: The file, for the message.
    """
    top = _Fields(record, where, "")
    if top.number("format") != FORMAT:
        raise ValueError(
            f"{where}: 'format' is {record['format']!r}, and this version reads format {FORMAT}. Read the file with "
            "the version of lightning-stable that wrote it, or a newer one."
        )
    top.take("score", str)
    top.take("higher_is_better", bool)
    top.count("every_n_steps", 1)
    top.counts("windows", 1)
    if "recovery_share" in record and not 0 < (top.number("recovery_share") or 0) <= 1:
        top.refuse("recovery_share", f"is {record['recovery_share']}, not a share above 0 and up to 1")
    names = [fields.count("task") for fields in top.entries("tasks", _check_task)]
    if sorted(set(names)) != sorted(names):
        raise ValueError(f"{where}: 'tasks' names a task twice: {names}.")
    steps = [fields.count("step") for fields in top.entries("switches", lambda f: _check_known(f, names))]
    if steps != sorted(steps):
        raise ValueError(f"{where}: 'switches' are not in the order of their steps: {steps}.")
    series = _Fields(top.take("series", dict), where, "series")
    for weights in _known_weights(series):
        series.entries(weights, lambda fields: _check_series(fields, names))
    summary = _Fields(top.take("summary", dict), where, "summary")
    for weights in _known_weights(summary):
        summary.entries(weights, lambda fields: _check_summary(fields, names))
    if record.get("gradients") is not None:
        _check_gradients(_Fields(record["gradients"], where, "gradients"))


def summary_table(record: dict[str, Any]) -> str:
    """Return the summary as plain text: one row for each weight set and task that ended, columns aligned.

    Args:
        record: A record as :func:`read_record` returns it.
    """
    percent = record["score"] == "accuracy"
    columns = _columns(record)
    rows = [["weights", "after task", "step", *(head for head, _, _ in columns)]]
    names = {task["task"]: task["name"] for task in record["tasks"]}
    for weights, label in WEIGHTS.items():
        for entry in record["summary"].get(weights, []):
            cells = [_cell(entry.get(key), kind, percent) for _, key, kind in columns]
            rows.append([label, f"{entry['task']}: {names[entry['task']]}", str(entry["step"]), *cells])
    if len(rows) == 1:
        return f"{_title(record, percent)}\nNo task has ended yet.\n"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([_title(record, percent), *lines]) + "\n"


def _title(record: dict[str, Any], percent: bool) -> str:
    """Say what the numbers are."""
    better = "higher" if record["higher_is_better"] else "lower"
    unit = "accuracy in %" if percent else f"{record['score']}, {better} is better"
    return f"Stability gap: {unit}; every {_times(record['every_n_steps'])}; recovery in steps"


def _times(every: int) -> str:
    return "step evaluated" if every == 1 else f"{every} steps evaluated"


def _columns(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return heading, key and kind of each column."""
    if record["score"] == "accuracy":
        names = ("ACC", "FORG", "min-ACC", "WC-ACC")
    else:
        names = ("mean", "FORG", "min" if record["higher_is_better"] else "max", "WC")
    keys = ("average_accuracy", "forgetting", "min_accuracy", "worst_case_accuracy")
    windows = [
        (f"{head}{window}", f"{key}_{window}", "score")
        for head, key in (("WF", "windowed_forgetting"), ("WP", "windowed_plasticity"))
        for window in record["windows"]
    ]
    return [
        *((head, key, "score") for head, key in zip(names, keys, strict=True)),
        *windows,
        ("gap depth", "gap_depth", "score"),
        ("recovery", "gap_recovery", "steps"),
        # The mean number of steps is that of the gaps that closed, so it needs the share of those beside it.
        ("recovered", "gap_recovered", "share"),
    ]


def _cell(value: float | None, kind: str, percent: bool) -> str:
    """Return a number as text."""
    if value is None or not math.isfinite(value):
        return "-"
    if kind == "share":
        return f"{100 * value:.0f}%"
    if kind == "steps" or percent:
        text = f"{value if kind == 'steps' else 100 * value:.1f}"
        return "0.0" if text == "-0.0" else text
    return f"{value:.4g}"


class _Fields:
    """The fields of one object of the file; what is wrong is reported with the place it has there."""

    def __init__(self, values: Any, where: str, place: str) -> None:
        self.where = where
        self.place = place
        if not isinstance(values, dict):
            raise self._error(place or "the whole", f"is {_shorten(values)}, not an object")
        self.values = values

    def take(self, name: str, kind: type) -> Any:
        """Return the field ``name``, which has to be of one type."""
        if name not in self.values:
            raise self._error(self._path(name), "is missing")
        value = self.values[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            names = {str: "a text", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}
            raise self._error(self._path(name), f"is {_shorten(value)}, not {names[kind]}")
        return value

    def count(self, name: str, lowest: int = 0) -> int:
        """Return a whole number from ``lowest`` on."""
        value: int = self.take(name, int)
        if value < lowest:
            raise self._error(self._path(name), f"is {value}, below {lowest}")
        return value

    def number(self, name: str) -> float | None:
        """Return a number or null."""
        if name not in self.values:
            raise self._error(self._path(name), "is missing")
        value: float | None = self.values[name]
        if not _is_number(value):
            raise self._error(self._path(name), f"is {_shorten(value)}, not a number or null")
        return value

    def counts(self, name: str, lowest: int = 0) -> list[int]:
        """Return a list of whole numbers."""
        values: list[int] = self.take(name, list)
        wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, int) or v < lowest]
        if wrong:
            raise self._error(self._path(name), f"holds {_shorten(wrong[0])}, not a whole number from {lowest} on")
        return values

    def numbers(self, name: str, length: int) -> list[float | None]:
        """Return a list of numbers and nulls of a known length."""
        values: list[float | None] = self.take(name, list)
        if len(values) != length:
            raise self._error(self._path(name), f"has {len(values)} entries, and 'steps' beside it has {length}")
        wrong = [value for value in values if not _is_number(value)]
        if wrong:
            raise self._error(self._path(name), f"holds {_shorten(wrong[0])}, not a number or null")
        return values

    def steps(self) -> list[int]:
        """Return the field ``steps``, which never go back."""
        steps = self.counts("steps")
        if steps != sorted(steps):
            raise self._error(self._path("steps"), "go back")
        return steps

    def entries(self, name: str, check: Callable[["_Fields"], None]) -> list["_Fields"]:
        """Return the objects of a list, each of them checked."""
        found = [_Fields(v, self.where, f"{self._path(name)}[{i}]") for i, v in enumerate(self.take(name, list))]
        for fields in found:
            check(fields)
        return found

    def refuse(self, name: str, problem: str) -> None:
        """Raise about a field."""
        raise self._error(self._path(name), problem)

    def _path(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name

    def _error(self, field: str, problem: str) -> ValueError:
        named = f"'{field}'" if field != "the whole" else field
        return ValueError(f"{self.where}: {named} {problem}. It is no file of StabilityGap, or was changed.")


def _known_weights(fields: _Fields) -> list[str]:
    for name in fields.values:
        if name not in WEIGHTS:
            fields.refuse(name, f"is no weight set: there are {' and '.join(WEIGHTS)}")
    return list(fields.values)


def _check_task(fields: _Fields) -> None:
    fields.count("task")
    fields.take("name", str)
    fields.count("samples")


def _check_known(fields: _Fields, tasks: list[int]) -> None:
    """Check ``task`` and ``step``."""
    fields.count("step")
    _check_named(fields, tasks)


def _check_named(fields: _Fields, tasks: list[int]) -> None:
    task = fields.count("task")
    if task not in tasks:
        fields.refuse("task", f"is {task}, which 'tasks' does not name")


def _check_series(fields: _Fields, tasks: list[int]) -> None:
    _check_named(fields, tasks)
    fields.numbers("scores", len(fields.steps()))


def _check_summary(fields: _Fields, tasks: list[int]) -> None:
    _check_known(fields, tasks)
    for name in fields.values:
        fields.number(name)


def _check_gradients(fields: _Fields) -> None:
    steps = fields.steps()
    for name in GRADIENTS:
        fields.numbers(name, len(steps))


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))


def _finite(value: Any) -> Any:
    """Return a value with null for every number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
