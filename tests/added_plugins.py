"""Distributions with methods of their own, as an installer would leave them, for tests of what is found."""

import importlib
import sys

import pytest

from lightning_stable import _extensions

ROW = """
from lightning_stable.registry import Method

METHODS = (
    Method(
        name={name!r},
        kind="callback",
        class_path="{package}.plugin.{class_name}",
        paper="",
        summary="A method of somebody else, for tests",
        addons={addons!r},
    ),
)
"""


class Site:
    """A folder on the path where distributions are installed."""

    def __init__(self, folder):
        self.folder = folder
        self.packages = []

    def add(self, package, value=None, rows=None, **row):
        """Install a distribution whose name is that of its package with hyphens; return the folder of the package."""
        folder = self.folder / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        settings = {"name": package, "package": package, "class_name": package.title().replace("_", ""), "addons": ()}
        (folder / "methods.py").write_text(rows if rows is not None else ROW.format(**{**settings, **row}))
        info = self.folder / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(
            f"[lightning_stable.methods]\n{package} = {value or package + '.methods:METHODS'}\n"
        )
        self.packages.append(package)
        importlib.invalidate_caches()
        _extensions.extensions.cache_clear()
        return folder


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A place for distributions, which is gone after the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    _extensions.extensions.cache_clear()
    _extensions._load_foreign.cache_clear()
    made = Site(folder)
    yield made
    for name in [name for name in sys.modules if name.partition(".")[0] in made.packages]:
        del sys.modules[name]
    _extensions.extensions.cache_clear()
    _extensions._load_foreign.cache_clear()
