"""``lightning-stable report``: one page of a run, or of several beside each other, without importing torch."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_stable.cli.locate import CommandError, short_path

if TYPE_CHECKING:
    from lightning_stable._report.run import Run

__all__ = ["PAGE_NAME", "add_options", "run"]

PAGE_NAME = "report.html"

_NAMED = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Write one self-contained HTML page of a run: loss with its spikes, learning rate, gradients, validation, and "
        "what callbacks of this library wrote. It reads what the CSVLogger, TensorBoard, StabilityReport, "
        "StabilityGap, NumericsMonitor or a sweep left in the folder. Of several runs each picture has a line for each."
    )
    parser.add_argument(
        "folders", metavar="RUN_DIR", nargs="+", help="the folder of a run, or one above (then the newest run below)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"the page; by default {PAGE_NAME} in the folder of the first run, or of several here, as comparison.html",
    )
    parser.add_argument(
        "--pngs", action="store_true", help="write each picture as a PNG, too, into a folder beside the page"
    )


def run(options: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    from lightning_stable._report.page import write_page, write_pictures

    folders = list(dict.fromkeys(_find(Path(folder)) for folder in options.folders))
    page = _page(options.output, folders)
    runs = _read(folders)
    try:
        written = write_page(runs, page)
        pictures = write_pictures(runs, page) if options.pngs else []
    except (OSError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    for note in [*(note for each in runs for note in each.notes), *written.notes]:
        sys.stdout.write(f"Note: {note}\n")
    if written.without_pictures:
        sys.stdout.write(f"No pictures: {written.without_pictures}\n")
    sys.stdout.write(f"Page: {short_path(page)}\n")
    if pictures:
        sys.stdout.write(f"Pictures: {len(pictures)} PNGs in {short_path(pictures[0].parent)}\n")
    return 0


def _find(path: Path) -> Path:
    """Return the folder of the run that is meant."""
    from lightning_stable._report.read import LOOKED_FOR, find_runs

    if path.is_file():
        raise CommandError(f"{path} is a file. Give the folder of a run: {short_path(path.parent)}")
    if not path.is_dir():
        raise CommandError(f"There is no folder {path}. Give the folder of a run, such as runs/quickstart/version_0.")
    found = find_runs(path)
    if not found:
        *first, last = LOOKED_FOR
        raise CommandError(
            f"{path} holds no run, nor does a folder below. Looked for {', '.join(first)} and {last}. A Trainer writes "
            "one of them with a CSVLogger, a TensorBoardLogger or the callback StabilityReport."
        )
    newest, *others = found
    if newest != path:
        sys.stdout.write(f"Read {short_path(newest)}{', the newest' if others else ''}\n")
    if others:
        more = [f"and {len(others) - _NAMED} more"] if len(others) > _NAMED else []
        sys.stdout.write(f"There are also {', '.join([*map(short_path, others[:_NAMED]), *more])}\n")
    return newest


def _read(folders: list[Path]) -> list["Run"]:
    """Read the runs, each with a name of its own."""
    from lightning_stable._report.read import LOOKED_FOR, read_run

    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    for found in runs:
        if not (found.series or found.gap or found.numerics or found.sweep):
            why = " ".join(found.notes) or f"Looked for {', '.join(LOOKED_FOR)}."
            raise CommandError(f"There is nothing to read in {short_path(found.folder)}. {why}")
    return runs


def _names(folders: list[Path]) -> list[str]:
    """Return the last folders of each path, as many as tell all of them apart; two at least."""
    parts = [[part for part in folder.resolve().parts if part != "/"] for folder in folders]
    depth = 2
    while depth < max(map(len, parts)) and len({tuple(each[-depth:]) for each in parts}) < len(parts):
        depth += 1
    return ["/".join(each[-depth:]) for each in parts]


def _page(output: str | None, folders: list[Path]) -> Path:
    """Return where to write."""
    default = PAGE_NAME if len(folders) == 1 else "comparison.html"
    if output is None:
        return folders[0] / PAGE_NAME if len(folders) == 1 else Path(default)
    given = Path(output)
    if given.is_dir():
        return given / default
    if not given.parent.is_dir():
        raise CommandError(f"--output {output}: there is no folder {given.parent}. Create it, or name another one.")
    if given.suffix not in ("", ".html", ".htm"):
        raise CommandError(f"--output {output}: the page is .html, not {given.suffix}.")
    return given if given.suffix else given.with_suffix(".html")
