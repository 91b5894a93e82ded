"""Draws charts with matplotlib: as SVG whose colours follow the page, and as PNG."""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stable._glue.figures import new_figure
from lightning_stable._report.run import Points, finite, thin

__all__ = ["COLORS", "Chart", "HeatMap", "Line", "Panel", "as_svg", "range_of", "save_png"]

COLORS = ("#3478bf", "#e07b39", "#3a9a68", "#b5509c", "#8c6d31", "#5b5bd6", "#c0392b", "#21989c")
"""Of lines; they can be told apart on a light and on a dark ground."""

# What the page sets, by its name there: in a picture alone it is as given here.
INK, MUTED, GRID, PAPER = "#1f2a36", "#5c6875", "#dde3e8", "#fdfefe"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
SPIKE = "#d62f4b"
PHASES = {"warmup": "#f4e4b9", "stable": "#e3eef6", "decay": "#f8d8d3"}
_VARIABLES |= {color: f"--{name}" for name, color in PHASES.items()}

# Inches: a chart of the narrow kind has the width of a phone, and two of them that of a desk.
NARROW, WIDE = 4.9, 10.4
_LOWEST_SHARE = 1e-5


class Line(NamedTuple):
    """One line of a chart.

    Attributes:
        label: What it is, for the legend; empty for none.
        points: Its points.
        color: Its colour.
        faint: It is the ground of another one: thin and pale.
        bold: It is what counts of two that belong together.
        marked: Each point has a mark, since there are few.
        stepped: A value holds until the next one.
    """

    label: str
    points: Points
    color: str
    faint: bool = False
    bold: bool = False
    marked: bool = False
    stepped: bool = False


@dataclass
class Panel:
    """What is drawn in one pair of axes.

    Attributes:
        lines: Its lines.
        unit: What the values are.
        log: Whether the axis of values is logarithmic.
        spikes: Steps and values that are marked.
        spans: Stretches that are shaded: first step, last step, phase.
        switches: Steps with a dashed line, and what is written above it.
        fitted: The range of values is that of the lines, spikes left out; else matplotlib's choice.
        floor: Nothing below it is shown, on a logarithmic axis.
    """

    lines: list[Line]
    unit: str = ""
    log: bool = False
    spikes: Points = field(default_factory=list)
    spans: list[tuple[float, float, str]] = field(default_factory=list)
    switches: list[tuple[int, str]] = field(default_factory=list)
    fitted: bool = False
    floor: float = 0.0


@dataclass
class Chart:
    """One picture: panels above each other over one axis of steps.

    Attributes:
        name: Its file, without suffix.
        title: What stands above it on the page.
        panels: From top to bottom.
        text: What stands below it on the page.
        axis: What the common axis is.
        wide: It takes the width of the page.
        tall: Height of a panel in inches.
        shared: All panels have one range of values.
    """

    name: str
    title: str
    panels: list[Panel]
    text: str = ""
    axis: str = "optimizer step"
    wide: bool = False
    tall: float = 2.7
    shared: bool = False


@dataclass
class HeatMap:
    """One picture of values by row and step.

    Attributes:
        name: Its file, without suffix.
        title: What stands above it on the page.
        rows: Names of the rows.
        steps: Steps of the columns.
        values: A row of values each; ``None`` where there is none.
        unit: What the values are: a share.
        text: What stands below it on the page.
        wide: It takes the width of the page.
    """

    name: str
    title: str
    rows: list[str]
    steps: list[int]
    values: list[list[float | None]]
    unit: str
    text: str = ""
    wide: bool = False


def as_svg(chart: Chart | HeatMap, prefix: str, *, wide: bool) -> str:
    """Return a picture as an ``<svg>`` to be put into a page.

    Args:
        chart: What to draw.
        prefix: Begins all names within it, which are to be unique in the page.
        wide: In the width of a desk, not of a phone.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    with _settings({"svg.fonttype": "none", "svg.hashsalt": prefix, "path.simplify_threshold": 0.4}):
        figure = _drawn(chart, wide=wide)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    label = chart.title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    # A function, since a title may hold what a template of re takes for its own.
    text = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda begin: f'<svg {begin[1]} role="img" aria-label="{label}">',
        text,
    )
    return text.replace("xlink:href", "href")


def save_png(chart: Chart | HeatMap, path: Path) -> None:
    """Write a picture of its own, with its title.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    with _settings({}):
        figure = _drawn(chart, wide=chart.wide)
        figure.suptitle(_literal(chart.title), fontsize=10, weight="bold", x=0.01, ha="left", color=INK)
        figure.savefig(path, facecolor="white")


@contextmanager
def _settings(more: dict[str, Any]) -> Iterator[None]:
    """Draw with settings of our own, whatever the user's are."""
    try:
        import matplotlib
    except ImportError:
        new_figure("A picture", (1, 1))  # raises, and says how to get it
        raise
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        sizes = {"font.size": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5}
        lines = dict.fromkeys(("text.color", "axes.labelcolor"), INK)
        lines |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED)
        matplotlib.rcParams.update({**sizes, **lines, "axes.linewidth": 0.7, **more})
        yield


def _drawn(chart: Chart | HeatMap, *, wide: bool) -> Any:
    width = WIDE if wide else NARROW
    if isinstance(chart, HeatMap):
        return _draw_map(chart, width)
    figure = new_figure("A picture", (width, 0.45 + chart.tall * len(chart.panels)))
    axes = figure.subplots(len(chart.panels), 1, sharex=True, sharey=chart.shared, squeeze=False)[:, 0]
    for axis, panel in zip(axes, chart.panels, strict=True):
        _draw_panel(axis, panel, wide=wide)
    steps = [step for panel in chart.panels for line in panel.lines for step, _ in (line.points[:1] + line.points[-1:])]
    axes[-1].set_xlim(min(0, *steps), max(1, *steps) * 1.01)
    from matplotlib.ticker import MaxNLocator

    axes[-1].xaxis.set_major_locator(MaxNLocator(9 if wide else 5, integer=True))
    axes[-1].set_xlabel(chart.axis)
    if len(axes) > 1:
        figure.align_ylabels(axes)
    return figure


def _draw_panel(axis: Any, panel: Panel, *, wide: bool) -> None:
    shaded: set[str] = set()
    for first, last, phase in panel.spans:
        label = None if phase in shaded else phase
        axis.axvspan(first, last, color=PHASES[phase], zorder=0, linewidth=0, label=label)
        shaded.add(phase)
    for place, line in enumerate(panel.lines):
        _draw_line(axis, line, place)
    if panel.log:
        axis.set_yscale("log")
    fitted = range_of(panel)
    if fitted is not None:
        axis.set_ylim(*fitted)
    low, high = axis.get_ylim()
    ends = [line.points[-1][0] for line in panel.lines if line.points]
    marks = [(step, min(max(value, low), high)) for step, value in finite(panel.spikes) if step <= max(ends, default=0)]
    if marks:
        steps, values = zip(*marks, strict=True)
        axis.plot(steps, values, "v", color=SPIKE, ms=5, mec=PAPER, mew=0.6, zorder=6, clip_on=False, label="spike")
    for step, _ in panel.switches:
        axis.axvline(step, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.8, zorder=1.5)
    _name_switches(axis, panel.switches, wide=wide)
    axis.set_ylabel(_literal(panel.unit))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.6, zorder=0.5)
    axis.set_axisbelow(True)
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        top = 1.08 if panel.switches else 1.0
        axis.legend(
            handles,
            labels,
            ncols=_columns(labels, 130 if wide else 64),
            loc="lower left",
            bbox_to_anchor=(-0.01, top),
            borderaxespad=0.2,
            fontsize=8.5,
            frameon=False,
            handlelength=1.5,
            columnspacing=1.2,
        )


def _columns(labels: Sequence[str], room: int) -> int:
    """Return how many columns of a legend have room: so many letters, of which a mark takes six."""
    for rows in range(1, len(labels)):
        columns = math.ceil(len(labels) / rows)
        # matplotlib fills one column after the other; the first ones have what is left over.
        least, longer = divmod(len(labels), columns)
        starts = [column * least + min(column, longer) for column in range(columns + 1)]
        taken = sum(max(map(len, labels[begin:end])) + 6 for begin, end in pairwise(starts))
        if taken <= room:
            return columns
    return 1


def _draw_line(axis: Any, line: Line, place: int) -> None:
    points = thin(line.points)
    if not points:
        return
    steps = [step for step, _ in points]
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    alone = len(finite(points)) == 1
    width = 0.7 if line.faint else 2.3 if line.bold else 1.5
    style: dict[str, Any] = {"linewidth": width, "alpha": 0.45 if line.faint else 1.0}
    if line.marked or alone:
        style |= {"marker": "o", "markersize": 3.4}
    if line.stepped:
        style["drawstyle"] = "steps-post"
    axis.plot(steps, values, color=line.color, label=_literal(line.label) or None, zorder=2 + 0.01 * place, **style)


def range_of(panel: Panel) -> tuple[float, float] | None:
    """Return the range of values that a panel shows, ``None`` where matplotlib chooses it.

    It holds all lines, but not their spikes: one batch far out would flatten the rest. Those above it are marked at the
    upper edge, for which there is room.
    """
    if not panel.fitted:
        return None
    spikes: dict[int, list[float]] = {}
    for step, value in panel.spikes:  # of several runs, which may have one at the same step
        spikes.setdefault(step, []).append(value)
    values = [
        value
        for line in panel.lines
        for step, value in finite(line.points)
        if not any(math.isclose(value, spike, rel_tol=1e-3) for spike in spikes.get(step, ()))
    ]
    if panel.log:
        values = [value for value in values if value > 0 and value >= panel.floor]
    if not values:
        return None
    low, high = min(values), max(values)
    if panel.log:
        return low / 1.3, high * (3 if panel.spikes else 1.3)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
    return low - room, high + (6 if panel.spikes else 1) * room


def _name_switches(axis: Any, switches: Sequence[tuple[int, str]], *, wide: bool) -> None:
    """Write above the panel what begins where, as far as there is room."""
    if len(switches) > (14 if wide else 7):
        return
    for step, name in switches:
        axis.annotate(
            _literal(name),
            xy=(step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="left" if step == 0 else "center",
            fontsize=8,
            color=MUTED,
        )


def _literal(text: str) -> str:
    """Return a name as matplotlib shows it as it is: no formula, and in the legend whatever it begins with."""
    plain = text.replace("$", r"\$")
    return f"\u200b{plain}" if plain.startswith("_") else plain


def _draw_map(chart: HeatMap, width: float) -> Any:
    """Draw shares on a logarithmic scale; what was not seen is left out."""
    figure = new_figure("A picture", (width, 1.15 + max(1.3, 0.19 * len(chart.rows))))
    import matplotlib
    import numpy as np
    from matplotlib.colors import LogNorm

    axis = figure.subplots()
    cells = np.array([[math.nan if cell is None else cell for cell in row] for row in chart.values], dtype=float)
    norm = LogNorm(_LOWEST_SHARE, 1.0)
    colors = matplotlib.colormaps["YlOrRd"].with_extremes(bad=GRID, under=PAPER)
    # A zero has no place on a logarithmic scale: just below its end it is drawn as nothing.
    cells = np.where(cells <= 0, 0.5 * _LOWEST_SHARE, cells)
    edges = [2 * chart.steps[0] - chart.steps[1] if len(chart.steps) > 1 else 0, *chart.steps]
    mesh = axis.pcolormesh(
        [max(0, edge) for edge in edges[:1]] + edges[1:],
        np.arange(len(chart.rows) + 1),
        cells,
        cmap=colors,
        norm=norm,
        rasterized=True,
    )
    axis.set_yticks(
        [place + 0.5 for place in range(len(chart.rows))], [_literal(row) for row in chart.rows], fontsize=7
    )
    axis.invert_yaxis()
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel("optimizer step")
    bar = figure.colorbar(mesh, ax=axis, pad=0.02, aspect=25)
    bar.set_label(chart.unit, fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    return figure
