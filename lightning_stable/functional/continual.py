r"""Metrics of continual learning from a stream of evaluations: what is kept, what is forgotten, and the stability gap.

Tasks :math:`0 \dots k` are learned in turn, :math:`k` now. :math:`A_i(n)` is the score of task :math:`i` at evaluation
:math:`n`, :math:`e_i` the evaluation at which its training ended, :math:`t` the latest one. Scores are as given; where
lower is better, all of it is measured on :math:`-A`, and what is an average of scores is reported in their own sign.

.. math::

    \mathrm{ACC} &= \operatorname{mean}_{i \le k} A_i(t) \\
    \mathrm{FORG} &= \operatorname{mean}_{i < k}\, [A_i(e_i) - A_i(t)] = -\mathrm{BWT} \\
    \text{min-ACC} &= \operatorname{mean}_{i < k}\, \min_{e_i < n \le t} A_i(n) \\
    \text{WC-ACC} &= \tfrac{1}{k + 1} A_k(t) + \tfrac{k}{k + 1}\,\text{min-ACC} \\
    \mathrm{WF}^w &= \operatorname{mean}_i\, \max_{m < n < m + w} [A_i(m) - A_i(n)] \\
    \mathrm{WP}^w &= \operatorname{mean}_i\, \max_{m < n < m + w} [A_i(n) - A_i(m)]

A window :math:`w` counts evaluations of that task; WF and WP run over every evaluated task and need no task numbers.
The learning-curve area (LCA) is the mean over tasks of the mean of the first scores of a task while it is learned.
Forward transfer (FWT) is the mean over tasks, but for the one learned first, of the last score before the task was
trained on (without one, the first while it is) minus its score before any training (without one, ``baseline``). The
gap of a switch to task :math:`k` is, for each past task, its score at the switch minus its lowest score while :math:`k`
is learned, and the steps until a share of that fall was made up for.

Sources: arXiv 2205.13452 for min-ACC, WC-ACC, WF and WP; the definitions of ACC, FORG, BWT, FWT and LCA are the usual
ones, from memory. Different from the released code of 2205.13452: its WP skips starting points that are lower than
an earlier one, which is right for drops only ([0.9, 0.1, 0.8] has a rise of 0.7). Ours: FWT from a stream of
evaluations, and the gap's depth and recovery.

Conventions: **the first evaluation under a task is the one before its first update**. Before any training are those at
``step`` 0; where steps are not given, the first of all. Tasks may be learned in any order and come back:
:math:`i \le k` are the tasks that were learned so far, :math:`i < k` those without the one that is learned now, and the
end of a task that came back is its last one. A task that was never evaluated counts nowhere. A value that is not
defined yet is not-a-number. Memory: a few numbers and at most ``2 w`` values for each task and window; time: constant
for each score and window, amortised.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_stable.functional._gap import GapTrack, begin_gaps, gap_summary, pack_gaps, record_gaps, unpack_gaps
from lightning_stable.functional._history import (
    TaskHistory,
    checked_baseline,
    checked_number,
    checked_scores,
    checked_step,
    checked_task,
    pack_history,
    record_score,
    unpack_history,
)
from lightning_stable.functional._windows import Window, check_windows

__all__ = [
    "ContinualState",
    "compute_continual",
    "end_task",
    "init_continual",
    "pack_continual",
    "unpack_continual",
    "update_continual",
]


@dataclass
class ContinualState:
    """The history in short. Change it with :func:`update_continual` and :func:`end_task` only.

    Attributes:
        windows: Sizes of the windows, in evaluations.
        higher_is_better: Whether a higher score is better.
        curve_steps: Evaluations that the learning-curve area counts.
        recovery_share: Share of a fall that has to be made up for to count as recovered.
        baseline: Score of an untrained model, for tasks that were not evaluated before any training: one number for
            all tasks, or one for each.
        evaluations: Evaluations so far.
        current: The task that is learned.
        step: The step of the latest evaluation, ``None`` if steps are not given.
        tasks: What is kept of each task that was evaluated.
        trained: The tasks that were learned, in the order in which they first were.
        gap: The gaps after switches.
    """

    windows: tuple[int, ...]
    higher_is_better: bool
    curve_steps: int
    recovery_share: float
    baseline: float | dict[int, float] | None
    evaluations: int = 0
    current: int | None = None
    step: int | None = None
    tasks: dict[int, TaskHistory] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    gap: GapTrack = field(default_factory=GapTrack)


def init_continual(
    windows: Sequence[int] = (10, 100),
    *,
    higher_is_better: bool = True,
    curve_steps: int = 10,
    recovery_share: float = 0.9,
    baseline: float | Mapping[int, float] | None = None,
) -> ContinualState:
    """Return a history without evaluations.

    Args:
        windows: Sizes of the windows of WF and WP, in evaluations, from 2 on.
        higher_is_better: Whether a higher score is better, as for accuracy; ``False`` for a loss or a perplexity.
        curve_steps: Evaluations that the learning-curve area counts, from 1 on.
        recovery_share: Share of a fall that has to be made up for to count as recovered, in (0, 1].
        baseline: Score of an untrained model, such as chance, for tasks not evaluated before any training: one number
            for all tasks, or one for each by its number.

    Raises:
        ValueError: If a value is not allowed.
    """
    sizes = check_windows(windows)
    steps = checked_number(curve_steps, 1)
    if steps is None:
        raise ValueError(f"curve_steps={curve_steps!r} is not a number of evaluations from 1 on. 10 is usual.")
    if isinstance(recovery_share, bool) or not isinstance(recovery_share, (int, float)) or not 0 < recovery_share <= 1:
        raise ValueError(
            f"recovery_share={recovery_share!r} is not in (0, 1]: it is a share of the fall. 0.9 is usual."
        )
    if higher_is_better not in (True, False):
        raise ValueError(f"higher_is_better={higher_is_better!r} is neither True nor False.")
    return ContinualState(sizes, bool(higher_is_better), steps, recovery_share, checked_baseline(baseline))


def update_continual(
    state: ContinualState, scores: Mapping[int, float], current_task: int, step: int | None = None
) -> None:
    """Take one evaluation into the history, in place.

    Args:
        state: The history.
        scores: The score of each task that was evaluated.
        current_task: The task that is learned; with its first evaluation, the task that is about to be.
        step: Optimizer steps done so far, in which recovery is then counted; ``None`` to count evaluations.

    Raises:
        ValueError: If there is no score, one is not finite, a task is negative, or ``step`` goes back or is given at
            some evaluations only. The history is then as before.
    """
    current = checked_task(current_task)
    better = checked_scores(scores, state.higher_is_better)
    step = checked_step(step, state.step, state.evaluations == 0)
    untrained = state.evaluations == 0 if step is None else step == 0
    now = state.evaluations if step is None else step
    state.evaluations, state.step = state.evaluations + 1, step
    if state.current != current:
        _switch(state, current, better, now)
    for task, score in better.items():
        history = state.tasks.get(task)
        if history is None:
            history = state.tasks[task] = TaskHistory(
                score, [Window(size) for size in state.windows], score if untrained else None
            )
        record_score(history, score, state.curve_steps if task == current else None)
    record_gaps(state.gap, better, now, state.recovery_share)


def end_task(state: ContinualState, task: int, scores: Mapping[int, float] | None = None) -> None:
    """Note, in place, that the training of a task has ended; again, if it came back.

    Args:
        state: The history.
        task: The task.
        scores: Scores at its end, if not those of the latest evaluation. They serve as reference for forgetting and
            are no evaluation of their own.

    Raises:
        ValueError: If the task was never evaluated or is negative, or ``scores`` does not hold it or is bad.
    """
    task = checked_task(task)
    if task not in state.tasks:
        raise ValueError(f"Task {task} ends but was never evaluated. Evaluate it at least once before its end.")
    history = state.tasks[task]
    if scores is None:
        end = history.latest
    else:
        better = checked_scores(scores, state.higher_is_better)
        if task not in better:
            raise ValueError(
                f"The scores at the end of task {task} are of the tasks {sorted(better)}. Give its own too."
            )
        end = better[task]
    history.end, history.lowest = end, None


def compute_continual(state: ContinualState) -> dict[str, float]:
    """Return each metric by its name; not-a-number where it is not defined yet."""
    everything = [state.tasks[task] for task in sorted(state.tasks)]
    learned = {task: state.tasks[task] for task in sorted(state.tasks) if _is_learned(state, task)}
    current = None if state.current is None else learned.get(state.current)
    past = [history for history in learned.values() if history is not current]
    forgetting = _mean(history.end - history.latest for history in past if history.end is not None)
    lowest = _mean(history.lowest for history in past if history.lowest is not None)
    own_sign = {
        "average_accuracy": _mean(history.latest for history in learned.values()),
        "min_accuracy": lowest,
        "worst_case_accuracy": _worst_case(current, len(past), lowest),
        "learning_curve_area": _mean(h.curve_sum / h.curve_count for h in everything if h.curve_count),
    }
    if not state.higher_is_better:
        own_sign = {name: 0.0 - value for name, value in own_sign.items()}
    values = {
        "average_accuracy": own_sign["average_accuracy"],
        "forgetting": forgetting,
        "backward_transfer": 0.0 - forgetting,
        "forward_transfer": _forward_transfer(state),
        "min_accuracy": own_sign["min_accuracy"],
        "worst_case_accuracy": own_sign["worst_case_accuracy"],
    }
    for place, size in enumerate(state.windows):
        windows = [history.windows[place] for history in everything]
        values[f"windowed_forgetting_{size}"] = _mean(window.drop for window in windows if window.drop is not None)
        values[f"windowed_plasticity_{size}"] = _mean(window.rise for window in windows if window.rise is not None)
    values["learning_curve_area"] = own_sign["learning_curve_area"]
    return {**values, **gap_summary(state.gap)}


def pack_continual(state: ContinualState) -> dict[str, Any]:
    """Return the history as numbers, lists and dictionaries by name, which a checkpoint and JSON can hold."""
    baseline = state.baseline
    return {
        **vars(state),
        "windows": list(state.windows),
        "baseline": [list(each) for each in baseline.items()] if isinstance(baseline, dict) else baseline,
        "tasks": [pack_history(task, history) for task, history in state.tasks.items()],
        "trained": list(state.trained),
        "gap": pack_gaps(state.gap),
    }


def unpack_continual(packed: dict[str, Any]) -> ContinualState:
    """Return the history that :func:`pack_continual` was given."""
    baseline = packed["baseline"]
    parts = {
        "windows": tuple(packed["windows"]),
        "baseline": dict(baseline) if isinstance(baseline, list) else baseline,
        "tasks": dict(unpack_history(history) for history in packed["tasks"]),
        "trained": list(packed["trained"]),
        "gap": unpack_gaps(packed["gap"]),
    }
    return ContinualState(**{**packed, **parts})


def _switch(state: ContinualState, current: int, better: Mapping[int, float], now: int) -> None:
    """Begin a task: what the past tasks score now is what their gaps are measured from."""
    state.current = current
    if current not in state.trained:
        state.trained.append(current)
        if current in state.tasks:
            state.tasks[current].before = state.tasks[current].latest
    scores = {task: history.latest for task, history in state.tasks.items()} | dict(better)
    past = {task: score for task, score in scores.items() if task != current and _is_learned(state, task)}
    begin_gaps(state.gap, past, now)


def _is_learned(state: ContinualState, task: int) -> bool:
    """Return whether a task is or was learned; one that has ended was, even if nobody looked."""
    return task in state.trained or (task in state.tasks and state.tasks[task].end is not None)


def _forward_transfer(state: ContinualState) -> float:
    """Return the mean gain of tasks before they were trained on; what was learned first has no before."""
    gains = []
    for task in state.trained[1:]:
        history = state.tasks.get(task)
        if history is None or history.before is None:
            continue
        baseline = history.untrained
        if baseline is None:
            given = state.baseline.get(task) if isinstance(state.baseline, dict) else state.baseline
            if given is None:
                continue
            baseline = given if state.higher_is_better else -given
        gains.append(history.before - baseline)
    return _mean(gains)


def _worst_case(current: TaskHistory | None, past: int, lowest: float) -> float:
    """Return the mean of the present task's score and, once for each past task, their mean lowest score."""
    if current is None:
        return math.nan
    return (current.latest + past * lowest) / (1 + past) if past else current.latest


def _mean(values: Iterable[float]) -> float:
    """Return the mean, not-a-number of nothing."""
    kept = list(values)
    return math.fsum(kept) / len(kept) if kept else math.nan
