"""Figures for the pictures that are drawn here and there, from a library that need not be installed."""

from typing import Any

__all__ = ["new_figure"]


def new_figure(what: str, size: tuple[float, float]) -> Any:
    """Return an empty figure of matplotlib, which keeps what is drawn within its edges.

    Args:
        what: What is drawn, for the message.
        size: Width and height in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{what} needs matplotlib, which is missing. Get it by: pip install 'lightning-stable[plots]'"
        ) from error
    return Figure(figsize=size, dpi=150, layout="constrained")
