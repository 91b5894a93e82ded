"""Slow twin of the metrics of continual evaluation: each from its definition, over the full history, in plain Python.

A history is a list of events in the order in which they happened:

- ``("scores", {task: score}, current_task, step)``: one evaluation of some tasks while ``current_task`` is learned,
  after ``step`` optimizer steps (``None`` where nobody counts them),
- ``("end", task)``: the task is over, and the evaluation before this event is that of its end.

Terms used below. A task is *learned* from the first evaluation on at which it is the current one. A *stretch* is a run
of evaluations with one current task; the first of them is the evaluation at the switch. *Past* tasks are those that
were learned, all but the current one. *Now* is the latest evaluation of each task. A task that was never evaluated
counts nowhere.
"""

import math


class ContinualTwin:
    """All metrics of one history.

    Args:
        events: The history.
        windows: Lengths of the windows, in evaluations of a task.
        higher_is_better: False measures everything on the negated scores.
        curve_steps: How many first scores make a learning curve.
        recovery_share: Which share of a drop has to be made up for.
        baseline: Score of a model that learned nothing, where no evaluation before all training tells.
    """

    def __init__(
        self, events, windows=(10, 100), higher_is_better=True, curve_steps=10, recovery_share=0.9, baseline=None
    ):
        self.sign = 1 if higher_is_better else -1
        self.windows = windows
        self.curve_steps = curve_steps
        self.recovery_share = recovery_share
        self.baseline = None if baseline is None else self.sign * baseline
        # Evaluations as (scores, current task, step), and for each end how many evaluations there were before it.
        self.evaluations, self.ends = [], {}
        for event in events:
            if event[0] == "scores":
                _, scores, current, step = event
                self.evaluations.append(({task: self.sign * value for task, value in scores.items()}, current, step))
            else:
                self.ends[event[1]] = len(self.evaluations)  # a task that returns ends again: the last end counts

    # ------------------------------------------------------------------------------------------------ looking back

    def history(self, task, first=0, before=None, where=lambda current: True):
        """Return the scores of a task from one evaluation to another, at the current tasks that are asked for."""
        chosen = self.evaluations[first:before]
        return [scores[task] for scores, current, _ in chosen if task in scores and where(current)]

    def learned(self):
        """Return the tasks in the order in which they were first learned, those that were never evaluated left out."""
        evaluated = self.evaluated()
        return [task for task in dict.fromkeys(current for _, current, _ in self.evaluations) if task in evaluated]

    def evaluated(self):
        return sorted({task for scores, _, _ in self.evaluations for task in scores})

    def current(self):
        return self.evaluations[-1][1] if self.evaluations else None

    def past(self):
        return [task for task in self.learned() if task != self.current()]

    def stretches(self):
        """Return for each stretch its task, its first evaluation, and the number after its last."""
        found = []
        for number, (_, current, _) in enumerate(self.evaluations):
            if found and found[-1][0] == current:
                found[-1][2] = number + 1
            else:
                found.append([current, number, number + 1])
        return found

    # ------------------------------------------------------------------------------------------------ the ends of tasks

    def average_accuracy(self):
        return mean(self.history(task)[-1] for task in self.learned())

    def forgetting(self):
        lost = []
        for task in self.past():
            if task in self.ends and self.history(task, before=self.ends[task]):
                lost.append(self.history(task, before=self.ends[task])[-1] - self.history(task)[-1])
        return mean(lost)

    def minima(self):
        """Return the lowest score of each past task after its end, while it is not the one that is learned."""
        after = [
            self.history(task, first=self.ends[task], where=lambda current, task=task: current != task)
            for task in self.past()
            if task in self.ends
        ]
        return [min(scores) for scores in after if scores]

    def worst_case_accuracy(self):
        own = self.history(self.current())
        if not own:
            return math.nan
        k = len(self.learned())
        return own[-1] if k == 1 else own[-1] / k + (1 - 1 / k) * mean(self.minima())

    def forward_transfer(self):
        gains = []
        # The task that was learned first has no before, even if it was never evaluated.
        for task in [task for task in self.learned() if task != self.evaluations[0][1]]:
            first = [current for _, current, _ in self.evaluations].index(task)
            before, own = self.history(task, before=first), self.history(task, where=lambda c, task=task: c == task)
            baseline = self.untrained(task)
            if baseline is not None and (before or own):
                gains.append((before[-1] if before else own[0]) - baseline)
        return mean(gains)

    def untrained(self, task):
        """Return the score of a task by a model that learned nothing, if it is known."""
        for number, (scores, _, step) in enumerate(self.evaluations):
            if task in scores:
                before_training = number == 0 if step is None else step == 0
                return scores[task] if before_training else self.baseline
        return self.baseline

    # ------------------------------------------------------------------------------------------------ every evaluation

    def windowed(self, window, direction):
        """Return the mean over tasks of the largest rise (1) or drop (-1) within a window of evaluations."""
        largest = []
        for task in self.evaluated():
            scores = self.history(task)
            pairs = [(m, n) for n in range(len(scores)) for m in range(n) if n - m < window]
            if pairs:
                largest.append(max(direction * (scores[n] - scores[m]) for m, n in pairs))
        return mean(largest)

    def learning_curve_area(self):
        curves = [self.history(task, where=lambda current, task=task: current == task) for task in self.learned()]
        return mean(mean(curve[: self.curve_steps]) for curve in curves if curve)

    # ------------------------------------------------------------------------------------------------ the gap

    def gaps(self):
        """Return for each switch and past task the depth, and the steps until the recovery or None."""
        found, learned = [], []
        for task, first, end in self.stretches():
            for other in learned:
                if other != task and self.history(other, before=first + 1):
                    # At the switch if it was evaluated there, else before.
                    reference = self.history(other, before=first + 1)[-1]
                    found.append(self.gap(other, reference, first, end))
            learned = [*learned, task] if task not in learned else learned
        return found

    def gap(self, task, reference, first, end):
        """Return the depth of one task's gap in one stretch and the steps until it is over."""
        numbers = [number for number in range(first, end) if task in self.evaluations[number][0]]
        scores = [self.evaluations[number][0][task] for number in numbers]
        if not scores or min(scores) >= reference:
            return 0.0, None
        lowest = min(scores)
        # All of a drop may come to more than the reference by rounding.
        enough = min(lowest + self.recovery_share * (reference - lowest), reference)
        for number, score in list(zip(numbers, scores, strict=True))[scores.index(lowest) + 1 :]:
            if score >= enough:
                return reference - lowest, self.clock(number) - self.clock(first)
        return reference - lowest, None

    def clock(self, number):
        step = self.evaluations[number][2]
        return number if step is None else step

    # ------------------------------------------------------------------------------------------------ all of them

    def compute(self):
        """Return every metric under its name; not a number where it is undefined."""
        gaps = self.gaps()
        recoveries = [steps for depth, steps in gaps if depth > 0]
        found = {
            "average_accuracy": self.sign * self.average_accuracy(),
            "forgetting": self.forgetting(),
            "backward_transfer": -self.forgetting(),
            "forward_transfer": self.forward_transfer(),
            "min_accuracy": self.sign * mean(self.minima()),
            "worst_case_accuracy": self.sign * self.worst_case_accuracy(),
            "learning_curve_area": self.sign * self.learning_curve_area(),
            "gap_depth": mean(depth for depth, _ in gaps),
            "gap_recovery": mean(steps for steps in recoveries if steps is not None),
            "gap_recovered": mean(steps is not None for steps in recoveries),
        }
        for window in self.windows:
            found[f"windowed_forgetting_{window}"] = self.windowed(window, -1)
            found[f"windowed_plasticity_{window}"] = self.windowed(window, 1)
        return found


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def continual(events, **settings):
    """Return all metrics of a history."""
    return ContinualTwin(events, **settings).compute()
