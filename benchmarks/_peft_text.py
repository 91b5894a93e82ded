"""The two texts of `peft_convergence`: the standard library's code, and what its docstrings and comments say.

Both are bytes of the running Python's own sources. Code is what is left of a file when it is parsed and written again
without its docstrings; comments are lost on the way. Prose is its docstrings and its comments of two lines and more.
Files are split first, so that nothing of a held-out file is seen in any training.
"""

import ast
import itertools
import warnings
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from lightning_stable.data.text import TextDataModule

__all__ = ["Texts", "texts"]

_HELD_OUT = 0.25
# Docstrings of a line say little that is not in the name.
_SHORTEST = 80
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Texts(NamedTuple):
    """The texts.

    Attributes:
        code: Of the training files, to pretrain on.
        prose: Of the training files, to fine-tune on.
        tuning: Prose of half of the held-out files, by which learning rates are chosen.
        validation: Prose of the other half, by which methods are compared.
    """

    code: bytes
    prose: bytes
    tuning: bytes
    validation: bytes


def texts(max_bytes: int) -> Texts:
    """Read at most so many bytes of the standard library, and return its code and prose."""
    data = TextDataModule(max_bytes=max_bytes, validation_share=_HELD_OUT, seed=0)
    data.setup("fit")
    # A module that is nothing but a text in quotes would be prose among the code.
    training, held = (
        _parsed([file for file in files if file.parent.name != "pydoc_data"])
        for files in (data.train_files, data.validation_files)
    )
    prose, tuning, validation = map(_prose, (training, held[::2], held[1::2]))
    return Texts("\n\n".join(map(_code, training)).encode(), prose, tuning, validation)


def _parsed(files: list[Path]) -> list[str]:
    """Return the sources of files that this version of Python can parse."""
    found = []
    for file in files:
        try:
            source = file.read_text(encoding="utf-8")
            _tree(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        found.append(source)
    return found


def _code(source: str) -> str:
    tree = _tree(source)
    for node in ast.walk(tree):
        if _has_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _prose(sources: list[str]) -> bytes:
    """Return docstrings and blocks of comments, one after the other, a blank line between them."""
    found = []
    for source in sources:
        documented = [node for node in ast.walk(_tree(source)) if _has_docstring(node)]
        found += [text for text in map(ast.get_docstring, documented) if text and len(text) >= _SHORTEST]
        lines = [line.strip() for line in source.splitlines()]
        for comment, block in itertools.groupby(lines, lambda line: line.startswith("# ")):
            text = "\n".join(line[2:] for line in block)
            found += [text] if comment and "\n" in text else []
    return "\n\n".join(found).encode()


def _tree(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that will be errors one day
        return ast.parse(source)


def _has_docstring(node: Any) -> TypeGuard[_Documented]:
    return isinstance(node, _Documented) and ast.get_docstring(node) is not None
