"""The figures of a run: how long it was, where it ended, whether it spiked or diverged."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning_stable._report.run import LIVE, MANY, Points, Run, finite, median
from lightning_stable._report.spikes import Spike, SpikeRule, find_spikes

__all__ = [
    "DIVERGED_AT",
    "TRAINING",
    "Facts",
    "Loss",
    "Validated",
    "divergence",
    "facts_of",
    "gradient_spikes",
    "loss_names",
    "rule_of",
    "span",
    "training_loss",
    "validation_names",
]

DIVERGED_AT = 0.5
"""Share of what a run had learnt that it has lost at its end, to count as diverged."""

# Of the first loss: what a run is taken to have learnt at least.
_LEAST = 0.1
# Share of a run that stands for its beginning and its end.
_END = 0.05
TRAINING = (
    "stability_report/loss",
    "train_loss",
    "train_loss_step",
    "train/loss",
    "train/loss_step",
    "training_loss",
    "loss",
    "loss_step",
    "train_loss_epoch",
    "train/loss_epoch",
    "loss_epoch",
)
"""What the training loss goes by, the best known first."""
_OTHER_STAGES = ("val", "test", "valid", "eval")
# Values that end in one of these are better the lower, or the higher, whatever they are of.
_DIRECTIONS = dict.fromkeys(("loss", "perplexity", "mse", "rmse", "mae"), "min") | dict.fromkeys(
    ("accuracy", "acc"), "max"
)
_ENDS = re.compile(r"(_epoch|_step|/dataloader_idx_\d+)+$")


class Loss(NamedTuple):
    """The training loss of a run.

    Attributes:
        name: What it is logged as.
        points: Its values.
        spikes: Those that are spikes.
        not_finite: How many are infinite or not a number.
        first_not_finite: The step of the first of those.
    """

    name: str
    points: Points
    spikes: list[Spike]
    not_finite: int = 0
    first_not_finite: int | None = None


class Validated(NamedTuple):
    """A value of a validation.

    Attributes:
        name: What it is logged as.
        last: The last value that is finite, not-a-number if none is.
        remark: The best value and its step where it is known which one that is, else the lowest and the highest.
    """

    name: str
    last: float
    remark: str


class Facts(NamedTuple):
    """The figures of a run; ``None`` where no file has them.

    Attributes:
        steps: Optimizer steps.
        epochs: Epochs that were begun.
        seconds: Time.
        loss: Median training loss over the last twentieth of the run.
        last_loss: The last value, also where it is not finite.
        lowest_loss: The lowest value.
        many: Whether there are so many values that the median tells more than the last one.
        validated: The values of validations.
        spikes: Spikes of the training loss.
        diverged: Why the run counts as diverged; empty if it does not.
    """

    steps: int | None
    epochs: int | None
    seconds: float | None
    loss: float | None
    last_loss: float | None
    lowest_loss: float | None
    many: bool
    validated: list[Validated]
    spikes: int | None
    diverged: str


def loss_names(run: Run) -> list[str]:
    """Return the names of training losses, the best known first."""
    known = [name for name in TRAINING if name in run.series]
    others = [
        name
        for name in run.series
        if "loss" in name.lower()
        and name not in known
        and not name.lower().startswith(_OTHER_STAGES)
        and not name.endswith(LIVE)
    ]
    return known + others


def training_loss(run: Run) -> Loss | None:
    """Return the training loss with its spikes, ``None`` if none was logged."""
    if "loss" not in run.cache:  # the page asks several times
        run.cache["loss"] = _training_loss(run)
    found: Loss | None = run.cache["loss"]
    return found


def _training_loss(run: Run) -> Loss | None:
    names = loss_names(run)
    if not names:
        return None
    points = run.of(names[0])
    if names[0].startswith("stability_report/"):
        counted = run.record.get("not_finite", {}).get("loss", [0, None])
        spikes = [Spike(*spike) for spike in run.record.get("spikes", {}).get("loss", [])]
        return Loss(names[0], points, spikes, counted[0], counted[1])
    found, band = find_spikes(points)
    return Loss(names[0], points, found, band.not_finite, band.first_not_finite)


def gradient_spikes(run: Run) -> list[Spike]:
    """Return the spikes of the gradient norm that the callback has found."""
    return [Spike(*spike) for spike in run.record.get("spikes", {}).get("gradient_norm", [])]


def rule_of(run: Run) -> SpikeRule:
    """Return the rule by which a run's spikes were found."""
    given = run.record.get("rule", {})
    return SpikeRule(**given) if given else SpikeRule()


def validation_names(run: Run) -> list[str]:
    """Return the names of validated values, each followed by its twin of the live weights where there is one."""
    names = [
        name
        for name in run.series
        if name.lower().startswith(("val", "valid")) and not name.endswith(LIVE) and finite(run.of(name))
    ]
    names.sort(key=lambda name: ("loss" not in name.lower(), name))
    return [twin for name in names for twin in (name, name + LIVE) if twin in run.series]


def facts_of(run: Run) -> Facts:
    """Return the figures of a run."""
    loss, known = training_loss(run), [points[-1][0] for points in run.series.values() if points]
    epochs = finite(run.of("epoch"))
    ends = _ends(loss.points) if loss is not None else None
    values = [] if loss is None else finite(loss.points)
    return Facts(
        steps=run.record.get("steps") or (max(known) if known else None),
        epochs=run.record.get("epochs") or (int(max(value for _, value in epochs)) + 1 if epochs else None),
        seconds=run.seconds,
        loss=None if ends is None else ends[2],
        last_loss=loss.points[-1][1] if loss is not None and loss.points else None,
        lowest_loss=min((value for _, value in values), default=None),
        many=len(values) >= MANY,
        validated=[_validated(run, name) for name in validation_names(run)],
        spikes=None if loss is None else len(loss.spikes),
        diverged="" if loss is None else divergence(loss),
    )


def divergence(loss: Loss) -> str:
    """Return why a run counts as diverged; nothing if it does not.

    With the median loss of the first and of the last twentieth and the lowest median of any twentieth, it did if the
    last is above ``best + 0.5 * max(first - best, 0.1 * |first|)``, or if the last values are not finite.
    """
    if loss.points and not math.isfinite(loss.points[-1][1]) and loss.not_finite > 1:
        return f"the loss is not a finite number from step {loss.first_not_finite} on"
    ends = _ends(loss.points)
    if ends is None:
        return "the loss was never a finite number" if loss.points else ""
    first, best, last = ends
    limit = best + DIVERGED_AT * max(first - best, _LEAST * abs(first))
    return f"the loss ended at {last:.4g}, above {limit:.4g}" if last > limit else ""


def _ends(points: Points) -> tuple[float, float, float] | None:
    """Return the median of the first twentieth of a loss, the lowest median of any twentieth, and that of the last."""
    values = [value for _, value in finite(points)]
    if not values:
        return None
    size = max(1, round(len(values) * _END))
    medians = [median(values[place : place + size]) for place in range(0, len(values) - size + 1, max(1, size // 2))]
    last = median(values[-size:])
    return medians[0], min(*medians, last), last


def _validated(run: Run, name: str) -> Validated:
    points = finite(run.of(name))
    if not points:
        return Validated(name, math.nan, "")
    low, high = (choose(points, key=lambda point: point[1]) for choose in (min, max))
    direction = _direction(run, name)
    if direction is None:
        return Validated(name, points[-1][1], f"lowest {low[1]:.4g}, highest {high[1]:.4g}")
    step, best = low if direction == "min" else high
    return Validated(name, points[-1][1], f"best {best:.4g} at step {step:,}")


def _direction(run: Run, name: str) -> str | None:
    """Return "min" or "max" where it is certain which values are better: by its name, and by what monitors it."""
    word = re.split(r"[^a-z]+", _ENDS.sub("", name.lower()))[-1]
    told = {*_monitored(run.config, name), *([_DIRECTIONS[word]] if word in _DIRECTIONS else [])}
    return told.pop() if len(told) == 1 else None


def _monitored(settings: Any, name: str) -> Iterator[str]:
    """Yield the ``mode`` of each callback in a config, such as ModelCheckpoint, that monitors a value."""
    if isinstance(settings, dict):
        if settings.get("monitor") == name and settings.get("mode") in ("min", "max"):
            yield settings["mode"]
        settings = list(settings.values())
    if isinstance(settings, list):
        for entry in settings:
            yield from _monitored(entry, name)


def span(seconds: float | None) -> str:
    """Return a time in words: ``"12 s"``, ``"3 min 5 s"``, ``"2 h 10 min"``."""
    if seconds is None:
        return "not known"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
