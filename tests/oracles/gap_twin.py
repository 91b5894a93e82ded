"""Brute force over a whole history of evaluations: what a run that ended several tasks has to report.

A history is for each task a list of (step, score), one for each evaluation, higher scores being better. ``switches[k]``
is the step at which task k began, with an evaluation at that step, before its first update; a task ends where the next
one begins. ``untrained`` has the score of each task before all training.
"""

from statistics import fmean

Curve = list[tuple[int, float]]


def summary(
    history: dict[int, Curve],
    switches: list[int],
    end: int,
    windows: list[int],
    untrained: dict[int, float],
    curve_steps: int = 10,
    share: float = 0.9,
) -> dict[str, float | None]:
    """Return every metric at the end of the last task of ``switches``, undefined ones as ``None``."""
    last = len(switches) - 1
    ends = [*switches[1:], end]
    curves = {task: [point for point in curve if point[0] <= end] for task, curve in history.items()}
    now = {task: curve[-1][1] for task, curve in curves.items() if curve}
    lost = [_at(curves[task], ends[task]) - now[task] for task in range(last)]
    minima = [min(score for step, score in curves[task] if step > ends[task]) for task in range(last)]
    found: dict[str, float | None] = {
        "average_accuracy": fmean(now.values()),
        "forgetting": _mean(lost),
        "backward_transfer": _mean([-value for value in lost]),
        "forward_transfer": _mean([_at(curves[task], switches[task]) - untrained[task] for task in range(1, last + 1)]),
        "min_accuracy": _mean(minima),
        "worst_case_accuracy": fmean([now[last], *minima]) if last else now[0],
        "learning_curve_area": fmean(
            fmean([score for step, score in curves[task] if switches[task] <= step <= ends[task]][:curve_steps])
            for task in range(last + 1)
        ),
        **_gaps(curves, switches, ends, share),
    }
    for window in windows:
        scores = [[score for _, score in curve] for curve in curves.values() if len(curve) > 1]
        found[f"windowed_forgetting_{window}"] = _mean([largest_fall(values, window) for values in scores])
        rising = [largest_fall([-value for value in values], window) for values in scores]
        found[f"windowed_plasticity_{window}"] = _mean(rising)
    return found


def largest_fall(values: list[float], window: int) -> float:
    """Return by how much a later value is below an earlier one at most, within ``window`` values.

    That is less than 0 if every value is above those before.
    """
    pairs = [(m, n) for n in range(len(values)) for m in range(max(0, n - window + 1), n)]
    return max(values[m] - values[n] for m, n in pairs)


def _gaps(curves: dict[int, Curve], switches: list[int], ends: list[int], share: float) -> dict[str, float | None]:
    depths, recoveries = [], []
    for new in range(1, len(switches)):
        for old in range(new):
            before = _at(curves[old], switches[new])
            within = [point for point in curves[old] if switches[new] < point[0] <= ends[new]]
            lowest = min([score for _, score in within], default=before)
            depths.append(max(0.0, before - lowest))
            if depths[-1] == 0:
                continue
            bottom = next(step for step, score in within if score == lowest)
            wanted = lowest + share * (before - lowest)
            back = [step for step, score in within if step > bottom and score >= wanted]
            recoveries.append(back[0] - switches[new] if back else None)
    times = [float(steps) for steps in recoveries if steps is not None]
    return {
        "gap_depth": _mean(depths),
        "gap_recovery": _mean(times),
        "gap_recovered": len(times) / len(recoveries) if recoveries else None,
    }


def _at(curve: Curve, step: int) -> float:
    """Return the last score up to a step."""
    return next(score for place, score in reversed(curve) if place <= step)


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
