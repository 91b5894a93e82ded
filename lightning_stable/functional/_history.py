"""What is kept of one task of a continual history, and the checks of what comes in."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_stable.functional._windows import Window, pack_window, push_window, unpack_window

__all__ = [
    "TaskHistory",
    "checked_baseline",
    "checked_number",
    "checked_scores",
    "checked_step",
    "checked_task",
    "pack_history",
    "record_score",
    "unpack_history",
]


@dataclass
class TaskHistory:
    """What is kept of one task; scores are negated where lower is better.

    Attributes:
        latest: Its latest score.
        windows: One for each size of window.
        untrained: Its score before any training, if it is known.
        evaluations: How often it was evaluated.
        before: Its last score before it was first trained on, or the first while it was.
        end: Its score at the end of its training.
        lowest: Its lowest score since then while other tasks were learned.
        curve_sum: Sum of its first scores while it was learned.
        curve_count: How many these are.
    """

    latest: float
    windows: list[Window]
    untrained: float | None = None
    evaluations: int = 0
    before: float | None = None
    end: float | None = None
    lowest: float | None = None
    curve_sum: float = 0.0
    curve_count: int = 0


def record_score(history: TaskHistory, score: float, curve_steps: int | None) -> None:
    """Take one score into the history of its task, in place.

    Args:
        history: What is kept of the task.
        score: The score, higher being better.
        curve_steps: Evaluations that the learning-curve area counts; ``None`` if another task is learned.
    """
    for window in history.windows:
        push_window(window, history.evaluations, score)
    history.latest = score
    history.evaluations += 1
    if curve_steps is None:
        if history.end is not None:
            history.lowest = score if history.lowest is None else min(history.lowest, score)
        return
    if history.before is None:
        history.before = score
    if history.curve_count < curve_steps:
        history.curve_sum += score
        history.curve_count += 1


def pack_history(task: int, history: TaskHistory) -> dict[str, Any]:
    """Return what is kept of ``task`` as numbers, lists and dictionaries."""
    return {**vars(history), "task": task, "windows": [pack_window(window) for window in history.windows]}


def unpack_history(packed: dict[str, Any]) -> tuple[int, TaskHistory]:
    """Return the task and the history that :func:`pack_history` was given."""
    plain = {name: value for name, value in packed.items() if name not in ("task", "windows")}
    return packed["task"], TaskHistory(windows=[unpack_window(window) for window in packed["windows"]], **plain)


def checked_number(value: Any, smallest: int) -> int | None:
    """Return ``value`` as a plain whole number; ``None`` if it is none or below ``smallest``."""
    try:
        number = operator.index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or number < smallest else number


def checked_task(task: Any) -> int:
    """Return the number of a task as a plain number.

    Raises:
        ValueError: If it is no whole number from 0 on.
    """
    number = checked_number(task, 0)
    if number is None:
        raise ValueError(f"The task {task!r} is not a whole number from 0 on. Tasks are numbered from 0.")
    return number


def checked_scores(scores: Mapping[int, float], higher_is_better: bool) -> dict[int, float]:
    """Return the scores as plain numbers, negated where lower is better.

    Raises:
        ValueError: If there is none, one is no finite number, or a task is no whole number from 0 on.
    """
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(f"scores={scores!r} holds no score. Give the score of each evaluated task, as in {{0: 0.9}}.")
    better = {}
    for task, score in scores.items():
        number = checked_task(task)
        value = _as_float(score)
        if value is None:
            raise ValueError(f"The score of task {number} is {score!r}, which is not one number.")
        if not math.isfinite(value):
            raise ValueError(
                f"The score of task {number} is {value}. It has to be finite: leave the task out of this evaluation."
            )
        better[number] = value if higher_is_better else -value
    return better


def _as_float(score: Any) -> float | None:
    """Return a score as a plain number, ``None`` if it is none; ``float`` itself would read a text."""
    if isinstance(score, (str, bytes, bytearray)):
        return None
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        return None


def checked_step(step: Any, last: int | None, first: bool) -> int | None:
    """Return the step of an evaluation as a plain number, ``None`` if steps are not given.

    Args:
        step: The step.
        last: That of the last evaluation.
        first: Whether there was no evaluation before.

    Raises:
        ValueError: If it is no whole number from 0 on, goes back, or is given at some evaluations only.
    """
    if not first and (step is None) != (last is None):
        raise ValueError(f"step={step!r} follows step={last!r}. Give the steps at every evaluation or at none.")
    if step is None:
        return None
    number = checked_number(step, 0)
    if number is None:
        raise ValueError(f"step={step!r} is not a number of optimizer steps from 0 on. Give None to count evaluations.")
    if last is not None and number < last:
        raise ValueError(f"step={step} is before {last}, the step of the last evaluation. Steps cannot go back.")
    return number


def checked_baseline(baseline: float | Mapping[int, float] | None) -> float | dict[int, float] | None:
    """Return the score of an untrained model, of its own if it is one for each task.

    Raises:
        ValueError: If a score is no finite number, or a task is no whole number from 0 on.
    """
    each = (
        {checked_task(task): score for task, score in baseline.items()} if isinstance(baseline, Mapping) else baseline
    )
    for score in each.values() if isinstance(each, dict) else [each]:
        number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
        if score is not None and not number:
            raise ValueError(
                f"baseline={baseline!r} is no finite score. Give that of an untrained model, such as chance, one for "
                "each task by its number, or None."
            )
    return each
