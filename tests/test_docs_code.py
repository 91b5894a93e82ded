"""The blocks of code in the documents: Python runs, configs are configs, commands exist and take their options.

The Python of the cards runs in `tests/contract/`, each beside its method; that of the pages runs here.
"""

import contextlib
import importlib
import io
import logging
import sys

import pytest
import yaml
from doc_blocks import (
    DOCUMENTS,
    PAGES,
    README,
    ROOT,
    all_blocks,
    blocks,
    check_command,
    check_config,
    commands,
    is_training,
)

from lightning_stable.cli.main import _parser, main

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@pytest.fixture(autouse=True)
def alone(clean_process):
    """See ``clean_process``."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory whose modules can be imported, as that of a reader who starts Python in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def parser():
    return _parser()


def save_files(document, folder):
    """Save the blocks of a document that a reader saves; return the configs among them by their names."""
    named = {block.attributes["file"]: block for block in all_blocks(document) if "file" in block.attributes}
    for name, block in named.items():
        (folder / name).write_text(block.code, encoding="utf-8")
    importlib.invalidate_caches()
    return {name: yaml.safe_load(block.code) for name, block in named.items() if block.language == "yaml"}


# ----------------------------------------------------------------------------- Python


def python_pages():
    return [page for page in PAGES if page != README and blocks(page, "python")]  # the README's has a test of its own


@pytest.mark.parametrize("page", python_pages(), ids=lambda path: path.name)
def test_the_python_of_a_page_runs(page, folder):
    save_files(page, folder)
    scope = {"__name__": "page"}
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its tips would fill the output
    for block in all_blocks(page):
        if block.language == "python" and "no-run" not in block.attributes:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.code, page.name, "exec"), scope)  # noqa: S102  the page's own code, which has to run


@each_document
def test_python_that_does_not_run_says_why(document):
    for block in all_blocks(document):
        if block.language == "python":
            compile(block.code, document.name, "exec")
            assert block.attributes.keys() <= {"file", "no-run"}, f"unknown attributes {block.attributes}"
            reason = block.attributes.get("no-run", "it runs")
            assert len(reason.split()) > 1, f"{document.name}: no-run needs its reason, not {reason!r}"


# ----------------------------------------------------------------------------- commands and configs


@each_document
def test_commands_exist_and_take_their_options(document, folder, parser):
    configs = save_files(document, folder)
    for words in commands(document):
        check_command(words, parser, configs)


@each_document
def test_yaml_blocks_are_configs(document, folder):
    save_files(document, folder)
    for code in blocks(document, "yaml"):
        check_config(yaml.safe_load(code))


# By the host's own parser, which reads values too: half a second each, so for the two pages that a reader begins with.
FIRST = (README, ROOT / "docs" / "start.md")
TRAINING = {" ".join(words): (page, words) for page in FIRST for words in commands(page) if is_training(words)}


@pytest.mark.parametrize(("page", "words"), TRAINING.values(), ids=TRAINING)
def test_the_training_commands_of_the_first_pages_parse(page, words, folder, capsys):
    save_files(page, folder)
    words = [word for word in words if word != "--print_config"]
    if "--ckpt_path" in words:  # the parser wants the file that a run would have written
        del words[words.index("--ckpt_path") : words.index("--ckpt_path") + 2]
    assert main([*words, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"]


# ----------------------------------------------------------------------------- the checks bite


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("fly away", "there is no command 'fly'"),
        ("run quickstart --vars.nothing 1", "no config has this variable"),
        ("fit --config mine.yaml --trainer.max_stepz 1", "the Trainer has no argument 'max_stepz'"),
        ("run lm_pretrain --model.depth 1", "has no argument 'depth'"),
        ("fit --config mine.yaml --speed 1", "there is no such option"),
        ("show nobody", "nothing is called 'nobody'"),
    ],
)
def test_a_wrong_command_is_found(words, problem, parser):
    with pytest.raises(AssertionError, match=problem):
        check_command(words.split(), parser, {})


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("modell: {}", "a config has no"),
        ("trainer: {max_stepz: 1}", "the Trainer has no argument"),
        ("trainer: {callbacks+: [{class_path: lightning_stable.callbacks.ema.EMAS}]}", "has no class 'EMAS'"),
        (
            "trainer: {callbacks: [{class_path: lightning_stable.callbacks.ema.EMA, init_args: {rate: 1}}]}",
            "has no arguments",
        ),
    ],
)
def test_a_wrong_config_is_found(config, problem):
    with pytest.raises(AssertionError, match=problem):
        check_config(yaml.safe_load(config))
