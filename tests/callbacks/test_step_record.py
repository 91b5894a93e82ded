"""The table that StabilityReport fills, a row a step."""

import math

import pytest
import torch

from lightning_stable._report.spikes import SpikeRule
from lightning_stable.callbacks import _step_record as step_record
from lightning_stable.callbacks._step_record import StepRecord


def filled(steps: int, flush_every: int) -> StepRecord:
    record = StepRecord(SpikeRule(window=32))
    record.begin(0, 1)
    for step in range(steps):
        loss = 50.0 if step in (40, 777) else 1.0 + 0.1 * math.sin(step)
        values = torch.tensor([math.nan if step == 500 else loss, 1.0])
        record.note(step, 0, values, [0.1], 0.01 * step)
        if step % flush_every == flush_every - 1:
            record.flush()
    record.flush()
    return record


def test_a_long_record_is_thinned_the_same_whenever_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_record, "_MOST_ROWS", 64)
    first, second = filled(1000, 7), filled(1000, 400)
    assert str(first.rows) == str(second.rows)  # not a number is not equal to itself
    assert len(first.rows) < 64
    assert first.latest[0].step == first.steps == 1000
    assert [spike.step for spike in first.spikes["loss"]] == [41, 778]
    assert {41, 501, 778} <= {row.step for row in first.rows}
    assert first.not_finite("loss") == (1, 501)


def test_a_record_goes_on_from_its_state() -> None:
    whole, half = filled(60, 5), filled(30, 5)
    again = StepRecord(SpikeRule(window=32))
    again.load_state_dict(half.state_dict(), [row.seconds for row in half.rows])
    assert again.rows == half.rows
    for step in range(30, 60):
        loss = 50.0 if step == 40 else 1.0 + 0.1 * math.sin(step)
        again.note(step, 0, torch.tensor([loss, 1.0]), [0.1], 0.01 * step)
    again.flush()
    assert again.rows == whole.rows
    assert again.spikes == whole.spikes


def test_a_value_that_some_processes_know_is_their_mean() -> None:
    record = StepRecord(SpikeRule())
    record.begin(0, 1)
    record.note(0, 0, torch.tensor([3.0, 0.0]), [0.1], 0.0, known=(True, False))
    other = torch.tensor([[0.0, 0.0, 0.0, 0.0]])  # it has skipped the batch
    record.flush(lambda values: (values + other) / 2)
    assert record.rows[0].values == (3.0, None)
    again = StepRecord(SpikeRule())
    again.load_state_dict(record.state_dict(), [0.0])
    assert (again.rows, again.unknown) == (record.rows, {"loss": 0, "gradient_norm": 1})


def test_several_notes_of_one_step_are_one() -> None:
    record = StepRecord(SpikeRule())
    record.begin(0, 1)
    for loss in (3.0, 2.0, 1.0):  # as LBFGS has them
        record.note(0, 0, torch.tensor([loss, 1.0]), [0.1], 0.0)
    record.flush()
    assert [(row.step, row.values[0]) for row in record.rows] == [(1, 1.0)]
