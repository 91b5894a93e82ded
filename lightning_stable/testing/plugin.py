"""The pytest plugin of the contract suite: two processes for its tests, and a file of what it found.

A package loads it in ``tests/conftest.py``::

    pytest_plugins = ["lightning_stable.testing.plugin"]

``pytest --capabilities FILE`` writes what the contracts found for each method that they ran over; see
:mod:`lightning_stable.testing.capabilities` for what is in it. It works with pytest-xdist.

A package without a test module of its own can run ``pytest --pyargs lightning_stable.testing``, with these lines in its
``pyproject.toml``::

    [tool.pytest.ini_options]
    addopts = "-p lightning_stable.testing.plugin"
    lightning_stable_settings = "my_plugin.contracts:SETTINGS"
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lightning_stable.testing.workers import Pair

__all__ = ["clean_process", "settings_path", "workers"]

_SETTINGS = "lightning_stable_settings"
_settings_path = ""


def settings_path() -> str:
    """Return where the settings lie that the pytest settings name, as ``package.module:NAME``; nothing without any."""
    return _settings_path


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option and the setting."""
    group = parser.getgroup("lightning-stable", "contracts of lightning-stable")
    group.addoption(
        "--capabilities",
        metavar="FILE",
        help="write what the contracts found for each method, as JSON; of what runs alone",
    )
    parser.addini(_SETTINGS, "settings of the methods under contract, as package.module:NAME", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Collect findings where reports arrive: not in the processes of pytest-xdist."""
    global _settings_path
    _settings_path = str(config.getini(_SETTINGS))
    option = config.getoption("capabilities")
    if option is None or hasattr(config, "workerinput"):
        return
    path = config.invocation_params.dir / str(option)
    if not path.parent.is_dir():
        raise pytest.UsageError(f"--capabilities {option}: the folder {path.parent} does not exist. Make it first.")
    from lightning_stable.testing.capabilities import Capabilities

    config.pluginmanager.register(Capabilities(path), "lightning_stable_capabilities")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the reports of contract tests say what they are about."""
    if config.getoption("capabilities") is None:
        return
    from lightning_stable.testing.capabilities import PROPERTY, subject_of

    for item in items:
        subject = subject_of(item)
        if subject is not None:
            item.user_properties.append((PROPERTY, subject))


@pytest.fixture(scope="session")
def workers() -> "Iterator[Pair]":
    """Two processes that run the same job at the same time, started by the first job: see :class:`.Pair`."""
    from lightning_stable.testing.workers import Pair

    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture
def clean_process() -> Iterator[None]:
    """Undo what a test of distributed strategies leaves in its process: see :func:`.restored`."""
    from lightning_stable.testing.process import restored

    with restored():
        yield
