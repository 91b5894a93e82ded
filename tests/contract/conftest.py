"""Fixtures of the contracts: an empty working directory, and a process without a group."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None) -> None:
    monkeypatch.chdir(tmp_path)
