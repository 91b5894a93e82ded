"""A picture of what a number format does: one heat map for each operand, layers over optimizer steps."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_stable._glue.figures import new_figure
from lightning_stable.functional.numerics_monitor import MEASURES, OPERANDS

__all__ = ["draw_numerics"]

_MOST_LAYERS = 60
_MOST_STEPS = 400
"""Columns that reports are joined to, each the worst of its own; about one a pixel."""
_NOTHING, _UNSEEN, _TEXT = "#ffffff", "#d5d9dd", "#4a4a4a"


class _Look(NamedTuple):
    """How a measure is drawn: its name in short lines, its colours, whether high is bad, the scale."""

    label: str
    colors: str
    high_is_bad: bool
    logarithmic: bool


_LOOKS = {
    "underflow": _Look("share of nonzero entries\nthat became 0", "YlOrRd", True, True),
    "saturation": _Look("share of entries beyond\nthe largest value", "YlOrRd", True, True),
    "sqnr": _Look("signal to quantization\nnoise, dB", "RdYlBu", False, False),
    "absmax": _Look("largest magnitude", "viridis", True, True),
}
_LOWEST_SHARE = 1e-5


def draw_numerics(record: dict[str, Any], path: str | Path, name: str = "underflow", title: str | None = None) -> bool:
    """Write the picture of a record.

    Args:
        record: What :meth:`.NumericsMonitor.record` returns.
        path: Where to write; the suffix decides the format.
        name: The measure.
        title: Above the picture; by default the folders that the file lies in.

    Returns:
        Whether there was anything to draw.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    path, look = Path(path), _LOOKS[name]
    values = record["values"][..., MEASURES.index(name)]
    if not bool(values.isfinite().any()):
        return False
    layers = _worst_layers(record["rows"], values, look)
    operands = [operand for operand in OPERANDS if any(row[1] == operand for row in record["rows"])]
    steps, values = _joined(record["steps"], values, look)
    height = 1.4 + max(1.2, 0.17 * len(layers))
    figure = new_figure("The picture", (2.2 + 2.9 * len(operands), height))
    axes = figure.subplots(1, len(operands), sharey=True, squeeze=False)[0]
    norm = _norm(look, values)
    for axis, operand in zip(axes, operands, strict=True):
        mesh = _draw_operand(axis, record["rows"], layers, operand, steps, values, look, norm)
    axes[0].set_yticks([place + 0.5 for place in range(len(layers))], layers, fontsize=7)
    axes[0].invert_yaxis()
    figure.supxlabel("optimizer step", fontsize=8)
    bar = figure.colorbar(mesh, ax=list(axes), pad=0.015, aspect=25)
    bar.set_label(f"{look.label} (white: 0)" if look.logarithmic else look.label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title or "Numerics: " + "/".join(path.resolve().parts[-3:-1]), fontsize=10, x=0.01, ha="left")
    hidden = len({row[0] for row in record["rows"]}) - len(layers)
    if hidden:
        figure.text(0.99, 0.995, f"the worst {len(layers)} layers, {hidden} more", fontsize=7, ha="right", va="top")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _worst_layers(rows: list[list[str]], values: Tensor, look: _Look) -> list[str]:
    """Return the layers to draw, in the order of the module; of too many those that are worst somewhere."""
    layers = list(dict.fromkeys(row[0] for row in rows))
    if len(layers) <= _MOST_LAYERS:
        return layers
    bad = values if look.high_is_bad else -values
    worst = dict.fromkeys(layers, -math.inf)
    for row, value in zip(rows, bad.nan_to_num(-math.inf, -math.inf, -math.inf).amax(0).tolist(), strict=True):
        worst[row[0]] = max(worst[row[0]], value)
    chosen = set(sorted(layers, key=lambda layer: -worst[layer])[:_MOST_LAYERS])
    return [layer for layer in layers if layer in chosen]


def _joined(steps: list[int], values: Tensor, look: _Look) -> tuple[list[int], Tensor]:
    """Return at most so many columns: of the reports that share one the last step and the worst values."""
    if len(steps) <= _MOST_STEPS:
        return steps, values
    ends = [(part + 1) * len(steps) // _MOST_STEPS for part in range(_MOST_STEPS)]
    columns = values.new_full((_MOST_STEPS, values.shape[1]), math.nan)
    for part, end in enumerate(ends):
        stretch = values[ends[part - 1] if part else 0 : end]
        unseen = -math.inf if look.high_is_bad else math.inf
        filled = stretch.nan_to_num(unseen, math.inf, -math.inf)
        worst = filled.amax(0) if look.high_is_bad else filled.amin(0)
        columns[part] = worst.where(~stretch.isnan().all(0), math.nan)
    return [steps[end - 1] for end in ends], columns


def _norm(look: _Look, values: Tensor) -> Any:
    """Return how values become colours, the same for all operands."""
    from matplotlib.colors import LogNorm, Normalize

    finite = values[values.isfinite()]
    if not look.logarithmic:
        return Normalize(float(finite.min()), max(float(finite.max()), float(finite.min()) + 1.0))
    if look.colors == "viridis":
        positive = finite[finite > 0]
        low = float(positive.min()) if positive.numel() else 1.0
        return LogNorm(low, max(float(finite.max()), 10.0 * low))
    return LogNorm(_LOWEST_SHARE, 1.0)


def _draw_operand(
    axis: Any,
    rows: list[list[str]],
    layers: list[str],
    operand: str,
    steps: list[int],
    values: Tensor,
    look: _Look,
    norm: Any,
) -> Any:
    """Draw one operand's map and return what its colours are read from."""
    import matplotlib
    import numpy as np

    places = {row[0]: place for place, row in enumerate(rows) if row[1] == operand}
    cells = np.full((len(layers), len(steps)), math.nan)
    for line, layer in enumerate(layers):
        if layer in places:
            cells[line] = values[:, places[layer]].numpy()
    # A ratio without noise, where nothing was lost, is as good as there is.
    cells = np.where(np.isinf(cells), norm.vmax, cells)
    colors = matplotlib.colormaps[look.colors].with_extremes(bad=_UNSEEN, under=_NOTHING)
    # A zero has no place on a logarithmic scale: just below its end it is drawn as nothing.
    drawn = np.where(cells == 0, norm.vmin * 0.5, cells) if look.logarithmic else cells
    mesh = axis.pcolormesh(_edges(steps), np.arange(len(layers) + 1), drawn, cmap=colors, norm=norm, rasterized=True)
    axis.set_title(operand, fontsize=9, color=_TEXT)
    axis.tick_params(labelsize=7)
    axis.set_facecolor(_UNSEEN)
    return mesh


def _edges(steps: list[int]) -> list[float]:
    """Return where columns begin and end: each at its own step, from the one before."""
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else max(1, steps[0]))
    return [float(max(0, first)) if first < steps[0] else 0.0, *map(float, steps)]
