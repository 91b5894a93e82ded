"""The scores of one set of weights over a run: the curve of each task, and the metrics that follow from them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_stable.functional.continual import (
    ContinualState,
    compute_continual,
    end_task,
    init_continual,
    pack_continual,
    unpack_continual,
    update_continual,
)

__all__ = ["RECOVERY_SHARE", "GapSeries"]

# Share of a fall that has to be made up for to count as recovered.
RECOVERY_SHARE = 0.9


class GapSeries:
    """Curves and metrics of one set of weights.

    Args:
        windows: Windows of forgetting and plasticity, in evaluations.
        higher_is_better: Whether a higher score is better.
        baseline: The score of each task before any training, as far as it is known.

    Attributes:
        steps: For each task, the optimizer steps before each of its evaluations.
        scores: For each task, the scores; not a number where an evaluation failed.
        summary: The metrics at the end of each task, in order.
    """

    def __init__(self, windows: Sequence[int], *, higher_is_better: bool, baseline: Mapping[int, float]) -> None:
        self._tracker: ContinualState = init_continual(
            tuple(windows), higher_is_better=higher_is_better, recovery_share=RECOVERY_SHARE, baseline=baseline
        )
        self.steps: dict[int, list[int]] = {}
        self.scores: dict[int, list[float]] = {}
        self.summary: list[dict[str, Any]] = []

    def add(self, scores: dict[int, float], task: int, step: int) -> None:
        """Add one evaluation, made while ``task`` was trained on."""
        for evaluated, score in scores.items():
            self.steps.setdefault(evaluated, []).append(step)
            self.scores.setdefault(evaluated, []).append(score)
        known = {evaluated: score for evaluated, score in scores.items() if math.isfinite(score)}
        if known:
            update_continual(self._tracker, known, task, step)

    def end(self, task: int, step: int) -> None:
        """End a task with its latest evaluation."""
        if math.isfinite(self.latest().get(task, math.nan)):
            end_task(self._tracker, task)
        self.summary.append(self._values(self._tracker, task, step))

    def latest(self) -> dict[int, float]:
        """Return the latest score of each task."""
        return {task: scores[-1] for task, scores in self.scores.items()}

    def summaries(self, task: int, step: int) -> list[dict[str, Any]]:
        """Return the metrics at the end of each task, the present one as if it ended now."""
        before = [dict(entry) for entry in self.summary]
        if not math.isfinite(self.latest().get(task, math.nan)):
            return before
        ended = unpack_continual(pack_continual(self._tracker))
        end_task(ended, task)
        return [*before, self._values(ended, task, step)]

    def record(self) -> list[dict[str, Any]]:
        """Return the curves as the file has them."""
        return [
            {"task": task, "steps": list(self.steps[task]), "scores": [_finite(score) for score in self.scores[task]]}
            for task in sorted(self.steps)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load."""
        return {
            "tracker": pack_continual(self._tracker),
            "steps": {task: torch.tensor(steps) for task, steps in self.steps.items()},
            "scores": {task: torch.tensor(scores, dtype=torch.float64) for task, scores in self.scores.items()},
            "summary": [dict(entry) for entry in self.summary],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._tracker = unpack_continual(state["tracker"])
        self.steps = {task: steps.tolist() for task, steps in state["steps"].items()}
        self.scores = {task: scores.tolist() for task, scores in state["scores"].items()}
        self.summary = [dict(entry) for entry in state["summary"]]

    @staticmethod
    def _values(tracker: ContinualState, task: int, step: int) -> dict[str, Any]:
        values = {name: _finite(value) for name, value in compute_continual(tracker).items()}
        return {"task": task, "step": step, **values}


def _finite(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return value if math.isfinite(value) else None
