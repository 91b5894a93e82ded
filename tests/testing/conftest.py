"""The tests of what the suite does to the host see the host as it is."""

import pytest


@pytest.fixture(autouse=True)
def short_fits() -> None:
    """Takes the place of that of the whole suite, and does nothing."""
