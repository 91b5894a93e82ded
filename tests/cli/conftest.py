"""Fixtures of the command's tests: a process without a group, whatever strategy ran in it, and folders for sweeps."""

import pytest
from own_process import alone  # noqa: F401  a fixture of every test here
from sweep_fixtures import CONFIG, StandIn

from lightning_stable.cli import _sweep_pool


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
