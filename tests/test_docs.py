"""The documents: what they tell a reader to type exists, what they show as Python runs, what they generate is whole."""

import doctest
import importlib
import itertools
import json
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

import lightning_stable
from lightning_stable.cli.locate import find_template, list_templates
from lightning_stable.cli.main import COMMANDS, TRAINER_COMMANDS, main
from lightning_stable.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("docs/methods/*")),
]
CODE_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document, language):
    return [code for found, code in CODE_BLOCK.findall(document.read_text(encoding="utf-8")) if found == language]


def shell_lines(document):
    """The lines of a document's bash blocks as words, comments left out."""
    lines = [line for code in blocks(document, "bash") for line in code.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands(document):
    return [words[1:] for words in shell_lines(document) if words[0] == "lightning-stable"]


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


@pytest.mark.parametrize(
    "words", [words for words in commands(README) if words[0] in ("run", *TRAINER_COMMANDS)], ids=" ".join
)
def test_the_training_commands_of_the_readme_parse(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (config,) = blocks(README, "yaml")
    Path("mine.yaml").write_text(config, encoding="utf-8")
    assert main([*words, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].startswith("lightning_stable.recipes.")


def test_the_readme_names_every_method_and_both_commands():
    text = README.read_text(encoding="utf-8")
    for method in METHODS:
        assert f"| [{method.name}](docs/methods/{method.name}.md) | `{method.class_name}` |" in text
    for command in ("make quickstart", "make test"):
        assert [words for words in shell_lines(README) if words == command.split()]


# ----------------------------------------------------------------------------- every document


@each_document
def test_commands_exist(document):
    for words in commands(document):
        assert words[0] in COMMANDS, f"there is no command {words[0]!r}"
        if words[0] == "run":
            find_template("recipe", words[1])
        if words[0] == "show" and words[1] != "NAME":
            shown = {row.name for row in (*METHODS, *list_templates("recipe"), *list_templates("addon"))}
            assert words[1] in shown
        for value in (later for word, later in itertools.pairwise(words) if word == "--config"):
            kind, colon, name = value.partition(":")
            if colon:
                find_template(kind, name)


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
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing


@each_document
def test_yaml_blocks_are_configs(document):
    for code in blocks(document, "yaml"):
        assert isinstance(yaml.safe_load(code), dict)


# ----------------------------------------------------------------------------- generated pages


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def test_the_index_has_a_row_and_an_entry_for_every_method(conf):
    page = conf["methods_page"]()
    for method in METHODS:
        assert f"| [{method.name}](methods/{method.name}.md) | `{method.class_name}` | {method.kind} |" in page
        assert f"\nmethods/{method.name}\n" in page


def test_the_api_has_every_public_module(conf):
    page = conf["api_page"]()
    for path in (ROOT / "lightning_stable").glob("[!_]*/[!_]*.py"):
        if path.parent.name != "cli":
            assert f".. automodule:: lightning_stable.{path.parent.name}.{path.stem}\n" in page


def test_the_benchmarks_page_does_without_results(conf, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert "no results yet" in conf["benchmarks_page"](folder)


def test_the_benchmarks_page_has_the_newest_result_of_each_machine(conf, tmp_path):
    for day in (1, 2):
        result = {
            "benchmark": "demo",
            "date": f"2026-01-0{day}",
            "hardware": {"cpu": "some CPU", "cores": 2, "versions": {"torch": "2.6"}},
            "targets": {"fast_enough": True, "small_enough": False},
            "report": ["| a | b |", "|---|---|", f"| {day} | x |"],
        }
        (tmp_path / f"demo-2026-01-0{day}-some.json").write_text(json.dumps(result))
    page = conf["benchmarks_page"](tmp_path)
    assert "| demo | 2026-01-02 | some CPU, 2 cores; torch 2.6 | fast enough: met, small enough: missed |" in page
    assert "| 2 | x |" in page
    assert "2026-01-01" not in page


def test_generated_pages_are_written_once(conf, tmp_path):
    conf["write_generated"](tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(times) == ["api.md", "benchmarks.md", "methods.md"]
    conf["write_generated"](tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


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
