"""A picture of a training run: learning rate, loss and validation metrics over optimizer steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_stable._glue.figures import new_figure
from lightning_stable.cli.summary import LIVE, Metrics, validation_metrics

__all__ = ["draw_training"]

_PHASES = {0: ("warmup", "#f2e3bc"), 1: ("stable", "#e4eef5"), 2: ("decay", "#f7d9d3")}
_TRAIN, _MEASURED, _LIVE, _RATE, _BUDGET = "#9aa5b1", "#1f5fa8", "#e07b39", "#2f6f4f", "#4a4a4a"
_MAX_METRIC_PANELS = 3


def draw_training(metrics: Metrics, path: Path, budgets: list[int] | None = None, title: str | None = None) -> bool:
    """Write the picture of a run.

    One panel each for the learning rates, the loss and up to three other validation metrics, as far as the log has
    them. Phases of the learning rate are shaded, budgets are marked, and where two weight sets were validated both are
    drawn.

    Args:
        metrics: The run's log, from :func:`~lightning_stable.cli.summary.read_metrics`.
        path: Where to write; the suffix decides the format.
        budgets: Steps to mark.
        title: Above the picture; by default the folders that the file lies in.

    Returns:
        Whether there was anything to draw.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    panels = _panels(metrics)
    if not panels:
        return False
    figure = new_figure("The picture", (9, 1.2 + 2.3 * len(panels)))
    from matplotlib.ticker import MaxNLocator  # not before it is known to be there

    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    explained: set[str] = set()
    for axis, (label, columns) in zip(axes, panels, strict=True):
        _draw_panel(axis, metrics, label, columns)
        explained = _explain_lines(axis, explained)
        for low, high, phase in _phase_spans(metrics):
            axis.axvspan(low, high, color=_PHASES[phase][1], zorder=0, linewidth=0)
        for budget in budgets or []:
            axis.axvline(budget, color=_BUDGET, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#ffffff", linewidth=0.8, zorder=0.5)
    last = max(points[-1][0] for points in metrics.values())
    axes[-1].set_xlim(0, 1.004 * max(last, *(budgets or [0]), 1))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("optimizer step")
    _label_budgets(axes[0], budgets or [])
    _phase_legend(figure, metrics, bool(budgets))
    figure.suptitle(
        title or "Training run " + "/".join(path.resolve().parts[-3:-1]), x=0.01, ha="left", fontsize=12, weight="bold"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def _panels(metrics: Metrics) -> list[tuple[str, list[str]]]:
    """Return each panel's label and columns, from top to bottom."""
    # Parameter groups that share their rate are one line.
    rates = list({str(points): name for name, points in metrics.items() if name.startswith("lr-")}.values())
    validated = validation_metrics(metrics)
    logged = [name for name in ("train_loss", "train_loss_step", "train_loss_epoch") if name in metrics]
    losses = [*logged[:1], *(name for name in validated if name.removesuffix(LIVE) == "val_loss")]
    others: dict[str, list[str]] = {}
    for name in validated:
        if name not in losses:
            others.setdefault(name.removesuffix(LIVE), []).append(name)
    panels: list[tuple[str, list[str]]] = [
        ("learning rate", rates),
        ("loss", losses),
        *list(others.items())[:_MAX_METRIC_PANELS],
    ]
    return [(label.removeprefix("val_").replace("_", " "), columns) for label, columns in panels if columns]


def _draw_panel(axis: Any, metrics: Metrics, label: str, columns: list[str]) -> None:
    """Draw the lines of one panel."""
    for name in columns:
        steps, values = zip(*metrics[name], strict=True)
        if name.startswith("lr-"):
            axis.plot(steps, values, color=_RATE if len(columns) == 1 else None, linewidth=1.6, label=name)
        elif name.startswith("train"):
            axis.plot(steps, values, color=_TRAIN, linewidth=0.7, alpha=0.35)
            axis.plot(steps, _smooth(values), color=_TRAIN, linewidth=1.4, label="training batches, smoothed")
        else:
            live = name.endswith(LIVE)
            both = live or name + LIVE in columns
            text = ("validation, live weights" if live else "validation, EMA weights") if both else "validation"
            style = {"color": _LIVE if live else _MEASURED, "marker": "o", "markersize": 3.5, "linewidth": 1.5}
            axis.plot(steps, values, label=text, zorder=2.5 if live else 3, **style)
    axis.set_ylabel(label)
    if label == "learning rate":
        axis.set_ylim(bottom=0)
    if label == "loss":
        _fit_loss_axis(axis, metrics, columns)


def _explain_lines(axis: Any, explained: set[str]) -> set[str]:
    """Give a panel a legend, unless it has but one line or those above have said it all; return what is said now."""
    labels = set(axis.get_legend_handles_labels()[1])
    if len(labels) > 1 and not labels <= explained:
        axis.legend(loc="best", fontsize=8, framealpha=0.85, edgecolor="none")
        return explained | labels
    return explained


def _fit_loss_axis(axis: Any, metrics: Metrics, columns: list[str]) -> None:
    """Fit the axis to the lines that count, not to single batches; logarithmic where linear would flatten the end."""
    shown: list[float] = []
    for name in columns:
        values = [value for _, value in metrics[name]]
        shown += _smooth(values) if name.startswith("train") else values
    low, high = min(shown), max(shown)
    if low <= 0 or low == high:
        return
    if high > 10 * low:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.3, high * 1.3)
    else:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean around each value, over a fortieth of the run to each side."""
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _phase_spans(metrics: Metrics) -> list[tuple[float, float, int]]:
    """Return the stretches of one phase each: first step, last step, phase."""
    spans: list[tuple[float, float, int]] = []
    for step, value in metrics.get("wsd/phase", []):
        phase = int(value)
        if phase not in _PHASES:
            continue
        if spans and spans[-1][2] == phase:
            spans[-1] = (spans[-1][0], step, phase)
            continue
        if spans:  # the change lies between two logged steps; no gap between the shades
            spans[-1] = (spans[-1][0], step, spans[-1][2])
        spans.append((spans[-1][1] if spans else 0, step, phase))
    return spans


def _label_budgets(axis: Any, budgets: list[int]) -> None:
    """Write the budgets above the top panel."""
    for budget in budgets:
        axis.annotate(
            f"budget {budget}" if len(budgets) <= 6 else str(budget),
            xy=(budget, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right" if budget == budgets[-1] else "center",
            fontsize=8,
            color=_BUDGET,
        )


def _phase_legend(figure: Any, metrics: Metrics, with_budgets: bool) -> None:
    """Put one legend of shades and marks beside the title."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    phases = sorted({phase for _, _, phase in _phase_spans(metrics)})
    handles: list[Any] = [Patch(color=_PHASES[phase][1], label=_PHASES[phase][0]) for phase in phases]
    if with_budgets:
        handles.append(Line2D([], [], color=_BUDGET, linestyle=(0, (4, 3)), linewidth=0.9, label="budget"))
    if handles:
        figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=8, frameon=False)
