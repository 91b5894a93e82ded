"""Fixtures of the contracts: an empty working directory, and a process without a group."""

from pathlib import Path

import pytest
from own_process import alone  # noqa: F401  a fixture of every test here


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
