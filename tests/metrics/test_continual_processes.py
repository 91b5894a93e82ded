"""Metrics of continual learning in two processes."""

from typing import Any

import pytest
import torch
from metrics.continual_events import EVENTS, SHARED, assert_values, expected, feed

from lightning_stable.metrics import (
    ContinualMetrics,
    WindowedForgetting,
)


def sync_job(make: str, different: bool = False) -> dict[str, Any]:
    """Feed a metric on each process and return what it says, then and after it went on."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    metric = ContinualMetrics(**SHARED) if make == "collection" else WindowedForgetting(2)
    if make == "collection":
        metric.compute()  # before any update
    feed(metric, EVENTS[:6])
    if different and torch.distributed.get_rank() == 1:
        metric.update({0: 0.123456789}, 1, 20)
    try:
        first = metric.compute()
    except ValueError as error:
        return {"error": str(error)}
    metric.end_task(1)
    feed(metric, EVENTS[7:])
    last = metric.compute()
    part = metric["forgetting"] if make == "collection" else metric
    part.sync()
    synced = (part._is_synced, part.history.clone())
    part.unsync()
    on_step = WindowedForgetting(2, dist_sync_on_step=True)
    return {
        "first": first,
        "last": last,
        "synced": synced,
        "state": metric.state_dict(),
        "on_step": [on_step(scores, task, step) for task, step, scores in (e for e in EVENTS if e != "end")],
    }


@pytest.mark.parametrize("make", ["collection", "single"])
def test_two_processes_say_what_one_says(workers, make):
    answers = workers.run("metrics.test_continual_processes:sync_job", make=make)
    for answer in answers:
        if make == "collection":
            assert_values(answer["first"], expected(EVENTS[:6]))
            assert_values(answer["last"], expected())
        else:
            assert float(answer["last"]) == pytest.approx(expected()["windowed_forgetting_2"])
        was_synced, history = answer["synced"]
        assert was_synced
        (state,) = answer["state"].values()
        assert torch.equal(history, state)
        assert torch.equal(state, next(iter(answers[0]["state"].values())))
        assert float(answer["on_step"][-1]) == pytest.approx(expected()["windowed_forgetting_2"])


@pytest.mark.parametrize("make", ["collection", "single"])
def test_processes_with_different_scores_are_told(workers, make):
    for answer in workers.run("metrics.test_continual_processes:sync_job", make=make, different=True):
        assert "the processes were given different scores" in answer["error"]
        assert answer["error"].startswith("ContinualMetrics" if make == "collection" else "WindowedForgetting")
