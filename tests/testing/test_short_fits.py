"""What keeps thousands of short fits short, and changes nothing of them."""

import inspect
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from contract.broken import row
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric
from lightning.pytorch.utilities import signature_utils

from lightning_stable.testing import harness
from lightning_stable.testing._host import hasten
from lightning_stable.testing.harness import Stream, assert_same, fit, once
from lightning_stable.testing.modules import trained_by


def test_logs_are_those_of_the_host_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    hastened = fit([], validation=Stream(2, seed=5), max_steps=8)
    monkeypatch.setattr(_ResultMetric, "to", _ResultMetric.to.__wrapped__)
    plain = fit([], validation=Stream(2, seed=5), max_steps=8)
    assert_same(hastened.snapshot(), plain.snapshot(), "with against without")
    assert hastened.logged


def test_what_is_logged_elsewhere_is_moved() -> None:
    metric = _ResultMetric(_Metadata("training_step", "loss"), is_tensor=True)
    metric.update(torch.ones(()), 1)
    assert metric.to(torch.device("cpu")) is metric
    metric.to(torch.device("meta"))
    assert metric.value.device.type == "meta"


def test_signatures_are_read_as_they_are() -> None:
    class Own:
        def hook(self, one: int, *more: int) -> None:
            """Take anything."""

    own, other = Own(), Own()
    other.hook = lambda self, two: None
    for function in (own.hook, other.hook, Own.hook, MethodType(other.hook, other)):
        for _ in range(2):
            assert signature_utils.inspect.getfullargspec(function) == inspect.getfullargspec(function)
    made = weakref.ref(kept := MethodType(lambda self: None, own))
    signature_utils.inspect.getfullargspec(kept)
    function = weakref.ref(kept.__func__)
    del kept
    assert made() is None
    assert function() is None


def test_a_second_time_changes_nothing() -> None:
    before = result._ResultMetric.to
    hasten()
    assert result._ResultMetric.to is before


def test_once_is_once_for_each_owner_and_kind_of_module(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make() -> int:
        made.append(None)
        return len(made)

    one, other = row(int).settings, row(int).settings
    assert [once(one, "a run", make), once(one, "a run", make), once(other, "a run", make)] == [1, 1, 2]
    assert once(one, "another run", make) == 3
    with trained_by("adam"):
        assert once(one, "a run", make) == 4
    monkeypatch.setattr(harness, "processes", lambda: 2)
    assert [once(one, "a run", make), once(one, "a run", make)] == [5, 6]
