"""Fixtures of the whole suite: no seed from another test, and one pair of processes for all two-process tests."""

import os
from collections.abc import Iterator

import pytest

from lightning_stable.testing._host import hastened
from lightning_stable.testing.serving import preload

# With the fixtures `workers` and `clean_process`.
pytest_plugins = ["lightning_stable.testing.plugin"]

preload("contract.preloaded")


def pytest_xdist_auto_num_workers() -> int:
    """Return one worker more than there are cores to use: some tests wait for processes of their own."""
    told = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(told) if told else cores + 1


@pytest.fixture(autouse=True)
def short_fits() -> Iterator[None]:
    """Let the host leave out what comes to the same in each of thousands of fits."""
    with hastened():
        yield


@pytest.fixture(autouse=True)
def unseeded() -> None:
    """Forget the seed that the host keeps in the environment, from which distributed strategies seed again.

    Not by the fixture `monkeypatch`: used here, it would outlive the fixtures that tidy up after a test.
    """
    os.environ.pop("PL_GLOBAL_SEED", None)
