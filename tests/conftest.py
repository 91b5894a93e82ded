"""Fixtures of the whole suite: the one pair of processes that every two-process test shares."""

from collections.abc import Iterator

import pytest
from contract.workers import Pair


@pytest.fixture(scope="session")
def workers() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.stop()
