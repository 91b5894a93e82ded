"""What NumericsMonitor has reported so far: its history, its lines of JSON, and the picture of them."""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_stable.functional.numerics_monitor import (
    MEASURES,
    OPERANDS,
    count_nonfinite,
    exponent_histogram,
    measure,
)

__all__ = ["FILE_NAME", "PICTURE_NAME", "NumericsLog", "summarise"]

FILE_NAME = "numerics.jsonl"
PICTURE_NAME = "numerics.png"

Row = tuple[str, str]


class NumericsLog:
    """The reports of a run.

    Args:
        directory: Where files go; ``None``: the logger's directory.
        picture: The measure to draw, ``None`` for no picture.

    Raises:
        ValueError: If ``directory`` is a file.
    """

    def __init__(self, directory: str | None, picture: str | None) -> None:
        if directory is not None and Path(directory).is_file():
            raise ValueError(
                f"directory={directory!r} of NumericsMonitor is a file. Name a folder, or leave it to None."
            )
        self._directory = directory
        self._picture = picture
        self._folder: Path | None = None
        self._begun = False
        self._told: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.rows: list[Row] = []
        self.steps: list[int] = []
        self._values: list[Tensor] = []
        self._lines: list[str] = []

    def begin(self, trainer: Trainer, rows: list[Row]) -> None:
        """Begin a fit: find the folder, on all processes, which have to agree; go on if layers are the same."""
        if rows != self.rows:
            self.forget()
        self.rows = list(rows)
        self._begun = False
        self._folder = None if self._directory is None else Path(self._directory)
        if self._folder is None and trainer.loggers and not cast(Any, trainer).fast_dev_run:
            folder = trainer.log_dir
            self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            self._once(
                f"NumericsMonitor writes no {FILE_NAME}: the Trainer's logger has no directory. Give one: "
                "NumericsMonitor(directory=...)."
            )

    def add(self, trainer: Trainer, step: int, statistics: Tensor, formats: list[str]) -> Tensor:
        """Add a report, and write its line.

        Args:
            trainer: The Trainer.
            step: Optimizer steps done.
            statistics: Shape (rows, SIZE), on the CPU.
            formats: What each row is quantized to.

        Returns:
            The measures, of shape (rows, 4).
        """
        found = measure(statistics)
        self.steps.append(step)
        self._values.append(found.float())
        if self._folder is not None and trainer.is_global_zero:
            self._write(self._folder / FILE_NAME, _line(step, self.rows, found, statistics, formats))
        return found

    def record(self) -> dict[str, Any]:
        """Return layer and operand of each row, the steps, and the measures of shape (reports, rows, 4)."""
        return {"rows": [list(row) for row in self.rows], "steps": list(self.steps), "values": self._stacked()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load."""
        return self.record()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.forget()
        self.rows = [(layer, operand) for layer, operand in state["rows"]]
        self.steps = list(state["steps"])
        self._values = list(state["values"])

    def draw(self, trainer: Trainer) -> None:
        """Draw the picture, if it is wanted and matplotlib is there."""
        if self._picture is None or self._folder is None or not trainer.is_global_zero or not self.steps:
            return
        try:
            from lightning_stable.callbacks._numerics_picture import draw_numerics

            draw_numerics(self.record(), self._folder / PICTURE_NAME, self._picture)
        except ImportError as error:
            self._once(f"NumericsMonitor drew no picture: {error}")
        except (OSError, ValueError) as error:
            self._complain(error)

    def _stacked(self) -> Tensor:
        return torch.stack(self._values) if self._values else torch.empty(0, len(self.rows), len(MEASURES))

    def _write(self, path: Path, line: str) -> None:
        """Add a line to the file; of a run that goes on, the file holds what was before it. No end to a run."""
        try:
            if not self._begun:
                self._start(path)
                self._begun = True
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self._complain(error)

    def _start(self, path: Path) -> None:
        """Put the lines of the reports before this one into the file, and nothing else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        there: dict[int, str] = {}
        if path.is_file() and len(self.steps) > 1:
            there = _lines_by_step(path.read_text(encoding="utf-8"))
        # What an earlier process has counted is not in its checkpoint but for the measures.
        earlier = zip(self.steps[:-1], self._values[:-1], strict=True)
        lines = [there.get(step) or _line(step, self.rows, values.double(), None, None) for step, values in earlier]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _once(self, message: str) -> None:
        if message not in self._told:
            rank_zero_info(message)
        self._told.add(message)

    def _complain(self, error: Exception) -> None:
        message = (
            f"NumericsMonitor: its files could not be written ({type(error).__name__}: {error}). Training goes on."
        )
        if "files" not in self._told:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        self._told.add("files")


def summarise(rows: list[Row], found: Tensor, *, layers: bool) -> dict[str, float]:
    """Return what loggers are given: for each operand the worst layer and the mean over layers, and if asked all.

    Args:
        rows: Layer and operand of each row.
        found: The measures, of shape (rows, 4).
        layers: Whether to name each layer, too.
    """
    values: dict[str, float] = {}
    for operand in OPERANDS:
        places = [place for place, row in enumerate(rows) if row[1] == operand]
        for column, name in enumerate(MEASURES):
            own = [float(found[place, column]) for place in places]
            finite = [value for value in own if math.isfinite(value)]
            if not finite:
                continue
            values[f"numerics/{operand}/{name}_worst"] = min(finite) if name == "sqnr" else max(finite)
            if name != "absmax":
                values[f"numerics/{operand}/{name}_mean"] = math.fsum(finite) / len(finite)
            if layers:
                named = ((rows[place][0], value) for place, value in zip(places, own, strict=True))
                values |= {f"numerics/{operand}/{name}/{n}": value for n, value in named if math.isfinite(value)}
    return values


def _line(step: int, rows: list[Row], found: Tensor, statistics: Tensor | None, formats: list[str] | None) -> str:
    """Return one report as a line of JSON; operands that were not seen are left out."""
    layers: dict[str, dict[str, Any]] = {}
    for place, (layer, operand) in enumerate(rows):
        if math.isnan(float(found[place, 0])):
            continue
        entry: dict[str, Any] = {} if formats is None else {"format": formats[place]}
        numbers = zip(MEASURES, found[place].tolist(), strict=True)
        entry |= {name: value if math.isfinite(value) else None for name, value in numbers}
        if statistics is not None:
            lowest, counts = exponent_histogram(statistics[place])
            entry |= {
                "nonfinite": int(count_nonfinite(statistics[place])),
                "exponents": {"lowest": lowest, "counts": counts},
            }
        layers.setdefault(layer, {})[operand] = entry
    return json.dumps({"step": step, "layers": layers}, allow_nan=False) + "\n"


def _lines_by_step(text: str) -> dict[int, str]:
    """Return the lines of a file by their step; what is no line of ours is left out."""
    found: dict[int, str] = {}
    for line in text.splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(step, int):
            found[step] = line + "\n"
    return found
