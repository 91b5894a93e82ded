"""The picture of `peft_convergence`: validation loss against steps, one line for each method."""

from collections.abc import Mapping
from pathlib import Path

from lightning_stable._glue.figures import new_figure

__all__ = ["draw"]

# What adapters are compared with, in greys.
_PLAIN = {"LoRA": "black", "full": "0.6"}


def draw(path: Path, curves: Mapping[str, Mapping[int, float]], goal: float, seeds: int) -> None:
    """Draw and write the picture.

    Args:
        path: Where to.
        curves: Median validation loss by step, of each method.
        goal: Final loss of LoRA, drawn across.
        seeds: How many runs a median is over.
    """
    figure = new_figure("The picture of peft_convergence", (9.0, 5.5))
    axes = figure.subplots()
    for name, losses in curves.items():
        look = {"color": _PLAIN[name], "linewidth": 2.5} if name in _PLAIN else {"linewidth": 1.5}
        dashed = "--" if name.endswith("of peft") else "-"
        axes.plot(list(losses), list(losses.values()), linestyle=dashed, label=name, **look)
    axes.axhline(goal, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer steps on prose", ylabel="validation loss, nats a byte")
    axes.set_title(f"Fine-tuning from code to prose, each at its best rate, medians of {seeds} seeds")
    later = [loss for losses in curves.values() for step, loss in losses.items() if step > 0]
    start = max(losses[min(losses)] for losses in curves.values())
    # The first steps are the same for all, and would leave no room for what differs.
    axes.set_ylim(min(later) - 0.02, min(start, max(later)) + 0.02)
    axes.legend(ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path)
