"""Fixtures of the command's tests: a process without a group, whatever strategy ran in it, and folders for sweeps."""

import signal
import sys

import pytest
from cli_fixtures import BASE, CliProbe
from sweep_fixtures import CONFIG, StandIn

from lightning_stable.cli import _sweep_pool


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A config in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    CliProbe.seen.clear()
    (tmp_path / "base.yaml").write_text(BASE)
    previous = signal.getsignal(signal.SIGINT)  # the host ignores Ctrl-C from the first one on
    yield "base.yaml"
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(autouse=True)
def alone(clean_process):
    """See ``clean_process``."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a config for sweeps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def stand_in(here, monkeypatch):
    """Takes the place of the subprocesses of a sweep."""
    found = StandIn()
    monkeypatch.setattr(_sweep_pool, "run_one", found)
    return found
