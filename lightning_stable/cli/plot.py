"""``lightning-stable plot``: the table and the picture of a ``stability_gap.json``, without importing torch."""

import sys
from pathlib import Path

from lightning_stable.callbacks._gap_picture import draw_gap
from lightning_stable.callbacks._gap_record import FILE_NAME, read_record, summary_table
from lightning_stable.cli.locate import PICTURE_FORMATS, CommandError, short_path

__all__ = ["plot"]

# How many folders below the given one a record may lie, and how many files of them are named.
_DEEPEST = 4
_NAMED = 4


def plot(source: str, output: str | None = None) -> None:
    """Print the table of a record, write its picture, and say where that is.

    Args:
        source: The file, or the folder of the run that holds it; of a folder above, the newest record below is taken,
            and the others are named.
        output: The picture's file, whose suffix is its format, or a folder for it. Without a suffix it is a PNG;
            without anything it lies beside the record.

    Raises:
        CommandError: If there is no such record, or it cannot be read or drawn.
    """
    path = _find(Path(source))
    picture = _picture(path, output)
    try:
        record = read_record(path)
        sys.stdout.write(summary_table(record))
        # Of the folders that the record lies in, however the picture is called.
        drawn = draw_gap(record, picture, title="Stability gap: " + "/".join(path.resolve().parts[-3:-1]))
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    if not drawn:
        raise CommandError(f"There is no picture to draw: {path} has no score of any task.")
    sys.stdout.write(f"Picture: {short_path(picture)}\n")


def _find(path: Path) -> Path:
    """Return the record's file."""
    if path.is_file():
        if path.suffix != ".json":
            beside = path.with_name(FILE_NAME)
            hint = f"There is one beside it: {beside}." if beside.is_file() else f"Give a {FILE_NAME}, or its folder."
            raise CommandError(f"{path} is no file of StabilityGap. {hint}")
        return path
    if not path.is_dir():
        raise CommandError(f"There is no file or folder {path}. Give a {FILE_NAME}, or the folder of a run with one.")
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    below = (found for depth in range(1, _DEEPEST + 1) for found in path.glob("*/" * depth + FILE_NAME))
    records = sorted(below, key=lambda found: (-found.stat().st_mtime, found))
    if not records:
        raise CommandError(
            f"{path} holds no {FILE_NAME}, nor does a folder below. The callback StabilityGap writes it."
        )
    newest, *others = records
    sys.stdout.write(f"Read {newest}{', the newest' if others else ''}\n")
    if others:
        more = [f"and {len(others) - _NAMED} more"] if len(others) > _NAMED else []
        sys.stdout.write(f"There are also {', '.join([*map(str, others[:_NAMED]), *more])}\n")
    return newest


def _picture(path: Path, output: str | None) -> Path:
    """Return where to draw."""
    if output is None:
        return path.with_suffix(".png")
    given = Path(output)
    if given.is_dir():
        return given / f"{path.stem}.png"
    if not given.parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {given.parent}. Create it, or name another one.")
    if given.suffix not in ("", *PICTURE_FORMATS):
        *first, last = PICTURE_FORMATS
        raise CommandError(f"--output {output}: a picture is {', '.join(first)} or {last}, not {given.suffix}.")
    return given if given.suffix else given.with_suffix(".png")
