"""What a sweep says: which runs diverged, the table, the JSON of everything and the heat map."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stable._glue.figures import new_figure
from lightning_stable.cli._sweep_grid import Run
from lightning_stable.cli._sweep_options import DIVERGED_AT

__all__ = ["Cell", "all_results", "divergence", "draw_map", "make_cells", "markdown_table"]

# Of the initial loss: what a run is taken to have learnt at least, so that noise around the start is no divergence.
_LEAST = 0.1


class Cell(NamedTuple):
    """All runs of one precision and learning rate that are over.

    Attributes:
        diverged: How many of them diverged.
        ended: How many ended, diverged or not.
        failed: How many failed for another reason.
        median: Median final value of those that did not diverge; ``None`` where there is none.
    """

    diverged: int
    ended: int
    failed: int
    median: float | None

    @property
    def share(self) -> float | None:
        """The share that diverged, ``None`` where no run ended."""
        return self.diverged / self.ended if self.ended else None


def divergence(record: dict[str, Any], share: float = DIVERGED_AT) -> str:
    """Return why a run counts as diverged; nothing if it does not.

    With the first training loss ``initial`` and the lowest value ``best``, it diverged if it ends above
    ``start + share * max(|initial - start|, 0.1 * |initial|)`` where ``start = min(initial, best)``: it lost more than
    this share of what it had learnt. So did one whose last value is not finite. For a first loss that is not finite
    stands the first finite value of the curve.

    Args:
        record: What the run recorded; ``None`` stands for what is not finite.
        share: The share, above 0.
    """
    initial, best, final = (record.get(name) for name in ("initial", "best", "final"))
    if final is None:
        return f"{record['metric']} is not finite at the end"
    first = initial if initial is not None else next((v for _, v in record.get("curve", []) if v is not None), final)
    start = min(first, final if best is None else best)
    limit = start + share * max(abs(first - start), _LEAST * abs(first))
    return f"{record['metric']} ended at {final:.4g}, above {limit:.4g}" if final > limit else ""


def make_cells(
    runs: Sequence[Run], results: dict[Run, dict[str, Any]], failed: Sequence[Run], share: float = DIVERGED_AT
) -> dict[tuple[str, float], Cell]:
    """Return a cell for each precision and learning rate.

    Args:
        runs: All runs of the sweep.
        results: What those that ended recorded.
        failed: Those that failed.
        share: As of :func:`divergence`.
    """
    cells = {}
    for key in dict.fromkeys((run.precision, run.lr) for run in runs):
        own = [run for run in runs if (run.precision, run.lr) == key]
        ended = [results[run] for run in own if run in results]
        fine = [record["final"] for record in ended if not divergence(record, share)]
        lost = sum(run in failed for run in own)
        cells[key] = Cell(len(ended) - len(fine), len(ended), lost, statistics.median(fine) if fine else None)
    return cells


def _axes(cells: dict[tuple[str, float], Cell]) -> tuple[list[str], list[float]]:
    return list(dict.fromkeys(precision for precision, _ in cells)), sorted({rate for _, rate in cells})


def _words(cell: Cell, between: str) -> str:
    """Return a cell in words."""
    parts = [f"{cell.share:.0%} of {cell.ended}"] if cell.share is not None else ["no run"]
    if cell.median is not None:
        parts.append(f"{cell.median:.4g}")
    if cell.failed:
        parts.append(f"{cell.failed} failed")
    return between.join(parts)


def markdown_table(cells: dict[tuple[str, float], Cell], metric: str) -> str:
    """Return the table: a row for each precision, a column for each rate."""
    precisions, rates = _axes(cells)
    rows = [["precision", *(f"lr {rate!r}" for rate in rates)]]
    rows += [[name, *(_words(cells[name, rate], "; ") for rate in rates)] for name in precisions]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    head = f"Share of runs that diverged; after it the median {metric} at the end of those that did not.\n\n"
    return head + "\n".join(lines) + "\n"


def all_results(
    runs: Sequence[Run],
    results: dict[Run, dict[str, Any]],
    failed: Sequence[Run],
    cells: dict[tuple[str, float], Cell],
    share: float,
) -> dict[str, Any]:
    """Return everything for the JSON file."""
    listed = []
    for run in runs:
        status = "ended" if run in results else "failed" if run in failed else "not run"
        record = results.get(run, {})
        why = divergence(record, share) if record else ""
        listed.append({**run._asdict(), "status": status, "diverged": bool(why), "why": why, **record})
    table = [
        {"precision": precision, "lr": rate, **cell._asdict(), "share": cell.share}
        for (precision, rate), cell in cells.items()
    ]
    return {"diverged_at": share, "runs": listed, "cells": table}


def draw_map(cells: dict[tuple[str, float], Cell], path: Path, title: str, metric: str) -> None:
    """Draw the share that diverged over learning rate and precision.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    precisions, rates = _axes(cells)
    size = (2.4 + 1.25 * max(2, len(rates)), 1.7 + 0.6 * len(precisions))
    figure = new_figure("The heat map", size)
    axis = figure.subplots()
    shares = [[cells[name, rate].share for rate in rates] for name in precisions]
    known = [[float("nan") if share is None else share for share in row] for row in shares]
    image = axis.imshow(known, cmap="OrRd", vmin=0, vmax=1, aspect="auto")
    for row, name in enumerate(precisions):
        for column, rate in enumerate(rates):
            dark = (shares[row][column] or 0) > 0.6
            text = _words(cells[name, rate], "\n")
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axis.set_xticks(range(len(rates)), [repr(rate) for rate in rates])
    axis.set_yticks(range(len(precisions)), precisions)
    axis.tick_params(length=0, labelsize=9)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("learning rate")
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1], pad=0.02)
    bar.ax.set_yticklabels(["0%", "50%", "100%"], fontsize=8)
    bar.set_label("runs that diverged", fontsize=8)
    bar.outline.set_visible(False)
    axis.set_title(f"{title}\nbelow the share: median {metric} of the others", fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
