"""What the tests of ``lightning-stable new`` share: the command, and what it wrote."""

from pathlib import Path

from lightning_stable.cli.main import main


def files(folder):
    """The text of every file, by its path."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def new(*arguments):
    assert main(["new", *arguments]) == 0
