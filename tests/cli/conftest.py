"""Fixtures of the command's tests: a process without a group, whatever strategy ran in it, and folders for sweeps."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from sweep_fixtures import CONFIG, StandIn

from lightning_stable.cli import _sweep_pool


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Undo what a distributed strategy does to this process: its group and its environment variables."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


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
