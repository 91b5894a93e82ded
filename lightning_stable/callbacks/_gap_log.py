"""What StabilityGap has measured so far: scores that are still on the device, curves, task switches, gradients."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stable.callbacks._gap_record import FORMAT, GRADIENTS
from lightning_stable.callbacks._gap_series import RECOVERY_SHARE, GapSeries

__all__ = ["GapLog"]

# Evaluations that wait on the device at most, until one transfer reads them all.
_WAITING = 64


class _Waiting(NamedTuple):
    """Values that have not been read from the device yet, or a task that ends after them."""

    kind: str
    tasks: Sequence[int]
    present: int
    step: int
    values: Tensor | None


class GapLog:
    """Everything that the file, the table and the checkpoint are made of.

    Args:
        score: Name of the score.
        higher_is_better: Whether a higher score is better.
        every_n_steps: Optimizer steps between evaluations.
        windows: Windows in evaluations.

    Attributes:
        done: Optimizer steps done, over all fits.
        evaluated: Those done at the last evaluation; ``None`` before the first.
        due: An evaluation that has begun, or has to: ``"switch"`` before the first update of a task, ``"step"`` after
            an update; empty if there is none.
        broken: Tasks of which a score was not a number, since it was last asked.
    """

    def __init__(self, score: str, higher_is_better: bool, every_n_steps: int, windows: Sequence[int]) -> None:
        self._score = score
        self._higher_is_better = higher_is_better
        self._every_n_steps = every_n_steps
        self._windows = list(windows)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.done = 0
        self.evaluated: int | None = None
        self.due = ""
        self.broken: set[int] = set()
        self._series: dict[str, GapSeries] = {}
        self._baseline: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._samples: dict[int, int] = {}
        self._switches: list[tuple[int, int]] = []
        self._gradients: list[tuple[float, ...]] = []
        self._waiting: list[_Waiting] = []

    @property
    def begun(self) -> bool:
        """Whether a task has begun."""
        return bool(self._switches)

    @property
    def tasks(self) -> list[int]:
        """The tasks that have begun."""
        return sorted(self._names)

    @property
    def present(self) -> int | None:
        """The task that began last; ``None`` before the first."""
        return self._switches[-1][0] if self._switches else None

    def switch(self, task: int, name: str, samples: int) -> None:
        """Let a task begin, and the one before it end with its latest evaluation."""
        if self.present is not None:
            self._wait(_Waiting("end", [], self.present, self.done, None))
        self._switches.append((task, self.done))
        self._names[task] = name
        self._samples[task] = samples
        self.due = "switch"

    def add(
        self, tasks: Sequence[int], present: int, scores: dict[str, Tensor], gradients: Tensor | None = None
    ) -> None:
        """Add an evaluation, made while ``present`` is trained on: all of it, or nothing.

        Args:
            tasks: Which tasks were evaluated.
            present: The task that is trained on.
            scores: Of each set of weights, of shape (tasks,).
            gradients: Norms and cosine: plasticity, stability, cosine.
        """
        self.evaluated = self.done
        for weights, values in scores.items():
            self._wait(_Waiting(weights, list(tasks), present, self.done, values))
        if gradients is not None:
            self._wait(_Waiting("gradients", [], present, self.done, gradients))
        self.due = ""

    def set_baseline(self, tasks: Sequence[int], scores: Tensor) -> None:
        """Note the scores before any training, of tasks that are to come, too."""
        self._wait(_Waiting("baseline", list(tasks), 0, self.done, scores))

    def flush(self) -> None:
        """Read what waits on the device, in one transfer."""
        waiting, self._waiting = self._waiting, []
        held = [entry.values.detach().float() for entry in waiting if entry.values is not None]
        numbers = iter(torch.cat(held).tolist() if held else [])
        for entry in waiting:
            count = 0 if entry.values is None else len(entry.values)
            self._take(entry, [next(numbers) for _ in range(count)])

    def latest(self) -> dict[str, float]:
        """Return the latest values by the names that loggers are given."""
        self.flush()
        found: dict[str, float] = {}
        for weights, series in self._series.items():
            prefix = "stability_gap" if weights == "live" else f"stability_gap_{weights}"
            found |= {f"{prefix}/task_{task}": score for task, score in series.latest().items()}
        if self._gradients:
            found |= {
                f"stability_gap/gradient_{name}": value
                for name, value in zip(GRADIENTS, self._gradients[-1][1:], strict=True)
                if math.isfinite(value)
            }
        return found

    def last_scores(self) -> dict[int, float]:
        """Return the latest score of each task with the weights in the module."""
        self.flush()
        return self._series["live"].latest() if "live" in self._series else {}

    def ended(self) -> dict[str, float]:
        """Return the metrics at the end of the last task that ended, by the names that loggers are given."""
        self.flush()
        found: dict[str, float] = {}
        for weights, series in self._series.items():
            prefix = "stability_gap" if weights == "live" else f"stability_gap_{weights}"
            last = series.summary[-1] if series.summary else {}
            found |= {
                f"{prefix}/{name}": value
                for name, value in last.items()
                if name not in ("task", "step") and value is not None
            }
        return found

    def record(self, provisional: bool = True) -> dict[str, Any]:
        """Return what the file holds.

        Args:
            provisional: Sum up the present task, too, as if it ended now.
        """
        self.flush()
        present = self.present or 0
        record: dict[str, Any] = {
            "format": FORMAT,
            "score": self._score,
            "higher_is_better": self._higher_is_better,
            "every_n_steps": self._every_n_steps,
            "recovery_share": RECOVERY_SHARE,
            "windows": list(self._windows),
            "tasks": [{"task": task, "name": self._names[task], "samples": self._samples[task]} for task in self.tasks],
            "switches": [{"task": task, "step": step} for task, step in self._switches],
            "series": {weights: series.record() for weights, series in self._series.items()},
            "summary": {
                weights: series.summaries(present, self.done) if provisional else [*series.summary]
                for weights, series in self._series.items()
            },
        }
        if self._gradients:
            columns = list(zip(*self._gradients, strict=True))
            record["gradients"] = {"steps": [int(step) for step in columns[0]]} | {
                name: [value if math.isfinite(value) else None for value in column]
                for name, column in zip(GRADIENTS, columns[1:], strict=True)
            }
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load."""
        self.flush()
        return {
            "done": self.done,
            "evaluated": self.evaluated,
            "due": self.due,
            "series": {weights: series.state_dict() for weights, series in self._series.items()},
            "baseline": dict(self._baseline),
            "names": dict(self._names),
            "samples": dict(self._samples),
            "switches": [list(switch) for switch in self._switches],
            "gradients": torch.tensor(self._gradients, dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.forget()
        self.done, self.evaluated, self.due = state["done"], state["evaluated"], state["due"]
        self._baseline = dict(state["baseline"])
        for weights, series in state["series"].items():
            self._of(weights).load_state_dict(series)
        self._names, self._samples = dict(state["names"]), dict(state["samples"])
        self._switches = [(task, step) for task, step in state["switches"]]
        self._gradients = [tuple(row) for row in state["gradients"].tolist()]

    def _wait(self, entry: _Waiting) -> None:
        self._waiting.append(entry)
        if len(self._waiting) >= _WAITING:
            self.flush()

    def _of(self, weights: str) -> GapSeries:
        """Return the series of a set of weights, begun where it is missing."""
        if weights not in self._series:
            self._series[weights] = GapSeries(
                self._windows, higher_is_better=self._higher_is_better, baseline=self._baseline
            )
        return self._series[weights]

    def _take(self, entry: _Waiting, values: list[float]) -> None:
        """Take in what was read."""
        if entry.kind == "end":
            for series in self._series.values():
                series.end(entry.present, entry.step)
        elif entry.kind == "gradients":
            self._gradients.append((entry.step, *values))
        elif entry.kind == "baseline":
            self._baseline = {
                task: score for task, score in zip(entry.tasks, values, strict=True) if math.isfinite(score)
            }
        else:
            self._of(entry.kind).add(dict(zip(entry.tasks, values, strict=True)), entry.present, entry.step)
            self.broken |= {task for task, value in zip(entry.tasks, values, strict=True) if not math.isfinite(value)}
