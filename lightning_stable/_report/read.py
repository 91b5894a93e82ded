"""Finds runs and reads their files into one model: what a logger wrote, and what callbacks of this library wrote."""

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_stable._report.checked import leaves, step
from lightning_stable._report.read_events import read_events
from lightning_stable._report.read_json import read_gap, read_numerics, read_record, read_sweep
from lightning_stable._report.run import Points, Run, append

__all__ = ["LOOKED_FOR", "Damaged", "find_runs", "has_files", "read_csv", "read_run"]

LOOKED_FOR = (
    "metrics.csv",
    "events.out.tfevents.*",
    "stability_report.json",
    "stability_gap.json",
    "numerics.jsonl",
    "sweep.json",
)
"""Files of which one makes a folder that of a run."""

# Entries that merging others may give a mapping: each line of aliases can double them.
_MOST_MERGED = 20_000
# How many folders below the given one a run may lie.
_DEEPEST = 4

Damaged = (
    OSError,
    ValueError,
    csv.Error,
    yaml.YAMLError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What a reader raises at a file that is not what its name says."""


def has_files(folder: Path) -> bool:
    """Tell whether a folder is that of a run."""
    return any(next(folder.glob(pattern), None) is not None for pattern in LOOKED_FOR)


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs at or below a folder, the newest first; itself alone if it is one."""
    if has_files(folder):
        return [folder]
    found: dict[Path, float] = {}
    for depth in range(1, _DEEPEST + 1):
        for pattern in LOOKED_FOR:
            for file in folder.glob("*/" * depth + pattern):
                found[file.parent] = max(found.get(file.parent, 0.0), file.stat().st_mtime)
    return sorted(found, key=lambda place: (-found[place], place))


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read everything that is known of a run. A file that cannot be read becomes a note.

    Args:
        folder: Where its files lie.
        name: What it is called; by default the last two folders.
    """
    run = Run(name or "/".join(folder.resolve().parts[-2:]).lstrip("/"), folder)
    readers: list[tuple[str, Callable[[Path, Run], None]]] = [
        ("config.yaml", _take_config),
        ("hparams.yaml", _take_hparams),
        ("stability_report.json", read_record),
        ("metrics.csv", _take_csv),
        ("stability_gap.json", read_gap),
        ("numerics.jsonl", read_numerics),
        ("sweep.json", read_sweep),
    ]
    for file, reader in readers:
        if (folder / file).is_file():
            try:
                reader(folder / file, run)
                run.sources.append(file)
            except Damaged as error:
                run.notes.append(f"{file} could not be read: {type(error).__name__}: {_short(str(error))}")
    read_events(folder, run)
    _join_validated(run)
    return run


def read_csv(path: Path) -> dict[str, Points]:
    """Read the ``metrics.csv`` of a CSVLogger: every numeric column by name.

    The host counts the steps before one; here they are those done. Cells that are not finite stay, empty ones do not.

    Args:
        path: The file.
    """
    series: dict[str, Points] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(_whole_lines(file))
        names = next(rows, [])
        if "step" not in names:
            return {}
        at, columns = (
            names.index("step"),
            [(place, name) for place, name in enumerate(names) if name not in ("", "step")],
        )
        for row in rows:
            done = _step(row[at] if at < len(row) else "")
            if done is None:
                continue
            for place, name in columns:
                value = _number(row[place]) if place < len(row) and row[place] else None
                if value is not None:
                    append(series.setdefault(name, []), done, value)
    return series


def _whole_lines(file: Iterable[str]) -> Iterator[str]:
    """Leave out a last line without its end: of a run in progress it may be cut within a number."""
    return (line for line in file if line.endswith(("\n", "\r")))


def _join_validated(run: Run) -> None:
    """Take what was noted at validations where no log has it: a log has a value as often as it was logged.

    Of a run that was resumed, the log begins at the checkpoint, and the validations before it are in the record alone.
    """
    names = {*run.series, *run.validated}
    for name, noted in run.validated.items():
        logged = run.of(name)
        if not logged and not {f"{name}_step", f"{name}_epoch"} & names:  # the host's other name for one of these
            run.series[name] = noted
        elif logged and name.lower().startswith("val"):  # others may be those of the epoch before
            run.series[name] = [point for point in noted if point[0] < logged[0][0]] + logged


def _step(cell: str) -> int | None:
    """Return the steps done, of the host's count; ``None`` if there is none."""
    try:
        return step(float(cell)) + 1
    except (ValueError, OverflowError):
        return None


def _take_csv(path: Path, run: Run) -> None:
    found = read_csv(path)
    if not found:
        run.notes.append("metrics.csv holds no values.")
    run.series.update({name: points for name, points in found.items() if not _is_better_known(run, name)})


def _is_better_known(run: Run, name: str) -> bool:
    """Tell whether the callback's own record has this at every step, of which the log has some."""
    return name.startswith("stability_report/") and name in run.series


def _take_config(path: Path, run: Run) -> None:
    run.config = _mapping(path)


def _take_hparams(path: Path, run: Run) -> None:
    run.hparams = _mapping(path)


def _mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Objects of Python, which a logger may write, are told by name."""
    found = yaml.load(path.read_text(encoding="utf-8"), _Plain)  # noqa: S506  a safe loader, see below
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise TypeError(f"it holds {type(found).__name__}, not a mapping")
    leaves(found)
    return {str(key): value for key, value in found.items()}


class _Plain(yaml.SafeLoader):
    """Builds plain values only; what has a tag of its own becomes that tag's name."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_MERGED:
            raise ValueError(f"a mapping in it merges {len(node.value)} others, and {_MOST_MERGED} are read")


def _named(_loader: _Plain, suffix: str, _node: yaml.Node) -> str:
    return suffix.rpartition("/")[2].rpartition(":")[2]


_Plain.add_multi_constructor("", _named)


def _number(cell: Any) -> float | None:
    """Return a cell's number, ``None`` if it has none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _short(text: str) -> str:
    return " ".join(text.split())[:160]
