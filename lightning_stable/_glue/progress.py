"""Progress of long work beside training, in the manner of the Trainer's own bar, and quiet where that is.

It imports what it shows with where that is needed: commands without a Trainer use it, too.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["DELAY", "follow", "follow_command", "progress"]

DELAY = 1.0
"""Seconds after which work that may be short shows its bar: one that comes and goes at every step is in the way."""

_Item = TypeVar("_Item")


def progress(
    trainer: "Trainer", items: Iterable[_Item], told: str, total: float | None = None, delay: float = DELAY
) -> Iterator[_Item]:
    """Yield items, and show how many are done.

    Args:
        trainer: The Trainer, in whose manner it is shown: by Rich, by tqdm, or not at all. On the first process alone.
        items: The items.
        told: What is done, for people.
        total: How many items there are; ``None`` or infinity where that is not known.
        delay: Seconds after which the bar comes.
    """
    with follow(trainer, told, total, delay) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def follow(
    trainer: "Trainer", told: str, total: float | None = None, delay: float = DELAY
) -> Iterator[Callable[[], None]]:
    """Return what is to be called after each of so many pieces of work; arguments are as of :func:`progress`."""
    known = int(total) if total is not None and total < float("inf") else None
    bar: Any = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or not getattr(bar, "is_enabled", True):
        yield _nothing
        return
    from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBar

    shown = _Late(_rich_bar if isinstance(bar, RichProgressBar) else _tqdm_bar, told, known, delay)
    try:
        shown.advance(0)
        yield shown.advance
    finally:
        shown.close()


@contextmanager
def follow_command(told: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """Return what is to be called after each of so many pieces of a command's work; quiet off a terminal.

    Args:
        told: What is done, for people.
        total: How many pieces there are.
        done: How many of them are done already.
    """
    if not sys.stdout.isatty():
        yield _nothing
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(told, total=total, completed=done)
        yield lambda: bar.advance(task)


class _Late:
    """A bar that comes after a while: to make one takes longer than many a piece of work."""

    def __init__(self, make: Callable[[str, int | None, int], Any], told: str, total: int | None, delay: float) -> None:
        self._make = make
        self._told = told
        self._total = total
        self._due = time.monotonic() + delay
        self._done = 0
        self._bar: Any = None

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._due:
            self._bar = self._make(self._told, self._total, self._done)
            self._due = float("inf")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _tqdm_bar(told: str, total: int | None, done: int) -> Any:
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

    return Tqdm(desc=told, total=total, initial=done, leave=False)


def _rich_bar(told: str, total: int | None, done: int) -> Any:
    from rich.errors import LiveError

    try:
        return _RichBar(told, total, done)
    except LiveError:
        return None  # Rich before 14.1 shows one at a time, and the Trainer's is there


class _RichBar:
    """Rich's bar, by the names that tqdm has for what is done with it."""

    def __init__(self, told: str, total: int | None, done: int) -> None:
        from rich.progress import Progress

        self._bar = Progress(transient=True)
        self._task = self._bar.add_task(told, total=total, completed=done)
        self._bar.start()

    def update(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def close(self) -> None:
        self._bar.stop()


def _nothing() -> None:
    """Stand in for a bar."""
