"""How StabilityGap tells what it found: to the loggers, on the screen, in its files; and what went wrong."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_stable.callbacks._gap_log import GapLog
from lightning_stable.callbacks._gap_record import FILE_NAME, summary_table, write_record

__all__ = ["PICTURE_NAME", "GapReport"]

PICTURE_NAME = "stability_gap.png"


class GapReport:
    """The way out of a :class:`.GapLog`.

    Args:
        log: What was found.
        directory: Where files go; ``None``: the logger's directory.
        picture: Whether to draw.
        strict: Whether failures end the run.

    Attributes:
        begun: Whether the first evaluation of the fit has worked: from then on failures are told, not raised.

    Raises:
        ValueError: If ``directory`` is a file.
    """

    def __init__(self, log: GapLog, directory: str | None, *, picture: bool, strict: bool) -> None:
        if directory is not None and Path(directory).is_file():
            raise ValueError(f"directory={directory!r} of StabilityGap is a file. Name a folder, or leave it to None.")
        self._log = log
        self._directory = directory
        self._picture = picture
        self._strict = strict
        self._folder: Path | None = None
        self.begun = False
        self.forget()

    def forget(self) -> None:
        """Say everything anew."""
        self._failed = False
        self._rows = 0
        self._told: set[str] = set()

    def begin(self, trainer: Trainer) -> None:
        """Find the folder for a fit's files, on all processes, which have to agree."""
        self.begun = False
        self._folder = None if self._directory is None else Path(self._directory)
        if self._folder is None and trainer.loggers and not cast(Any, trainer).fast_dev_run:
            folder = trainer.log_dir
            self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            self.once(
                "StabilityGap writes no stability_gap.json: the Trainer's logger has no directory. Give one: "
                "StabilityGap(directory=...)."
            )

    def once(self, message: str) -> None:
        """Say something once."""
        if message not in self._told:
            rank_zero_info(message)
        self._told.add(message)

    @contextmanager
    def tolerance(self) -> Iterator[None]:
        """Let an evaluation fail without an end to training, once the first of the fit has worked."""
        try:
            yield
        except Exception as error:
            if self._strict or not self.begun:
                raise
            self._complain(f"an evaluation failed ({type(error).__name__}: {error})")

    def send(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write values to the loggers, and complain of scores that are not numbers."""
        if self._log.broken:
            what = f"the score of task {min(self._log.broken)} is not a number"
            self._log.broken = set()
            if self._strict:
                raise RuntimeError(f"StabilityGap: {what}.")
            self._complain(what)
        for logger in trainer.loggers:
            # The host logs what comes of a step under the number of steps before it, of one optimizer.
            logger.log_metrics(
                {name: value for name, value in values.items() if math.isfinite(value)},
                step=max(0, trainer.global_step // max(1, len(trainer.optimizers)) - 1),
            )

    def end_of_task(self, trainer: Trainer, task: int) -> None:
        """Tell of a task that has ended."""
        self.send(trainer, self._log.ended())
        record = self._log.record(provisional=False)
        self._tell(f"StabilityGap at the end of task {task}", record)
        self._write(trainer, record, picture=False)

    def end_of_fit(self, trainer: Trainer) -> None:
        """Tell of everything so far."""
        self.send(trainer, self._log.latest())
        record = self._log.record()
        self._rows = 0
        self._tell("StabilityGap at the end of the fit", record)
        self._write(trainer, record, picture=self._picture)

    def failure(self, trainer: Trainer) -> None:
        """Save what there is, whatever has happened."""
        try:
            if self._log.begun:
                self._write(trainer, self._log.record(), picture=False)
        except Exception as error:
            self._complain(f"its file could not be written ({type(error).__name__}: {error})")

    def _tell(self, title: str, record: dict[str, Any]) -> None:
        """Print the rows of the table that were not printed yet."""
        rows = max((len(entries) for entries in record["summary"].values()), default=0)
        new = {weights: entries[self._rows :] for weights, entries in record["summary"].items()}
        if any(new.values()):
            rank_zero_info(f"{title}:\n{summary_table({**record, 'summary': new})}")
        self._rows = rows

    def _write(self, trainer: Trainer, record: dict[str, Any], *, picture: bool) -> None:
        """Write the file, and the picture if it is wanted and matplotlib is there; a full disk is no end to a run."""
        if self._folder is None or not trainer.is_global_zero:
            return
        try:
            write_record(record, self._folder / FILE_NAME)
            if picture:
                from lightning_stable.callbacks._gap_picture import draw_gap

                draw_gap(record, self._folder / PICTURE_NAME)
        except ImportError as error:
            self.once(f"StabilityGap drew no picture: {error}")
        except (OSError, ValueError) as error:
            self._complain(f"its files could not be written ({type(error).__name__}: {error})")

    def _complain(self, what: str) -> None:
        """Report a failure, once."""
        if not self._failed:
            warnings.warn(
                f"StabilityGap: {what}. Training goes on; what fails from now on is not said again. With strict=True a "
                "failed evaluation ends the run.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._failed = True
