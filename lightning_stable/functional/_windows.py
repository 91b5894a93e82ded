"""The largest drop and rise of a series within any window of so many values, at constant cost for each value."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Window", "check_windows", "pack_window", "push_window", "unpack_window"]


@dataclass
class Window:
    """The window over one series.

    Attributes:
        size: Values that a window holds, from 2 on.
        highs: Places and values of the candidates for the highest value before the next one, values falling.
        lows: The same for the lowest value, values rising.
        drop: The largest ``earlier - later`` so far; negative where the series only rose, ``None`` below two values.
        rise: The largest ``later - earlier`` so far.
    """

    size: int
    highs: deque[tuple[int, float]] = field(default_factory=deque)
    lows: deque[tuple[int, float]] = field(default_factory=deque)
    drop: float | None = None
    rise: float | None = None


def check_windows(windows: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes as a tuple.

    Raises:
        ValueError: If one is no whole number from 2 on, or is given twice.
    """
    try:
        sizes = tuple(windows)
    except TypeError:
        raise ValueError(f"windows={windows!r} is not a list of numbers of evaluations, such as [10, 100].") from None
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ValueError(
                f"The window {size!r} is not a number of evaluations from 2 on: a drop or a rise needs two. "
                "10 and 100 are usual."
            )
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"windows={list(sizes)} has a window twice. Give each one once.")
    return sizes


def push_window(window: Window, place: int, value: float) -> None:
    """Take the value at ``place`` of the series (0, 1, 2, ...) into the window, in place."""
    for candidates in (window.highs, window.lows):
        # Values at place - size + 1 and later share a window with the new one.
        while candidates and candidates[0][0] <= place - window.size:
            candidates.popleft()
    if window.highs:
        drop, rise = window.highs[0][1] - value, value - window.lows[0][1]
        window.drop = drop if window.drop is None else max(window.drop, drop)
        window.rise = rise if window.rise is None else max(window.rise, rise)
    # An older value that is no higher than this one will never again be the highest; so each goes in and out once.
    while window.highs and window.highs[-1][1] <= value:
        window.highs.pop()
    window.highs.append((place, value))
    while window.lows and window.lows[-1][1] >= value:
        window.lows.pop()
    window.lows.append((place, value))


def pack_window(window: Window) -> dict[str, Any]:
    """Return the window as numbers, lists and dictionaries."""
    return {
        "size": window.size,
        "highs": [list(candidate) for candidate in window.highs],
        "lows": [list(candidate) for candidate in window.lows],
        "drop": window.drop,
        "rise": window.rise,
    }


def unpack_window(packed: dict[str, Any]) -> Window:
    """Return the window that :func:`pack_window` was given."""
    highs, lows = (deque((int(place), float(value)) for place, value in packed[name]) for name in ("highs", "lows"))
    return Window(packed["size"], highs, lows, packed["drop"], packed["rise"])
