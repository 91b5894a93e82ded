"""Every test of a strategy leaves its own process without a group, whatever ran in it."""

import pytest


@pytest.fixture(autouse=True)
def alone(clean_process: None) -> None:
    """See ``clean_process``."""
