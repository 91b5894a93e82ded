"""Fixtures of the command's tests: a process without a group, whatever strategy ran in it."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist


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
