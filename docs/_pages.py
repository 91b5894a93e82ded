"""The pages that follow from the code: the table of methods with their cards, and the API."""

import re
from pathlib import Path

from lightning_stable.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "docs" / "methods"

# The rooms of the package, in the order of the API page.
ROOMS = ("callbacks", "strategies", "precision", "peft", "metrics", "functional", "data", "recipes")
# Of this one a plugin's author imports the package itself; its modules hold what the suite needs.
TESTING = ("testing", "testing.plugin")


def methods_page() -> str:
    """Return the table of METHODS and the list of their cards."""
    rows = ["| Method | What it does | Kind | Paper |", "|---|---|---|---|"]
    for method in METHODS:
        name = f"[{method.name}](methods/{method.name}.md) `{method.class_name}`"
        rows.append(f"| {name} | {method.summary} | {method.kind} | {_papers(method.paper)} |")
    cards = [f"methods/{method.name}" for method in METHODS]
    return "\n".join([*rows, "", "```{toctree}", ":hidden:", ":caption: Methods", "", *cards, "```", ""])


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
    lines += ["## testing", ""]
    for name in TESTING:
        lines += _module(f"lightning_stable.{name}", [])
    return "\n".join([*lines, "## registry", "", *_module("lightning_stable.registry", [])])


def section(card: Path, heading: str) -> str:
    """Return the text of a card under one of its headings."""
    text = card.read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def first_sentence(text: str) -> str:
    """Return the first sentence of a section, or of the first item of its list."""
    paragraph = " ".join(text.split("\n\n", 1)[0].removeprefix("- ").split())
    return re.split(r"(?<=[.])\s+(?=[A-Z`-])", paragraph, maxsplit=1)[0]


def _papers(paper: str) -> str:
    return ", ".join(
        f"[{one}](https://arxiv.org/abs/{one})" if re.fullmatch(r"\d{4}\.\d{4,5}", one) else one
        for one in paper.split(", ")
    )


def _module(path: str, options: list[str]) -> list[str]:
    return [f"### {path}", "", "```{eval-rst}", f".. automodule:: {path}", "   :members:", *options, "```", ""]
