"""Fixtures of the contracts: an empty working directory, and the one pair of processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract.workers import Pair


@pytest.fixture(scope="session")
def workers() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
