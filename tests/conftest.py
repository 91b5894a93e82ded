"""Fixtures of the whole suite: no seed from another test, and one pair of processes for all two-process tests."""

import os

import pytest

from lightning_stable.testing.serving import preload

# With the fixtures `workers` and `clean_process`.
pytest_plugins = ["lightning_stable.testing.plugin"]

preload("contract.preloaded")


@pytest.fixture(autouse=True)
def unseeded() -> None:
    """Forget the seed that the host keeps in the environment, from which distributed strategies seed again.

    Not by the fixture `monkeypatch`: used here, it would outlive the fixtures that tidy up after a test.
    """
    os.environ.pop("PL_GLOBAL_SEED", None)
