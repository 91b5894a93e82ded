"""Where StabilityGap's file and picture go, and how they get there."""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_stable.callbacks._gap_record import FILE_NAME, write_record

__all__ = ["PICTURE_NAME", "find_folder", "write_files"]

PICTURE_NAME = "stability_gap.png"


def find_folder(trainer: Trainer, directory: str | None) -> Path | None:
    """Return the folder for a run's files, ``None`` if it has none; asked on all processes, which have to agree.

    Args:
        trainer: The Trainer.
        directory: What the user asked for; ``None``: the logger's own.

    Raises:
        ValueError: If that is a file.
    """
    if directory is not None:
        if Path(directory).is_file():
            raise ValueError(f"directory={directory!r} of StabilityGap is a file. Name a folder, or leave it to None.")
        return Path(directory)
    if not trainer.loggers or cast(Any, trainer).fast_dev_run:
        return None
    folder = trainer.log_dir
    return None if folder is None else Path(folder)


def write_files(record: dict[str, Any], folder: Path, *, picture: bool) -> None:
    """Write ``stability_gap.json``, and the picture if it is wanted and matplotlib is there."""
    write_record(record, folder / FILE_NAME)
    if not picture:
        return
    try:
        from lightning_stable.callbacks._gap_picture import draw_gap

        draw_gap(record, folder / PICTURE_NAME)
    except ImportError as error:
        rank_zero_info(f"StabilityGap drew no picture: {error}")
