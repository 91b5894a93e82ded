"""The documents, the blocks of code in them, and the commands in those."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_stable.testing.examples import shell_commands

__all__ = [
    "CARDS",
    "DOCUMENTS",
    "PAGES",
    "README",
    "ROOT",
    "Block",
    "all_blocks",
    "blocks",
    "commands_of",
    "shell_lines",
]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CARDS = sorted(ROOT.glob("docs/methods/*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, *CARDS]

# ```python, ```python file=NAME and ```python no-run="REASON"
_FENCE = re.compile(r"^```(\w+)(?: +([^\n]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ATTRIBUTE = re.compile(r'([\w-]+)=(?:"([^"]*)"|(\S+))')


class Block(NamedTuple):
    """A fenced block of a document.

    Attributes:
        language: Its first word, such as ``"python"``.
        attributes: What else its first line says: ``file``, the name under which a reader saves it, and ``no-run``, the
            reason why it is not run.
        code: The lines in it.
    """

    language: str
    attributes: dict[str, str]
    code: str


def all_blocks(document: Path) -> list[Block]:
    """Return the blocks of a document in their order."""
    found = _FENCE.findall(document.read_text(encoding="utf-8"))
    return [
        Block(language, {name: quoted or bare for name, quoted, bare in _ATTRIBUTE.findall(rest)}, code)
        for language, rest, code in found
    ]


def blocks(document: Path, language: str) -> list[str]:
    """Return the code of the blocks in one language."""
    return [block.code for block in all_blocks(document) if block.language == language]


def shell_lines(document: Path) -> list[list[str]]:
    """Return the commands of a document's bash blocks as words."""
    return [words for block in all_blocks(document) if block.language == "bash" for words in commands_of(block)]


def commands_of(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command in a block."""
    return shell_commands(block.code)
