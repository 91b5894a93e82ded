"""What a training run says at its end: a table of its budgets or what was measured last, a picture, its files."""

import csv
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_stable.callbacks._gap_report import PICTURE_NAME
from lightning_stable.callbacks.stability_gap import StabilityGap
from lightning_stable.callbacks.wsd import WarmupStableDecay
from lightning_stable.cli.locate import short_path

__all__ = [
    "LIVE",
    "BudgetRow",
    "Metrics",
    "budget_rows",
    "last_validation",
    "logged_budgets",
    "print_interrupted",
    "print_summary",
    "read_metrics",
    "validation_metrics",
    "warn_if_untrained",
]

LIVE = "_live"

Metrics = dict[str, list[tuple[int, float]]]
"""For each column of a log: its values with their optimizer steps, in order."""


class BudgetRow(NamedTuple):
    """One row of the table.

    Attributes:
        step: The budget, in optimizer steps.
        values: For each metric its value at the budget, ``None`` where it was not measured there.
        checkpoint: The file saved there, if any.
    """

    step: int
    values: dict[str, float | None]
    checkpoint: Path | None


def read_metrics(path: Path) -> Metrics:
    """Read the ``metrics.csv`` of a CSVLogger.

    Args:
        path: The file.

    Returns:
        Every numeric column by name; cells that are empty or not finite are left out.
    """
    metrics: Metrics = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, cell in row.items():
                value = _number(cell)
                if name not in ("step", "epoch") and value is not None:
                    metrics.setdefault(name, []).append((int(step), value))
    return metrics


def validation_metrics(metrics: Metrics) -> list[str]:
    """Return the validation metrics, each followed by its twin of the live weights where there is one."""
    names = [name for name in metrics if name.startswith("val") and not name.endswith(LIVE)]
    # The loss is what the schedule acts on; what people ask for first is everything else.
    names.sort(key=lambda name: ("loss" in name, name))
    return [column for name in names for column in (name, name + LIVE) if column in metrics]


def budget_rows(metrics: Metrics, budgets: list[int], folders: list[Path], late: int = 0) -> list[BudgetRow]:
    """Collect what was measured at each budget.

    Args:
        metrics: The run's log.
        budgets: Step counts, increasing.
        folders: Where checkpoints may be.
        late: By how many steps the log's numbers are too high, as they are after some resumes.
    """
    rows = []
    for budget in budgets:
        # The host counts from zero: a validation after optimizer step b is logged at b - 1, one after b + 1 at b.
        values = {name: dict(metrics[name]).get(budget - 1 + late) for name in validation_metrics(metrics)}
        files = (folder / f"budget-{budget}.ckpt" for folder in folders)
        rows.append(BudgetRow(budget, values, next((file for file in files if file.exists()), None)))
    return rows


def logged_budgets(metrics: Metrics, budgets: list[int], late: int = 0) -> list[int]:
    """Return the budgets that do not lie before the log of a run that went on from a checkpoint.

    Args:
        metrics: The run's log.
        budgets: Step counts, increasing.
        late: By how many steps the log's numbers are too high, as they are after some resumes.
    """
    first = min((points[0][0] for points in metrics.values()), default=0)
    return [budget for budget in budgets if budget - 1 + late >= first]


def last_validation(metrics: Metrics, late: int = 0) -> str:
    """Return a line with what the last validation measured; nothing where there was none.

    Args:
        metrics: The run's log.
        late: By how many steps the log's numbers are too high, as they are after some resumes.
    """
    names = validation_metrics(metrics)
    if not names:
        return ""
    last = max(metrics[name][-1][0] for name in names)
    values = [f"{name} {metrics[name][-1][1]:.4f}" for name in names if metrics[name][-1][0] == last]
    # The host counts from zero, as in budget_rows.
    return f"Last validation, at step {last + 1 - late}: {', '.join(values)}\n"


def print_summary(trainer: Trainer, folder: Path) -> None:
    """Print the table of budgets or the last validation, write the picture, and name the folder and other pictures.

    Args:
        trainer: A Trainer whose fit is over. Nothing is printed after ``fast_dev_run``, which keeps no files.
        folder: Its ``log_dir``.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    csv_file = _metrics_file(trainer)
    metrics = read_metrics(csv_file) if csv_file else {}
    budgets = reached = _budgets(trainer)
    if trainer.ckpt_path is not None:
        # Earlier budgets are in the log of the earlier run, which is not read: the checkpoint may have been moved away
        # from it, and a log beside it may go beyond the checkpoint or be that of another run.
        budgets = logged_budgets(metrics, reached, _late(trainer))
    if metrics and budgets:
        rows = budget_rows(metrics, budgets, _checkpoint_folders(trainer, folder), _late(trainer))
        _print_table(rows)
        if missed := [row.step for row in rows if None in row.values.values()]:
            sys.stdout.write(f"{_missed(missed, trainer)}\n")
        if earlier := reached[: -len(budgets)]:
            sys.stdout.write(_earlier(earlier))
    elif not any(isinstance(callback, StabilityGap) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        sys.stdout.write(last_validation(metrics, _late(trainer)))
    if metrics:
        _write_picture(metrics, folder / "training.png", budgets)
    elif not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
        sys.stdout.write("No table or picture: they are made from a CSVLogger's metrics.csv (trainer.logger).\n")
    for picture in _gap_pictures(trainer, folder):  # its table was printed where each task ended
        sys.stdout.write(f"Picture: {short_path(picture)}\n")
    sys.stdout.write(f"The run's files are in {short_path(folder)}\n")


def print_interrupted(trainer: Trainer, started: float) -> None:
    """Say on stderr where the files of a run are that was interrupted, and how to go on, if it left a checkpoint.

    Args:
        trainer: The Trainer, on the first process. The others are not asked: they may be gone.
        started: The time at which the run began. Older checkpoints in a folder are those of other runs.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    logger = next(iter(trainer.loggers), None)
    folder = Path(getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None) or trainer.default_root_dir)
    saved = [path for place in _checkpoint_folders(trainer, folder) for path in place.glob("*.ckpt")]
    times = {path.stat().st_mtime: path for path in saved}
    if times and max(times) >= started:
        newest = shlex.quote(short_path(times[max(times)]))
        sys.stderr.write(
            f"lightning-stable: interrupted. The run's files are in {short_path(folder)}. To go on, give the same "
            f"command with --ckpt_path {newest}\n"
        )


def warn_if_untrained(trainer: Trainer) -> None:
    """Say on stderr if a run was to go on from a checkpoint at or beyond its end, so that nothing was trained.

    Args:
        trainer: A Trainer whose fit is over.
    """
    if not trainer.fit_loop.is_resuming:  # from the loading of a checkpoint on, until an epoch is over or stopped in
        return
    for name, reached, limit in (
        ("step", trainer.global_step, trainer.max_steps),
        ("epoch", trainer.current_epoch, trainer.max_epochs or -1),
    ):
        if 0 < limit <= reached:
            place = "beyond" if limit < reached else "where the run ends by"
            sys.stderr.write(
                f"lightning-stable: warning: nothing was trained: the checkpoint is at {name} {reached}, {place} "
                f"trainer.max_{name}s={limit}. Raise that to train on.\n"
            )
            return


def _gap_pictures(trainer: Trainer, folder: Path) -> list[Path]:
    """Return the pictures that StabilityGap has drawn."""
    drawn = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StabilityGap) and callback.picture:
            drawn.append(Path(callback.directory or folder) / PICTURE_NAME)
    return [path for path in drawn if path.is_file()]


def _late(trainer: Trainer) -> int:
    """Return by how many steps the host's logs run ahead: it adds one at each resume from the end of a batch."""
    return max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - trainer.global_step)


def _budgets(trainer: Trainer) -> list[int]:
    """Return the budgets that the run has reached, its end included."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WarmupStableDecay) and callback.budgets:
            ends = [*callback.budgets, trainer.global_step]
            return sorted({end for end in ends if end <= trainer.global_step})
    return []


def _metrics_file(trainer: Trainer) -> Path | None:
    """Return the log that the table and the picture are read from."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / "metrics.csv"
            return path if path.is_file() else None
    return None


def _checkpoint_folders(trainer: Trainer, folder: Path) -> list[Path]:
    """Return where this run's checkpoints may lie."""
    given = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [Path(path) for path in given if path] + [folder / "checkpoints"]


def _print_table(rows: list[BudgetRow]) -> None:
    """Print one row a budget."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = list(rows[0].values)
    table = Table(title="At each budget", title_justify="left", box=box.SIMPLE)
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(_heading(name, names), justify="right")
    table.add_column("checkpoint", overflow="fold")
    for row in rows:
        values = ["-" if value is None else f"{value:.4f}" for value in row.values.values()]
        table.add_row(str(row.step), *values, row.checkpoint.name if row.checkpoint else "-")
    # Off a terminal rich would assume 80 columns and fold the paths.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    folders = dict.fromkeys(short_path(row.checkpoint.parent) for row in rows if row.checkpoint)
    sys.stdout.writelines(f"Checkpoints: {folder}\n" for folder in folders)


def _missed(steps: list[int], trainer: Trainer) -> str:
    """Say why cells are empty, and what fills them."""
    plural = "s" if len(steps) > 1 else ""
    # The last row is the end of the run, which need not be where it was meant to be.
    end = "trainer.max_steps" if trainer.global_step == trainer.max_steps else "the step at which the run ends"
    what = ["the budgets"] * any(step < trainer.global_step for step in steps)
    what += [end] * (trainer.global_step in steps)
    null = "" if trainer.check_val_every_n_epoch is None else ", with check_val_every_n_epoch: null"
    return (
        f"No validation ran at step{plural} {', '.join(map(str, steps))}. For a number there let "
        f"trainer.val_check_interval, now {trainer.val_check_interval}, divide {' and '.join(what)}{null}."
    )


def _earlier(steps: list[int]) -> str:
    """Say which budgets have no row, and where their numbers are."""
    plural = "s" if len(steps) > 1 else ""
    return (
        f"Budget{plural} {', '.join(map(str, steps))}: before the log of this run, which went on from a checkpoint; "
        "see that of the earlier run.\n"
    )


def _heading(name: str, names: list[str]) -> str:
    """Return a column's heading; where a metric has two columns it says whose weights."""
    if name.endswith(LIVE):
        return f"{name.removesuffix(LIVE)}\nlive weights"
    return f"{name}\nEMA weights" if name + LIVE in names else name


def _write_picture(metrics: Metrics, path: Path, budgets: list[int]) -> None:
    """Write the picture, or say how to get it."""
    from lightning_stable.cli.picture import draw_training

    try:
        if draw_training(metrics, path, budgets=budgets):
            sys.stdout.write(f"Picture: {short_path(path)}\n")
    except ModuleNotFoundError as error:
        sys.stdout.write(f"No picture: {error}\n")


def _number(cell: str | None) -> float | None:
    """Return a cell's finite number."""
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
