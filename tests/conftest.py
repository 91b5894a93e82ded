"""Fixtures of the whole suite: no seed from another test, and one pair of processes for all two-process tests."""

from collections.abc import Iterator

import pytest
from contract.workers import Pair


@pytest.fixture(autouse=True)
def unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the seed that the host keeps in the environment, from which distributed strategies seed again."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def workers() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.stop()
