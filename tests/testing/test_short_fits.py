"""What keeps thousands of short fits short, and changes nothing of them."""

import inspect
import weakref
from importlib.metadata import EntryPoints
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from contract.broken import row
from lightning.fabric.utilities import registry
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric
from lightning.pytorch.utilities import signature_utils

from lightning_stable.testing import harness
from lightning_stable.testing._host import hastened
from lightning_stable.testing.harness import Net, Stream, assert_same, attach, fit, once
from lightning_stable.testing.modules import trained_by


def host() -> tuple[Any, ...]:
    return signature_utils.inspect, _ResultMetric.to, registry.entry_points


class Looks(Callback):
    """Notes what the host has in a fit, and may fail there."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.seen: tuple[Any, ...] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen = host()
        if self.fails:
            raise RuntimeError("deliberate failure")


def test_the_host_is_faster_in_a_fit_and_as_it_was_after_it() -> None:
    # The host of this process, which no fit is in.
    before, looks = host(), Looks()
    assert before[0] is inspect
    fit([looks], max_steps=1)
    assert not [one for one, other in zip(looks.seen, before, strict=True) if one is other]
    assert host() == before


def test_the_host_is_as_it_was_after_a_failure() -> None:
    before, looks = host(), Looks(fails=True)
    with pytest.raises(RuntimeError, match="deliberate failure"):
        fit([looks], max_steps=1)
    assert looks.seen[0] is not inspect
    assert host() == before


def test_the_outermost_undoes() -> None:
    before = host()
    with hastened():
        faster = host()
        with hastened():
            assert host() == faster
        fit([], max_steps=1)
        assert host() == faster
        assert faster[0] is not before[0]
    assert host() == before


def test_a_host_without_what_is_replaced_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registry, "entry_points")
    with hastened():
        assert not hasattr(registry, "entry_points")
        assert signature_utils.inspect is not inspect
    assert not hasattr(registry, "entry_points")


def test_packages_are_read_again_where_they_come_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read() -> EntryPoints:
        return registry.entry_points(group="of_a_test_of_short_fits")

    with hastened():
        assert not read()
        assert read() is read()
        info = tmp_path / "offers-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offers\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[of_a_test_of_short_fits]\none = offers:one\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert [entry.name for entry in read()] == ["one"]


def test_logs_are_those_of_the_host_itself() -> None:
    faster = fit([], validation=Stream(2, seed=5), max_steps=8)
    module, logger = Net(), harness.MemoryLogger()
    settings = {**harness.QUIET, "logger": logger, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "max_steps": 8}
    trainer = Trainer(**attach([], settings, module))
    trainer.fit(module, Stream(), Stream(2, seed=5))
    plain = harness.Run(trainer, module, [], logger.entries)
    assert_same(faster.snapshot(), plain.snapshot(), "with against without")
    assert faster.logged


def test_what_is_logged_elsewhere_is_moved() -> None:
    metric = _ResultMetric(_Metadata("training_step", "loss"), is_tensor=True)
    metric.update(torch.ones(()), 1)
    with hastened():
        assert metric.to(torch.device("cpu")) is metric
        metric.to(torch.device("meta"))
    assert metric.value.device.type == "meta"


def test_signatures_are_read_as_they_are() -> None:
    class Own:
        def hook(self, one: int, *more: int) -> None:
            """Take anything."""

    own, other = Own(), Own()
    other.hook = lambda self, two: None
    with hastened():
        read = signature_utils.inspect.getfullargspec
        for function in (own.hook, other.hook, Own.hook, MethodType(other.hook, other)):
            for _ in range(2):
                assert read(function) == inspect.getfullargspec(function)
        made = weakref.ref(kept := MethodType(lambda self: None, own))
        read(kept)
        function = weakref.ref(kept.__func__)
        del kept
        assert made() is None
        assert function() is None
        # The rest is that of the module itself.
        assert signature_utils.inspect.signature is inspect.signature


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
