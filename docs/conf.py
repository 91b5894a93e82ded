"""Sphinx configuration. Pages that follow from the code are generated at build time, into ``docs/generated``."""

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from lightning_stable import __version__  # noqa: E402  the checkout, which may not be installed
from lightning_stable.registry import METHODS  # noqa: E402

project = "lightning-stable"
author = "The lightning-stable authors"
copyright = author  # noqa: A001  Sphinx's name for it
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "generated"]
html_theme = "furo"
html_title = f"lightning-stable {__version__}"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# The host's hooks are not documented again: a callback's page shows what a user calls.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# The rooms of the package, in the order of the API page.
ROOMS = ("callbacks", "strategies", "precision", "peft", "metrics", "functional", "data", "recipes")


def methods_page() -> str:
    """Return the table of METHODS and the list of their cards."""
    rows = ["| Method | Class | Kind | What it does | Paper |", "|---|---|---|---|---|"]
    for method in METHODS:
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in method.paper.split(", "))
        card = f"[{method.name}](methods/{method.name}.md)"
        rows.append(f"| {card} | `{method.class_name}` | {method.kind} | {method.summary} | {papers} |")
    cards = [f"methods/{method.name}" for method in METHODS]
    return "\n".join([*rows, "", "```{toctree}", ":hidden:", ":caption: Methods", "", *cards, "```", ""])


def benchmarks_page(results: Path = ROOT / "benchmarks" / "results") -> str:
    """Return the newest result of each benchmark on each machine: one table over all, then each report."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(results.glob("*.json")):  # a name begins with the benchmark and the date
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["benchmark"], str(result["hardware"].get("cpu"))] = result
    if not found:
        return "This checkout holds no results yet. `make bench-NAME` writes them.\n"
    rows = ["| Benchmark | Date | Machine | Aims met |", "|---|---|---|---|"]
    reports = []
    for result in found.values():
        name, date, machine = result["benchmark"], result["date"], _machine(result["hardware"])
        rows.append(f"| {name} | {date} | {machine} | {_aims(result.get('targets', {}))} |")
        reports += [f"### {name}, {date}", "", machine + ".", "", *result.get("report", []), ""]
    return "\n".join([*rows, "", *reports])


def api_page(package: Path = ROOT / "lightning_stable") -> str:
    """Return an autodoc entry for each public module of the package."""
    lines = []
    for room in ROOMS:
        modules = sorted(path.stem for path in (package / room).glob("[!_]*.py"))
        lines += [f"## {room}", ""] if modules else []
        for module in modules:
            # What callbacks share is defined in private bases, above the host's own.
            options = ["   :inherited-members: Callback"] if room == "callbacks" else []
            lines += _module(f"lightning_stable.{room}.{module}", options)
    return "\n".join([*lines, "## registry", "", *_module("lightning_stable.registry", [])])


def _module(path: str, options: list[str]) -> list[str]:
    return [f"### {path}", "", "```{eval-rst}", f".. automodule:: {path}", "   :members:", *options, "```", ""]


def _machine(hardware: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in hardware.get("versions", {}).items())
    return f"{hardware.get('cpu', 'unknown')}, {hardware.get('cores', '?')} cores; {versions}"


def _aims(targets: dict[str, bool]) -> str:
    """Say which aims were met and which were missed."""
    if not targets:
        return "none set"
    return ", ".join(f"{name.replace('_', ' ')}: {'met' if met else 'missed'}" for name, met in targets.items())


def write_generated(folder: Path) -> None:
    """Write the generated pages."""
    folder.mkdir(exist_ok=True)
    pages = {"methods": methods_page(), "benchmarks": benchmarks_page(), "api": api_page()}
    for name, text in pages.items():
        path = folder / f"{name}.md"
        # Left alone where nothing changed, so that a second build has nothing to do.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("builder-inited", lambda app: write_generated(DOCS / "generated"))
