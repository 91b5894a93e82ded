"""What happened in a sequence of tasks, and what the metrics have to say of it."""

from typing import Any

import pytest

from lightning_stable.functional import continual as functional

WINDOWS = (2, 10)


EVENTS: list[Any] = [
    (0, 0, {0: 0.1, 1: 0.2}),
    (0, 10, {0: 0.9, 1: 0.3}),
    "end",
    (1, 10, {0: 0.9, 1: 0.3}),
    (1, 12, {0: 1 / 3, 1: 0.5}),
    (1, 20, {0: 0.87, 1: 0.7}),
    "end",
    (2, 20, {0: 0.87, 1: 0.7, 2: 0.1}),
    (2, 30, {0: 0.5, 1: 0.8, 2: 0.6}),
]


SHARED = {"windows": WINDOWS, "curve_steps": 2, "recovery_share": 0.5}


def feed(metric, events=EVENTS):
    """Give a metric these events."""
    current = 0
    for event in events:
        if event == "end":
            metric.end_task(current)
        else:
            current, step, scores = event
            metric.update(scores, current_task=current, step=step)
    return metric


def expected(events=EVENTS, **settings):
    """Return the values by the functions alone."""
    state = functional.init_continual(**{**SHARED, **settings})
    for event in events:
        if event == "end":
            functional.end_task(state, state.current)
        else:
            functional.update_continual(state, event[2], event[0], event[1])
    return functional.compute_continual(state)


def numbers(values):
    return {name: float(value) for name, value in values.items()}


def assert_values(found, wanted):
    assert numbers(found) == pytest.approx(wanted, rel=1e-6, nan_ok=True)
    assert list(found) == sorted(wanted)
