"""What tests leave behind in their process, undone: a fixture that suites take into their conftest."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

__all__ = ["alone"]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Undo what a distributed strategy does to this process: its group and its environment variables."""
    before = dict(os.environ)
    yield
    # Not by is_initialized, which a test may have replaced for longer than this fixture lives.
    if dist.group.WORLD is not None:
        dist.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
