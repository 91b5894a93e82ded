"""Sphinx configuration. Pages that follow from the code are generated at build time, into ``docs/generated``.

What generates them: ``_pages.py`` the methods and the API, ``_capabilities.py`` the table of what the contracts found,
``_gallery.py`` the results of benchmarks.
"""

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from _capabilities import capabilities_page  # noqa: E402  beside this file
from _gallery import benchmarks_page, copy_pictures, reports_page  # noqa: E402
from _pages import api_page, methods_page  # noqa: E402

from lightning_stable import __version__  # noqa: E402  the checkout, which may not be installed

project = "lightning-stable"
author = "The lightning-stable authors"
copyright = author  # noqa: A001  Sphinx's name for it
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "generated"]
html_theme = "furo"
html_title = f"lightning-stable {__version__}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# The host's hooks are not documented again: a callback's page shows what a user calls.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# For `make linkcheck`, which needs a network. Anchors that a page makes by JavaScript would seem to be missing.
linkcheck_anchors = False
linkcheck_timeout = 20


def write_generated(folder: Path) -> None:
    """Write the generated pages, and the pictures in them."""
    folder.mkdir(exist_ok=True)
    pages = {
        "methods": methods_page(),
        "benchmarks": benchmarks_page(),
        "reports": reports_page(),
        "api": api_page(),
        "capabilities": capabilities_page(),
    }
    for name, text in pages.items():
        path = folder / f"{name}.md"
        # Left alone where nothing changed, so that a second build has nothing to do.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    copy_pictures(folder)


def setup(app: Any) -> None:
    app.connect("builder-inited", lambda app: write_generated(DOCS / "generated"))
