"""The documents: what they tell a reader to type exists, what they name is there, and docstrings run.

`test_docs_code.py` has their blocks of code, `test_docs_generated.py` the pages that are made when they are built.
"""

import ast
import doctest
import importlib
import pkgutil
import re

import pytest
import yaml
from doc_blocks import DOCUMENTS, README, ROOT, blocks, shell_lines

import lightning_stable
from lightning_stable.registry import METHODS

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


# ----------------------------------------------------------------------------- docstrings


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(lightning_stable.__path__, "lightning_stable.")]
)
def test_the_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_callback_shows_an_example():
    for method in METHODS:
        module = importlib.import_module(method.class_path.rpartition(".")[0])
        assert ">>>" in (module.__doc__ or ""), f"{module.__name__} has no runnable example in its docstring"


# ----------------------------------------------------------------------------- README


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if not line.startswith("| [")]) <= 130, "without the table of methods"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(README, "python")
    assert code
    scope = {"__name__": "readme"}
    for block in code:
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102  the README's own code, which has to run
    assert sorted(path.name for path in tmp_path.glob("checkpoints/budget-*")) == [
        f"budget-{step}.ckpt" for step in (100, 200, 400)
    ]
    assert 0.5 < float(scope["trainer"].callback_metrics["val_accuracy"]) <= 1


def test_the_readme_names_every_method_and_both_commands():
    text = README.read_text(encoding="utf-8")
    for method in METHODS:
        assert f"| [{method.name}](docs/methods/{method.name}.md) | `{method.class_name}` |" in text
    for command in ("make quickstart", "make test"):
        assert [words for words in shell_lines(README) if words == command.split()]


# ----------------------------------------------------------------------------- every document


@each_document
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (words[1] for words in shell_lines(document) if words[0] == "make"):
        if target.startswith("bench-"):
            assert (ROOT / "benchmarks" / f"{target.removeprefix('bench-')}.py").exists()
        else:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make has no target {target!r}"


@each_document
def test_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    named = re.findall(r"`((?:docs|tests|benchmarks|templates|lightning_stable)/[\w./-]+)`", text)
    if document.name == "extend.md":
        named = []  # its paths are those of a reader's own package
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_faq_quotes_what_is_printed():
    source = [path.read_text(encoding="utf-8") for path in (ROOT / "lightning_stable").rglob("*.py")]
    texts = [node.value for code in source for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    printed = "\n".join(text for text in texts if isinstance(text, str))
    quotes = re.findall(r"^> (.+)$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(quotes) > 15
    for quote in quotes:
        parts = [part.strip() for part in re.split(r"\s?\.\.\.\s?", quote)]
        missing = [part for part in parts if len(part) > 8 and part not in printed]
        assert not missing, f"no message has {missing}"


# ----------------------------------------------------------------------------- citation and changelog


def test_the_citation_file_is_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The lightning-stable authors"}]
    assert citation["version"] == lightning_stable.__version__
    assert citation["license"] == "Apache-2.0"


def test_the_changelog_has_this_version_and_every_method():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert lightning_stable.__version__ in text
    for method in METHODS:
        assert f"`{method.class_name}`" in text
