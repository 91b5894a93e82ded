"""The blocks of code in the documents run: Python, configs and commands, in the order in which they stand.

Those of the cards that are about the card's own module run in `tests/contract/`, beside the method; see
`lightning_stable/testing/examples.py`.
"""

import importlib
import re
import shlex
import sys

import pytest
from doc_blocks import CARDS, DOCUMENTS, PAGES, README, Block, all_blocks, commands_of
from doc_reader import Reader, made_small

from lightning_stable.testing.process import quiet_host


@pytest.fixture(autouse=True)
def alone(clean_process):
    """See ``clean_process``."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory whose modules can be imported, as that of a reader who starts Python in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    before = set(sys.modules)
    with quiet_host():
        yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and file.startswith(str(tmp_path)):
            del sys.modules[name]


def code_of(page):
    """Return what runs of a page: of the README not its Python, which has a test of its own."""
    kinds = ("yaml", "bash") if page == README else ("python", "yaml", "bash")
    return [block for block in all_blocks(page) if block.language in kinds]


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a run that goes on has a folder of its own
def test_the_blocks_of_a_page_run(page, folder):
    reader = Reader(page, folder)
    for block in code_of(page):
        reader.run(block)


def commands_beside(card):
    """Return the commands of a card that are not about the card's own module."""
    blocks = [block for block in all_blocks(card) if block.language == "bash" and "no-run" not in block.attributes]
    return [words for block in blocks for words in commands_of(block) if "mine.yaml" not in words]


@pytest.mark.parametrize("card", [card for card in CARDS if commands_beside(card)], ids=lambda path: path.name)
def test_the_commands_of_a_card_run(card, folder):
    reader = Reader(card, folder)
    for words in commands_beside(card):
        reader.run(Block("bash", {}, shlex.join(words)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_does_not_run_says_why(document):
    for block in all_blocks(document):
        if block.language == "python":
            compile(block.code, document.name, "exec")
        if block.language in ("python", "yaml", "bash"):
            assert block.attributes.keys() <= {"file", "no-run"}, f"unknown attributes {block.attributes}"
            reason = block.attributes.get("no-run", "it runs")
            assert len(reason.split()) > 1, f"{document.name}: no-run needs its reason, not {reason!r}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_block_is_written_so_that_it_is_not_seen(document):
    """In a list, by other marks, or in a language that nothing runs."""
    text = document.read_text(encoding="utf-8")
    fences = re.findall(r"^[ \t]*(?:```|~~~).*$", text, re.MULTILINE)
    directives = [fence for fence in fences if re.match(r"```\{(?:toctree|include)\}", fence)]
    blocks = all_blocks(document)
    assert len(fences) == 2 * (len(blocks) + len(directives)), "a fence stands in a list, or has other marks"
    assert {block.language for block in blocks} <= {"python", "yaml", "bash", "text", "toml"}


# ----------------------------------------------------------------------------- it bites


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (Block("bash", {}, "lightning-stable fly away"), "ends with 2"),
        (Block("bash", {}, "lightning-stable run quickstart --vars.nothing 1"), "vars.nothing"),
        (Block("bash", {}, "lightning-stable fit --config mine.yaml --trainer.max_stepz 1"), "'trainer.max_stepz'"),
        (Block("bash", {}, "lightning-stable show nobody > file"), "'nobody'"),
        (Block("bash", {}, "curl nowhere"), "nothing runs curl nowhere"),
        (Block("yaml", {}, "modell: {width: 3}"), "modell"),
        (Block("yaml", {}, "trainer: {callbacks+: [{class_path: lightning_stable.callbacks.ema.EMAS}]}"), "EMAS"),
        (Block("python", {}, "assert False, 'wrong'"), "wrong"),
    ],
)
def test_a_block_that_does_not_run_is_found(block, problem, folder):
    with pytest.raises(AssertionError, match=problem):
        Reader(README, folder).run(block)


def test_what_is_made_small_is_still_the_command():
    words = ["run", "lm_pretrain", "--vars.max_steps", "4000"]
    assert made_small(words)[: len(words)] == words
    assert made_small(["list"]) == ["list"]
