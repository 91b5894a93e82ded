r"""Metrics of continual learning, from the scores of all tasks at each evaluation, for any module and any score.

Use them where a model learns one task after another and is evaluated on all of them, best every few steps: metrics at
the end of tasks cannot see a collapse right after a switch. :class:`ContinualMetrics` has all of them over one
history. Cost: some hundred numbers for each task, no samples; some tens of microseconds for an update of five tasks.

The first evaluation under a task is the one before its first update: evaluate once at each switch, or give the last
scores of the task before again. Scores are those of the whole evaluation and equal on all ranks.

Example:
    >>> from lightning_stable.metrics import ContinualMetrics
    >>> metrics = ContinualMetrics(windows=(10,))
    >>> metrics.update({0: 0.1}, current_task=0)
    >>> metrics.update({0: 0.9}, current_task=0)
    >>> metrics.end_task(0)
    >>> for old, new in [(0.9, 0.0), (0.3, 0.5), (0.8, 0.7)]:
    ...     metrics.update({0: old, 1: new}, current_task=1)
    >>> values = metrics.compute()
    >>> [round(float(values[name]), 2) for name in ("average_accuracy", "forgetting", "min_accuracy", "gap_depth")]
    [0.75, 0.1, 0.3, 0.6]
"""

from collections.abc import Sequence
from typing import Any, cast

from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_stable.metrics._history import History, HistoryMetric, Scores, naming

__all__ = [
    "AverageAccuracy",
    "BackwardTransfer",
    "ContinualMetrics",
    "Forgetting",
    "ForwardTransfer",
    "GapDepth",
    "GapRecovered",
    "GapRecovery",
    "LearningCurveArea",
    "MinAccuracy",
    "WindowedForgetting",
    "WindowedPlasticity",
    "WorstCaseAccuracy",
]


_KEEPER = "average_accuracy"  # the part with which a collection's history is saved and synchronised


class AverageAccuracy(HistoryMetric):
    """Mean over the tasks learned so far of their latest score (ACC).

    Args:
        higher_is_better: Whether a higher score is better; ``False`` for a loss or a perplexity.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__("average_accuracy", {"higher_is_better": higher_is_better}, own_sign=True, **kwargs)


class Forgetting(HistoryMetric):
    """Mean over past tasks of the score at their end minus the latest one (FORG); positive is worse.

    Args:
        higher_is_better: Whether a higher score is better; ``False`` for a loss, whose rise is then forgetting.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__("forgetting", {"higher_is_better": higher_is_better}, **kwargs)


class BackwardTransfer(HistoryMetric):
    """Mean over past tasks of the latest score minus the one at their end (BWT): forgetting with the other sign.

    Args:
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__("backward_transfer", {"higher_is_better": higher_is_better}, **kwargs)


class ForwardTransfer(HistoryMetric):
    """Mean over tasks from 1 on of what they gained before they were trained on (FWT).

    Args:
        baseline: Score of an untrained model, for tasks that were not evaluated before any training: one number, or one
            for each task.
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(
        self, baseline: float | dict[int, float] | None = None, *, higher_is_better: bool = True, **kwargs: Any
    ) -> None:
        settings = {"baseline": baseline, "higher_is_better": higher_is_better}
        super().__init__("forward_transfer", settings, **kwargs)


class MinAccuracy(HistoryMetric):
    """Mean over past tasks of their lowest score since their end (min-ACC); of a loss, the highest.

    Args:
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__("min_accuracy", {"higher_is_better": higher_is_better}, own_sign=True, **kwargs)


class WorstCaseAccuracy(HistoryMetric):
    """Mean of the present task's score and the lowest ones of the past tasks (WC-ACC).

    Args:
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__("worst_case_accuracy", {"higher_is_better": higher_is_better}, own_sign=True, **kwargs)


class WindowedForgetting(HistoryMetric):
    """Mean over tasks of the largest drop within any window of so many evaluations (WF); needs no end of a task.

    Args:
        window: Evaluations in a window, from 2 on.
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, window: int = 10, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        settings = {"windows": (window,), "higher_is_better": higher_is_better}
        super().__init__(f"windowed_forgetting_{window}", settings, **kwargs)


class WindowedPlasticity(HistoryMetric):
    """Mean over tasks of the largest rise within any window of so many evaluations (WP); needs no end of a task.

    Args:
        window: Evaluations in a window, from 2 on.
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, window: int = 10, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        settings = {"windows": (window,), "higher_is_better": higher_is_better}
        super().__init__(f"windowed_plasticity_{window}", settings, **kwargs)


class LearningCurveArea(HistoryMetric):
    """Mean over tasks of the mean of their first scores while they are learned (LCA).

    Args:
        steps: Evaluations that count, from 1 on.
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, steps: int = 10, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        settings = {"curve_steps": steps, "higher_is_better": higher_is_better}
        super().__init__("learning_curve_area", settings, own_sign=True, **kwargs)


class GapDepth(HistoryMetric):
    """Mean over switches and past tasks of the fall after the switch, 0 where there was none.

    Args:
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        super().__init__("gap_depth", {"higher_is_better": higher_is_better}, **kwargs)


class GapRecovery(HistoryMetric):
    """Mean steps from a switch until a fall was made up for, over the falls that were.

    Args:
        recovery_share: Share of the fall that has to be made up for, in (0, 1].
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, recovery_share: float = 0.9, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        settings = {"recovery_share": recovery_share, "higher_is_better": higher_is_better}
        super().__init__("gap_recovery", settings, **kwargs)


class GapRecovered(HistoryMetric):
    """Share of the falls after switches that were made up for before the next switch or so far.

    Args:
        recovery_share: Share of the fall that has to be made up for, in (0, 1].
        higher_is_better: Whether a higher score is better.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, recovery_share: float = 0.9, *, higher_is_better: bool = True, **kwargs: Any) -> None:
        settings = {"recovery_share": recovery_share, "higher_is_better": higher_is_better}
        super().__init__("gap_recovered", settings, **kwargs)


class ContinualMetrics(MetricCollection):
    r"""All metrics of continual learning over one history (arXiv 2205.13452).

    The equations are those of :mod:`lightning_stable.functional.continual`. The parts share the history, so an
    evaluation is taken in once and all values are made in one go; ``state_dict`` holds it once. A part is there to be
    read: ``metrics["forgetting"].compute()``; to reset it resets all.

    Args:
        windows: Sizes of the windows of forgetting and plasticity, in evaluations, each from 2 on.
        higher_is_better: Whether a higher score is better, as for accuracy; ``False`` for a loss or a perplexity.
        curve_steps: Evaluations that the learning-curve area counts, from 1 on.
        recovery_share: Share of a fall that has to be made up for to count as recovered, in (0, 1].
        baseline: Score of an untrained model, such as chance, for tasks that were not evaluated before any training:
            one number, or one for each task by its number.
        prefix: What to put before the names of the values.
        postfix: What to put after them.

    Raises:
        ValueError: At construction for a value out of range; in an update for no score, one that is not finite, a
            negative task or a step that goes back; at the end of a task that was never evaluated.
    """

    def __init__(
        self,
        windows: Sequence[int] = (10, 100),
        higher_is_better: bool = True,
        curve_steps: int = 10,
        recovery_share: float = 0.9,
        baseline: float | dict[int, float] | None = None,
        prefix: str | None = None,
        postfix: str | None = None,
    ) -> None:
        owner = type(self).__name__
        with naming(owner):
            history = History(
                {
                    "windows": windows,
                    "higher_is_better": higher_is_better,
                    "curve_steps": curve_steps,
                    "recovery_share": recovery_share,
                    "baseline": baseline,
                }
            )
        parts: dict[str, HistoryMetric] = {
            "average_accuracy": AverageAccuracy(higher_is_better=higher_is_better),
            "forgetting": Forgetting(higher_is_better=higher_is_better),
            "backward_transfer": BackwardTransfer(higher_is_better=higher_is_better),
            "forward_transfer": ForwardTransfer(baseline, higher_is_better=higher_is_better),
            "min_accuracy": MinAccuracy(higher_is_better=higher_is_better),
            "worst_case_accuracy": WorstCaseAccuracy(higher_is_better=higher_is_better),
            "learning_curve_area": LearningCurveArea(curve_steps, higher_is_better=higher_is_better),
            "gap_depth": GapDepth(higher_is_better=higher_is_better),
            "gap_recovery": GapRecovery(recovery_share, higher_is_better=higher_is_better),
            "gap_recovered": GapRecovered(recovery_share, higher_is_better=higher_is_better),
        }
        for size in history.windows:
            parts[f"windowed_forgetting_{size}"] = WindowedForgetting(size, higher_is_better=higher_is_better)
            parts[f"windowed_plasticity_{size}"] = WindowedPlasticity(size, higher_is_better=higher_is_better)
        # Compute groups would copy the packed history to each part at each update.
        super().__init__(dict(parts), prefix=prefix, postfix=postfix, compute_groups=False)
        self._history = history
        for name, part in parts.items():
            part.share(history, owner, keeper=name == _KEEPER)

    @override
    def forward(self, scores: Scores, current_task: int, step: int | None = None) -> dict[str, Any]:
        """Take one evaluation in and return the values so far."""
        self.update(scores, current_task, step)
        return self.compute()

    @override
    def update(  # type: ignore[override]  # a ModuleDict's update takes modules
        self, scores: Scores, current_task: int, step: int | None = None
    ) -> None:
        """Take one evaluation in.

        Args:
            scores: The score of each evaluated task, over the whole evaluation, equal on all ranks.
            current_task: The task that is learned; at its first evaluation, before its first update, about to be.
            step: Optimizer steps so far, for recovery in steps; ``None`` counts evaluations.
        """
        with naming(type(self).__name__):
            self._history.update(scores, current_task, step)

    def end_task(self, task: int, scores: Scores | None = None) -> None:
        """Note that the training of a task has ended.

        Args:
            task: The task.
            scores: Scores at its end, if not those of the latest evaluation.
        """
        with naming(type(self).__name__):
            self._history.end_task(task, scores)

    @override
    def compute(self) -> dict[str, Any]:
        """Return the values so far by name, not-a-number where one is not defined; synchronised once."""
        parts = cast("dict[str, HistoryMetric]", self._modules)
        keeper = parts[_KEEPER]
        with keeper.sync_context(dist_sync_fn=keeper.dist_sync_fn, should_sync=keeper.sync_on_compute):
            return {self._set_name(name): part.value() for name, part in parts.items()}
