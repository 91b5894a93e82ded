"""A picture of the stability gap: the score of each task over optimizer steps, from a record."""

import math
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stable._glue.figures import new_figure
from lightning_stable.callbacks._gap_record import WEIGHTS, recovery_share
from lightning_stable.functional._gap import GapTrack, begin_gaps, record_gaps

__all__ = ["Gap", "draw_gap", "find_gaps", "thin"]

_COLORS = {"live": "#e07b39", "ema": "#1f5fa8"}
_LEARNED, _SWITCH, _TEXT = "#e9eef2", "#4a4a4a", "#4a4a4a"
_NORMS = {"plasticity": "#8a4f9e", "stability": "#2f6f4f"}
_MAX_PANELS = 10
_MAX_NAMED_SWITCHES = 8
_DRAWN = 1000
"""Stretches that a line is thinned to, about one a pixel."""
_SMALLEST = 0.05
"""Depth from which on a minimum is marked, as a share of the panel's height: about that of a mark."""
_LABEL = (0.024, 0.13)
"""Room of a number, as shares of the panel."""
_EDGE = 0.98
"""From here on there is no room to the right."""

Points = list[tuple[int, float]]


class Gap(NamedTuple):
    """What happened to one past task after one switch.

    Attributes:
        start: Optimizer step of the switch.
        reference: The score there.
        lowest: Step and score of the minimum before the next switch; of the switch itself if it never fell below.
        end: Step of the recovery, ``None`` if there was none before the next switch.
        points: Steps and scores from the switch to the recovery, or to the next switch.
        depth: How far below the reference the minimum is, 0 if it never fell below.
    """

    start: int
    reference: float
    lowest: tuple[int, float]
    end: int | None
    points: Points
    depth: float


def find_gaps(
    points: Points, task: int, switches: Sequence[dict[str, Any]], share: float, sign: float = 1.0
) -> list[Gap]:
    """Return what happened to a task after each switch to another.

    Args:
        points: Steps and scores of the task, in order.
        task: The task.
        switches: The record's switches.
        share: Share of the depth that has to be regained.
        sign: -1 where lower scores are better.
    """
    gaps = []
    for place, switch in enumerate(switches):
        earlier = [entry["task"] for entry in switches[:place]]
        if switch["task"] == task or task not in earlier:
            continue
        start = switch["step"]
        stop = switches[place + 1]["step"] if place + 1 < len(switches) else math.inf
        before = [point for point in points if point[0] <= start]
        # The last evaluation before the next switch is the last of this task, also where it has that switch's step.
        after = [point for point in points if start < point[0] <= stop]
        if before and after:
            gaps.append(_measure(start, before[-1][1], after, share, sign))
    return gaps


def _measure(start: int, reference: float, after: Points, share: float, sign: float) -> Gap:
    """Return one gap, as the metrics count it."""
    track = GapTrack()
    begin_gaps(track, {0: sign * reference}, start)
    lowest = (start, reference)
    for step, score in after:
        fallen = track.gaps[0].lowest
        record_gaps(track, {0: sign * score}, step, share)
        if track.gaps[0].lowest < fallen:
            lowest = (step, score)
    (gap,) = track.gaps
    end = None if gap.recovery is None else start + gap.recovery
    points = [(start, reference), *(point for point in after if end is None or point[0] <= end)]
    return Gap(start, reference, lowest, end, points, gap.reference - gap.lowest)


def thin(points: Points, most: int = _DRAWN) -> Points:
    """Return points that draw the same line: first, lowest, highest and last of each stretch.

    Args:
        points: Steps and scores, in order.
        most: Number of stretches; a line of up to four times as many points is left as it is.
    """
    if len(points) <= 4 * most:
        return points
    kept: Points = []
    for part in range(most):
        stretch = points[part * len(points) // most : (part + 1) * len(points) // most]
        numbers = [place for place, (_, score) in enumerate(stretch) if math.isfinite(score)]
        extremes = [f(numbers, key=lambda place: stretch[place][1]) for f in (min, max)] if numbers else []
        kept += [stretch[place] for place in sorted({0, len(stretch) - 1, *extremes})]
    return kept


def draw_gap(record: dict[str, Any], path: str | Path, title: str | None = None) -> bool:
    """Write the picture of a record.

    One panel for each task, the first ten if there are more. Where the task itself is learned the panel is grey, a
    switch is a dashed line, and from there the area to the score at the switch is shaded until the score is back.
    The lowest score after each switch has a mark and a number. With gradient norms there is a panel more.

    Args:
        record: A record, as ``read_record`` returns it.
        path: Where to write; the suffix decides the format.
        title: Above the picture; by default the folders that the file lies in.

    Returns:
        Whether there was anything to draw: a score of a task that has begun.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    path = Path(path)
    curves = _curves(record)
    tasks = [task for task in record["tasks"] if any(task["task"] in lines for lines in curves.values())]
    if not tasks:
        return False
    shown, gradients = tasks[:_MAX_PANELS], _has_gradients(record)
    heights = [1.0] * len(shown) + [1.1] * gradients
    figure = new_figure("The picture", (10, 1.3 + 1.45 * sum(heights)))
    from matplotlib.ticker import MaxNLocator  # not before it is known to be there

    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis in axes:
        _prepare(axis, record, _last_step(record, curves))
    _share_range(axes[: len(shown)], record, shown, curves)
    for axis, task in zip(axes, shown, strict=False):
        lines = {weights: lines[task["task"]] for weights, lines in curves.items() if task["task"] in lines}
        _draw_task(axis, record, task, lines, list(curves))
    if gradients:
        _draw_gradients(axes[-1], record["gradients"])
    _name_switches(axes[0], record)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("optimizer step")
    figure.align_ylabels(axes)
    unit = "accuracy, %" if record["score"] == "accuracy" else record["score"]
    figure.supylabel(unit, fontsize=9, y=1 - (0.8 + 0.725 * len(shown)) / figure.get_figheight())
    _explain(figure, record, list(curves), title or "Stability gap: " + "/".join(path.resolve().parts[-3:-1]))
    if len(tasks) > len(shown):
        figure.text(0.99, 0.004, f"the first {len(shown)} of {len(tasks)} tasks", fontsize=8, ha="right", color=_TEXT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _curves(record: dict[str, Any]) -> dict[str, dict[int, Points]]:
    """Return for each weight set the points of each task that began, accuracies in percent, what is missing as nan."""
    scale = 100.0 if record["score"] == "accuracy" else 1.0
    begins = {switch["task"]: switch["step"] for switch in reversed(record["switches"])}
    curves: dict[str, dict[int, Points]] = {}
    for weights in WEIGHTS:
        for line in record["series"].get(weights, []):
            # A task may have been evaluated before any training; a line from there to its begin would show nothing.
            begin = begins.get(line["task"], math.inf)
            scores = (math.nan if score is None else scale * score for score in line["scores"])
            points = [point for point in zip(line["steps"], scores, strict=True) if point[0] >= begin]
            if any(math.isfinite(score) for _, score in points):
                curves.setdefault(weights, {})[line["task"]] = points
    return curves


def _has_gradients(record: dict[str, Any]) -> bool:
    gradients = record.get("gradients") or {}
    return any(value for name in _NORMS for value in gradients.get(name, []))


def _last_step(record: dict[str, Any], curves: dict[str, dict[int, Points]]) -> int:
    ends = [points[-1][0] for lines in curves.values() for points in lines.values()]
    return int(max(1, *ends, *(switch["step"] for switch in record["switches"])))


def _prepare(axis: Any, record: dict[str, Any], last: int) -> None:
    """Give a panel its steps, its switches and the look of the other pictures."""
    axis.set_xlim(0, 1.004 * last)
    for switch in record["switches"]:
        if switch["step"] > 0:
            axis.axvline(switch["step"], color=_SWITCH, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dfe4e8", linewidth=0.6, zorder=0.5)
    axis.tick_params(labelsize=8)


def _share_range(axes: Any, record: dict[str, Any], tasks: list[dict[str, Any]], curves: Any) -> None:
    """Give all tasks one range, so that their gaps can be compared; logarithmic where linear would flatten the end."""
    points = [point for lines in curves.values() for task in tasks for point in lines.get(task["task"], [])]
    scores = [score for _, score in points if math.isfinite(score)]
    low, high = min(scores), max(scores)
    for axis in axes:
        if record["score"] != "accuracy" and 0 < 10 * low < high:
            axis.set_yscale("log")
            axis.set_ylim(low / 1.6, high * 1.6)
            continue
        room = 0.07 * (high - low) or 0.1
        # The numbers of the minima stand below them, or above where low is good.
        below, above = (2.5, 1) if record["higher_is_better"] else (1, 2.5)
        bottom = low - below * room
        axis.set_ylim(0 if bottom < 0 <= low else bottom, high + above * room)


def _draw_task(
    axis: Any, record: dict[str, Any], task: dict[str, Any], lines: dict[str, Points], drawn: list[str]
) -> None:
    """Draw what one task went through."""
    switches = record["switches"]
    ends = [*(switch["step"] for switch in switches[1:]), axis.get_xlim()[1]]
    for switch, end in zip(switches, ends, strict=False):
        if switch["task"] == task["task"]:
            axis.axvspan(switch["step"], end, color=_LEARNED, zorder=0, linewidth=0)
    sign = 1.0 if record["higher_is_better"] else -1.0
    marks = []
    for weights, points in lines.items():
        color, bold = _COLORS[weights], weights == "ema" or len(lines) == 1
        steps, scores = zip(*thin(points), strict=True)
        # Not clipped: a line along the bottom of the panel keeps its width.
        axis.plot(steps, scores, color=color, linewidth=1.9 if bold else 0.9, zorder=3 if bold else 2.5, clip_on=False)
        known = [point for point in points if math.isfinite(point[1])]
        for gap in find_gaps(known, task["task"], switches, recovery_share(record), sign):
            if gap.depth == 0:
                continue
            steps, scores = zip(*thin(gap.points), strict=True)
            worse = [gap.reference if sign * (score - gap.reference) > 0 else score for score in scores]
            axis.fill_between(steps, worse, gap.reference, zorder=1.8, **_shade(weights, drawn))
            marks.append((gap, weights))
    _mark_minima(axis, marks, switches, sign, ".0f" if record["score"] == "accuracy" else ".3g")
    axis.set_ylabel("\n".join(textwrap.wrap(task["name"] or f"task {task['task']}", 18)[:3]), fontsize=8)


def _mark_minima(
    axis: Any, marks: list[tuple[Gap, str]], switches: list[dict[str, int]], sign: float, form: str
) -> None:
    """Mark the lowest scores, the deepest gap first; a number that would lie on another is left out."""
    to_panel = axis.transScale + axis.transLimits
    lines = [float(to_panel.transform((switch["step"], 1))[0]) for switch in switches]
    taken: list[tuple[float, float]] = []
    for gap, weights in sorted(marks, key=lambda mark: -mark[0].depth):
        x, y = to_panel.transform(gap.lowest)
        if sign * (to_panel.transform((gap.start, gap.reference))[1] - y) < _SMALLEST:
            continue
        color, shape = _COLORS[weights], "v" if sign > 0 else "^"
        axis.plot(*gap.lowest, marker=shape, markersize=4.5, color=color, mec="white", zorder=4, clip_on=False)
        at_end = (y if sign > 0 else 1 - y) < _LABEL[1]
        side = _side(x, weights == "ema" or at_end, lines)
        down = 0.0 if at_end else 0.02 if side else 0.1
        place = (x + side * (0.5 * _LABEL[0] + 0.005), y - down * sign)
        if any(abs(place[0] - px) < _LABEL[0] and abs(place[1] - py) < _LABEL[1] for px, py in taken):
            continue
        taken.append(place)
        axis.annotate(
            format(gap.lowest[1], form),
            gap.lowest,
            xytext=(5 * side, (0 if at_end else -0.5 if side else -4) * sign),
            textcoords="offset points",
            ha=("center", "left", "right")[side],
            va="top" if (sign > 0) != at_end else "bottom",
            fontsize=7.5,
            color=color,
            zorder=5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )


def _side(x: float, beside: bool, lines: list[float]) -> int:
    """Return where a number stands: 1 right of its mark, -1 left of it, 0 below or above it.

    The live weights' minimum is the deeper one and has room below; the average rises to the right of its own, and at
    the panel's end there is no room below. Beside a switch the number goes to the side that its mark is on.
    """
    line = min(lines, key=lambda place: abs(place - x), default=-1.0)
    if abs(line - x) < 0.5 * _LABEL[0]:
        return 1 if x >= line and x < _EDGE else -1
    return -1 if x >= _EDGE else int(beside)


def _shade(weights: str, drawn: Collection[str]) -> dict[str, Any]:
    """Return the look of a weight set's gaps: a colour, and lines in place of it where both are drawn."""
    red, green, blue = (int(_COLORS[weights][place : place + 2], 16) / 255 for place in (1, 3, 5))
    if weights == "live" or len(drawn) == 1:
        return {"facecolor": (red, green, blue, 0.28), "linewidth": 0}
    return {"facecolor": "none", "edgecolor": (red, green, blue, 0.75), "linewidth": 0, "hatch": "/////"}


def _draw_gradients(axis: Any, gradients: dict[str, Any]) -> None:
    """Draw the norms of the two parts of the gradient."""
    for name, color in _NORMS.items():
        points = [(s, v) for s, v in zip(gradients["steps"], gradients[name], strict=True) if v is not None and v > 0]
        if points:
            axis.plot(*zip(*thin(points), strict=True), color=color, linewidth=1.1, label=name)
    axis.set_yscale("log")
    axis.set_ylabel("gradient norm", fontsize=8)
    axis.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none", ncols=2)


def _name_switches(axis: Any, record: dict[str, Any]) -> None:
    """Write above the top panel which task begins where."""
    switches = record["switches"]
    for switch in switches:
        axis.annotate(
            f"task {switch['task']}" if len(switches) <= _MAX_NAMED_SWITCHES else str(switch["task"]),
            xy=(switch["step"], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left" if switch["step"] == 0 else "center",
            fontsize=8,
            color=_TEXT,
        )


def _explain(figure: Any, record: dict[str, Any], weights: list[str], title: str) -> None:
    """Put the title and one legend above the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for name in weights:
        width = 1.9 if name == "ema" or len(weights) == 1 else 0.9
        handles.append(Line2D([], [], color=_COLORS[name], linewidth=width, label=f"{WEIGHTS[name]} weights"))
    handles.append(Patch(color=_LEARNED, label="task is learned"))
    lowest, shape = ("lowest", "v") if record["higher_is_better"] else ("highest", "^")
    handles += [
        *(
            Patch(label="gap" if len(weights) == 1 else f"gap, {WEIGHTS[name]}", **_shade(name, weights))
            for name in weights
        ),
        Line2D([], [], color=_TEXT, marker=shape, markersize=4.5, linestyle="none", label=f"{lowest} since the switch"),
    ]
    figure.legend(
        handles=handles,
        title=title,
        title_fontproperties={"size": 12, "weight": "bold"},
        alignment="left",
        loc="outside upper left",
        ncols=len(handles),
        fontsize=8,
        frameon=False,
    )
