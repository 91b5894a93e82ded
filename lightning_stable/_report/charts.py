"""Which pictures a page has: made from what the runs have, of one run or of several in one picture."""

from collections.abc import Sequence

from lightning_stable._report.draw import COLORS, Chart, Line, Panel, range_of
from lightning_stable._report.facts import gradient_spikes, training_loss, validation_names
from lightning_stable._report.run import LIVE, MANY, Points, Run, finite
from lightning_stable._report.weights import AVERAGED, LIVE_WEIGHTS, validated_weights, weights_that_differ

__all__ = [
    "STABILISERS",
    "gradient_charts",
    "loss_chart",
    "other_charts",
    "phase_spans",
    "rate_chart",
    "smoothed",
    "speed_chart",
    "stabiliser_charts",
    "validation_charts",
]

_PHASES = {0: "warmup", 1: "stable", 2: "decay"}
_FEW = 60
"""Points up to which each has a mark."""
_WITHIN_REACH = 256
_MOST_OTHERS = 12
# Single values below this share of the lowest median are cut: one batch without loss would take half of the axis.
_FLOOR = 1e-3
_NORMS = {
    "stability_report/gradient_norm": "Gradient norm, before clipping",
    "spike_guard/norm": "SpikeGuard: gradient norm and its limit",
    "stable_spam/norm": "StableSPAM: gradient norm before it acts",
}

STABILISERS = {
    "spike_guard": "SpikeGuard",
    "stable_spam": "StableSPAM",
    "precision_fallback": "PrecisionFallback",
    "balanced_ema": "BalancedEMA",
    "softmax_collapse": "SoftmaxCollapseMonitor",
    "logit_sharpness": "LogitSharpness",
    "saf_loss": "SAF",
    "mesa_loss": "MESA",
    "lwf_loss": "LwF",
    "replay_loss": "Replay",
    "l2_anchor": "L2Anchor",
    "ewc": "EWC",
}
"""What callbacks of this library log begins so."""

_OWN = ("stability_report/", "stability_gap", "numerics/", "lr", "wsd/", "epoch", "seconds")


def loss_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the picture of the training loss, with spikes and, of a single run, the loss of its validation."""
    lines: list[Line] = []
    panel = Panel(lines, "loss", fitted=True)
    for place, run in enumerate(runs):
        loss = training_loss(run)
        color = COLORS[place % len(COLORS)]
        if loss is not None and finite(loss.points):
            marked = len(loss.points) <= _FEW // 2
            if len(runs) == 1:
                lines += _noisy_lines(loss.points, "training", marked=marked)
            else:
                lines.append(Line(run.name, smoothed(loss.points), color, marked=marked))
            panel.spikes += [(spike.step, spike.value) for spike in loss.spikes]
    if len(runs) == 1:
        panel.spans = phase_spans(runs[0])
        for name in [name for name in validation_names(runs[0]) if "loss" in name.lower()][:2]:
            lines.append(_validation_line(runs[0], name))
    if not lines:
        return None
    texts = _scale(panel, 8)
    texts += ["Shaded: phases of the learning rate."] if panel.spans else []
    if len(runs) > 1 and any((loss := training_loss(run)) and len(finite(loss.points)) >= MANY for run in runs):
        texts.insert(0, f"Lines are running medians. A run with fewer than {MANY} values is drawn as it is.")
    return Chart("loss", "Training loss", [panel], " ".join(texts), wide=True)


def validation_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a picture of each validated value, with the live weights beside their average."""
    names = list(dict.fromkeys(name for run in runs for name in validation_names(run) if not name.endswith(LIVE)))
    charts = []
    for name in names[:_MOST_OTHERS]:
        both = any(name + LIVE in run.series for run in runs)
        if len(runs) == 1:
            lines = [_validation_line(runs[0], twin) for twin in (name, name + LIVE) if twin in runs[0].series]
            lines = lines if len(lines) > 1 else [lines[0]._replace(label="")]  # the title says what it is
        else:
            weights = weights_that_differ(runs, name)
            lines = [line._replace(label=_of(line.label, weights)) for line in _one_each(runs, name)]
        if all(len(finite(line.points)) < 2 for line in lines):
            continue  # its one value is in the headline
        title = f"{name}: live weights and their average" if both and len(runs) == 1 else name
        charts.append(Chart(_file(name), title, [_panel(lines, "")], _which_weights(runs, name)))
    return charts


def _of(label: str, weights: dict[str, str]) -> str:
    return f"{label} ({weights[label]})" if label in weights else label


def _which_weights(runs: Sequence[Run], name: str) -> str:
    """Say of which weights the lines are, where these do not."""
    if len(runs) > 1 and weights_that_differ(runs, name):
        return "The runs differ in the weights that were validated."
    said = next((validated_weights(run, name) for run in runs if name in run.series), "")
    drawn = len(runs) == 1 and name + LIVE in runs[0].series
    return "Of the averaged weights." if said == AVERAGED and not drawn else ""


def rate_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the picture of the learning rates, and of the phases of a single run."""
    lines: list[Line] = []
    for place, run in enumerate(runs):
        own = [name for name in run.series if name.startswith("stability_report/lr")]
        names = own or [name for name in run.series if _is_rate(name) and finite(run.of(name))]
        # Groups that share their rate are one line.
        alike = list({str(run.of(name)): name for name in names}.values())
        for number, name in enumerate(alike[:1] if len(runs) > 1 else alike[: len(COLORS)]):
            color = COLORS[(place if len(runs) > 1 else number) % len(COLORS)]
            label = run.name if len(runs) > 1 else name.removeprefix("stability_report/") if alike[1:] else ""
            lines.append(Line(label, run.of(name), color))
    if not lines:
        return None
    spans = phase_spans(runs[0]) if len(runs) == 1 else []
    phases = list(dict.fromkeys(phase for _, _, phase in spans))
    text = f"Shaded: {', '.join(phases)} of WarmupStableDecay." if phases else ""
    return Chart("learning_rate", "Learning rate", [Panel(lines, spans=spans)], text)


def gradient_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the pictures of gradient norms."""
    others = {name: f"Gradients: {name}" for run in runs for name in run.series if _is_norm(name)}
    charts = []
    for name, title in [*_NORMS.items(), *list(others.items())[:4]]:
        lines = [line._replace(points=smoothed(line.points)) for line in _one_each(runs, name)]
        if not lines:
            continue
        panel = Panel(lines, "norm", fitted=True)
        if len(runs) == 1:
            panel.lines = lines = _noisy_lines(runs[0].of(name), marked=lines[0].marked)
            if name == "spike_guard/norm" and (limit := finite(runs[0].of("spike_guard/limit"))):
                lines.append(Line("limit of SpikeGuard", limit, COLORS[1]))
            spikes = gradient_spikes(runs[0]) if name == "stability_report/gradient_norm" else []
            panel.spikes = [(spike.step, spike.value) for spike in spikes]
        charts.append(Chart(_file(f"gradients_{name}"), title, [panel], " ".join(_scale(panel, 12))))
    return charts


def _noisy_lines(points: Points, what: str = "", *, marked: bool = False) -> list[Line]:
    """Return the lines of what differs from batch to batch: its values and their running median; of a few no median."""
    begin = f"{what}, " if what else ""
    if len(finite(points)) < MANY:
        return [Line(what or "single values", points, COLORS[0], marked=marked)]
    median = Line(f"{begin}running median", smoothed(points), COLORS[0], bold=True)
    return [Line(f"{begin}single values", points, COLORS[0], faint=True), median]


def _scale(panel: Panel, spread: float) -> list[str]:
    """Choose the scale of a fitted panel, and return what is to be said of what it does not hold."""
    main = [value for line in panel.lines if not line.faint for _, value in finite(line.points)]
    spikes = {step for step, _ in panel.spikes}
    single = [value for line in panel.lines for step, value in finite(line.points) if step not in spikes]
    low, high = min(main), max(main)
    # What is no spike, as a first batch, may be as far out.
    panel.log = low > 0 and min(single, default=low) >= 0 and max(single, default=high) > spread * low
    texts = []
    if panel.log and min(single, default=low) < _FLOOR * low:
        panel.floor = _FLOOR * low
        texts.append(f"Values below {panel.floor:.2g} are cut.")
    fitted = range_of(panel)
    if panel.spikes:
        cut = fitted is not None and any(value > fitted[1] for _, value in finite(panel.spikes))
        texts.insert(0, f"Triangles are spikes{'; those at the upper edge are above it' if cut else ''}.")
    return texts


def stabiliser_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a picture of each value that a callback of this library logged of what it did."""
    names = [name for run in runs for name in run.series if _stabiliser(name) and finite(run.of(name))]
    charts = []
    for name in dict.fromkeys(names):
        counts = name.rpartition("/")[2] in ("skipped", "clipped", "rewinds", "count", "high")
        if name in _NORMS or name == "spike_guard/limit":
            continue  # among the gradient norms
        if counts and not any(value for run in runs for _, value in finite(run.of(name))):
            continue  # it never acted, which the table says
        lines = [line._replace(stepped=counts, marked=line.marked and not counts) for line in _one_each(runs, name)]
        panel = _panel(lines, "")
        panel.log = not counts and _spreads(lines)
        _, _, what = name.partition("/")
        title = f"{STABILISERS[_stabiliser(name)]}: {what.replace('_', ' ') or name.replace('_', ' ')}"
        charts.append(Chart(_file(name), title, [panel], tall=2.2))
    return charts


def speed_chart(runs: Sequence[Run]) -> Chart | None:
    """Return the picture of the optimizer steps in a second."""
    lines = []
    for place, run in enumerate(runs):
        points = run.of("seconds")
        reach = max(1, len(points) // 60)
        speeds = [
            ((now[0]), (now[0] - before[0]) / (now[1] - before[1]))
            for before, now in zip(points[::reach], points[reach::reach], strict=False)
            if now[1] > before[1]
        ]
        if len(speeds) > 1:
            lines.append(Line(run.name if len(runs) > 1 else "", speeds, COLORS[place % len(COLORS)]))
    if not lines:
        return None
    panel = Panel(lines, "steps in a second")
    return Chart("speed", "Speed", [panel], tall=2.2)


def other_charts(runs: Sequence[Run], drawn: set[str]) -> tuple[list[Chart], list[str]]:
    """Return pictures of everything else that was logged, and the names of what is left out of them."""
    names = []
    for name in dict.fromkeys(name for run in runs for name in run.series):
        points = max((finite(run.of(name)) for run in runs), key=len)
        told = name in drawn or name.startswith(_OWN) or _stabiliser(name) or _is_norm(name) or len(points) < 2
        if not told:
            names.append(name)
    charts = [Chart(_file(name), name, [_panel(_one_each(runs, name), "")], tall=2.2) for name in names[:_MOST_OTHERS]]
    return charts, names[_MOST_OTHERS:]


def phase_spans(run: Run) -> list[tuple[float, float, str]]:
    """Return the stretches of one phase of the learning rate each: first step, last step, phase."""
    if run.record.get("phases"):
        changes = [(int(step), str(phase)) for step, phase in run.record["phases"]]
        ends = [*(step - 1 for step, _ in changes[1:]), run.record.get("steps") or changes[-1][0]]
        found = [(max(0, step - 1), float(end), phase) for (step, phase), end in zip(changes, ends, strict=True)]
        return [each for each in found if each[2] in _PHASES.values()]
    spans: list[tuple[float, float, str]] = []
    for step, value in finite(run.of("wsd/phase")):
        phase = _PHASES.get(int(value))
        if phase is None:
            continue
        if spans and spans[-1][2] == phase:
            spans[-1] = (spans[-1][0], step, phase)
        else:
            # The change lies between two logged steps: no gap between the shades.
            if spans:
                spans[-1] = (spans[-1][0], step, spans[-1][2])
            spans.append((spans[-1][1] if spans else 0, step, phase))
    return spans


def smoothed(points: Points) -> Points:
    """Return the running median over a fortieth of the run to each side; of fewer than ``MANY`` points the points.

    A median is that of all values within reach, up to some hundreds: of more, every second, third and so on.
    """
    values = finite(points)
    reach = len(values) // 40
    if len(values) < MANY:
        return values
    import numpy as np

    numbers = np.array([value for _, value in values])
    stride, apart = max(1, len(values) // 2000), max(1, reach // _WITHIN_REACH)
    chosen = range(0, len(values), stride)
    # At both ends of a run the windows are shorter.
    inner = [place for place in chosen if reach <= place < len(values) - reach]
    windows = np.lib.stride_tricks.sliding_window_view(numbers, 2 * reach + 1)[:, ::apart]
    medians = dict(zip(inner, np.median(windows[[i - reach for i in inner]], axis=1).tolist(), strict=True))
    ends = (place for place in chosen if place not in medians)
    medians |= {i: float(np.median(numbers[max(0, i - reach) : i + reach + 1])) for i in ends}
    return [(values[place][0], medians[place]) for place in chosen]


def _validation_line(run: Run, name: str) -> Line:
    """Return the line of a validated value; where two sets of weights were validated it says which."""
    weights = validated_weights(run, name)
    twin = name.endswith(LIVE) or name + LIVE in run.series
    label = f"validation, {weights}" if twin or weights == AVERAGED else "validation"
    color = COLORS[1] if twin and weights == LIVE_WEIGHTS else COLORS[2]
    return Line(label, run.of(name), color, marked=len(run.of(name)) <= _FEW)


def _one_each(runs: Sequence[Run], name: str) -> list[Line]:
    """Return the line of each run that has a value."""
    return [
        Line(run.name if len(runs) > 1 else "", run.of(name), color, marked=len(run.of(name)) <= _FEW)
        for place, run in enumerate(runs)
        for color in [COLORS[place % len(COLORS)]]
        if finite(run.of(name))
    ]


def _panel(lines: list[Line], unit: str) -> Panel:
    return Panel(lines, unit, fitted=True)


def _spreads(lines: Sequence[Line]) -> bool:
    """Tell whether values spread over more than an order of magnitude, and all are above 0."""
    values = [value for line in lines for _, value in finite(line.points)]
    return bool(values) and min(values) > 0 and max(values) > 12 * min(values)


def _stabiliser(name: str) -> str:
    """Return which callback's value it is, empty if none's."""
    return next((begin for begin in STABILISERS if name == begin or name.startswith((f"{begin}/", f"{begin}_"))), "")


def _is_norm(name: str) -> bool:
    lower = name.lower()
    return "grad" in lower and "norm" in lower and not lower.startswith(("stability_report/", "stability_gap"))


def _is_rate(name: str) -> bool:
    lower = name.lower()
    rate = lower in ("lr", "learning_rate") or lower.startswith(("lr-", "lr/"))
    return rate and not lower.endswith(("momentum", "weight_decay"))


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_").lower()
