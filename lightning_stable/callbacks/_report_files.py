"""Where StabilityReport writes: its file every now and then, its page at the end; nothing of it ends a run."""

import time
import warnings
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_stable._report.read_json import FILE_NAME
from lightning_stable._report.write import as_json, write_atomically

__all__ = ["PAGE_NAME", "ReportFiles"]

PAGE_NAME = "report.html"
# Between two writings of the file within a fit.
_SECONDS = 30.0


class ReportFiles:
    """The files of a run.

    Args:
        directory: Where they go; ``None``: the logger's directory.
        pictures: Write each picture of the page as a PNG, too.

    Raises:
        ValueError: If ``directory`` is a file.
    """

    def __init__(self, directory: str | None, *, pictures: bool) -> None:
        if directory is not None and Path(directory).is_file():
            raise ValueError(
                f"directory={directory!r} of StabilityReport is a file. Name a folder, or leave it to None."
            )
        self._directory = directory
        self._pictures = pictures
        self._folder: Path | None = None
        self._told: set[str] = set()
        self._written_at = 0.0

    @property
    def due(self) -> bool:
        """Whether the file was last written a while ago."""
        return time.monotonic() - self._written_at >= _SECONDS

    def begin(self, trainer: Trainer) -> None:
        """Find the folder of a fit, on all processes, which have to agree."""
        self._written_at = time.monotonic()
        self._folder = None if self._directory is None else Path(self._directory)
        if self._folder is None and trainer.loggers and not cast(Any, trainer).fast_dev_run:
            found = trainer.log_dir
            self._folder = None if found is None else Path(found)
        if self._folder is None:
            self.once(
                "StabilityReport writes no files: the Trainer's logger has no directory. Give one: "
                "StabilityReport(directory=...)."
            )

    def write(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write the file."""
        self._written_at = time.monotonic()
        if self._folder is None or not trainer.is_global_zero:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / FILE_NAME, as_json(record))
        except Exception as error:  # also what a record holds that JSON has no word for
            self._complain("file", error)

    def write_page(self, trainer: Trainer) -> None:
        """Write the page, of everything that is in the folder."""
        if self._folder is None or not trainer.is_global_zero:
            return
        from lightning_stable._report.page import write_page, write_pictures
        from lightning_stable._report.read import read_run

        try:
            for logger in trainer.loggers:
                logger.save()  # what it has not written yet
            runs, page = [read_run(self._folder)], self._folder / PAGE_NAME
            written = write_page(runs, page)
            rank_zero_info(f"StabilityReport: the page of this run is {page}")
            if written.without_pictures:
                rank_zero_warn(f"StabilityReport wrote a page without pictures. {written.without_pictures}")
            elif self._pictures:
                write_pictures(runs, page)
        except Exception as error:  # the run is done, whatever its page does
            self._complain("page", error)

    def say_how(self, trainer: Trainer) -> None:
        """Say how the page of a fit that failed is made: its end is no time for drawing."""
        if self._folder is not None and trainer.is_global_zero and (self._folder / FILE_NAME).is_file():
            rank_zero_info(f"StabilityReport: the page of this run is made by: lightning-stable report {self._folder}")

    def once(self, message: str) -> None:
        """Say something once."""
        if message not in self._told:
            rank_zero_info(message)
        self._told.add(message)

    def _complain(self, what: str, error: Exception) -> None:
        if what not in self._told:
            warnings.warn(
                f"StabilityReport: its {what} could not be written ({type(error).__name__}: {error}). The run goes on.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._told.add(what)
