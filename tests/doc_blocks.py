"""What the documents hold: their blocks of code, and whether the commands and configs in them can be right.

Nothing here trains or parses by the host: names are looked up where they are defined, which takes no time.
"""

import argparse
import importlib
import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_stable.cli.locate import GUIDES, find_template, list_scripts, list_templates
from lightning_stable.cli.main import COMMANDS, TRAINER_COMMANDS
from lightning_stable.registry import METHODS

__all__ = [
    "CARDS",
    "DOCUMENTS",
    "PAGES",
    "README",
    "ROOT",
    "Block",
    "all_blocks",
    "blocks",
    "check_command",
    "check_config",
    "commands",
    "is_training",
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

# What stands at the top of a config of LightningCLI, besides the arguments of the Trainer under `trainer`.
_TOP = {"seed_everything", "model", "data", "trainer", "optimizer", "lr_scheduler", "vars", "ckpt_path", "extends"}
_FLAGS = {"print_config", "ckpt_path", "weights_only", "seed_everything", "config", "c"}


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
    """Return the commands of a document's bash blocks as words; comments and files that output goes to are left out."""
    lines = [line for code in blocks(document, "bash") for line in code.replace("\\\n", " ").splitlines()]
    found: list[list[str]] = []
    for line in lines:
        found.append([])
        words = iter(shlex.split(line, comments=True))
        for word in words:
            if word in ("|", "&&", "||", ";"):
                found.append([])
            elif word in (">", ">>"):
                next(words)
            else:
                found[-1].append(word)
    return [command for command in found if command]


def commands(document: Path) -> list[list[str]]:
    """Return the words after `lightning-stable` of each line that begins with it."""
    return [words[1:] for words in shell_lines(document) if words[0] == "lightning-stable"]


def is_training(words: list[str]) -> bool:
    """Return whether these words of a command train or evaluate a config."""
    return words[0] == "run" or words[0] in TRAINER_COMMANDS


# ----------------------------------------------------------------------------- commands


def check_command(words: list[str], parser: argparse.ArgumentParser, configs: dict[str, dict[str, Any]]) -> None:
    """Assert that a command exists, and takes these options.

    Args:
        words: What stands after `lightning-stable`.
        parser: The command's own.
        configs: The files that the document shows under a name, by that name.
    """
    command = words[0]
    assert command in COMMANDS, f"there is no command {command!r}"
    if command == "sweep":
        _, rest = parser.parse_known_args(words)
        _check_options(rest, _configs_of(words, configs))
    elif is_training(words):
        if command == "run":
            find_template("recipe", words[1])
        _check_options(words[1:], _configs_of(words, configs))
    else:
        parser.parse_args(words)
    if command == "show" and words[1] != "NAME":
        kind, colon, name = words[1].partition(":")
        assert find_template(kind, name) if colon else words[1] in _shown(), f"nothing is called {words[1]!r}"


def _shown() -> set[str]:
    named = [*METHODS, *list_templates("recipe"), *list_templates("addon")]
    return {row.name for row in named} | {path.name for path in list_scripts()} | set(GUIDES)


def _configs_of(words: list[str], configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the configs that a command names, packaged or shown by the document; of a reader's own nothing."""
    names = [f"recipe:{words[1]}"] if words[0] == "run" else []
    names += [later for word, later in itertools.pairwise(words) if word == "--config"]
    found = []
    for value in names:
        kind, colon, name = value.partition(":")
        if colon:
            found.append(_read(find_template(kind, name).path))
        elif words[0] == "sweep" and not value.endswith(".yaml"):
            found.append(_read(find_template("recipe", value).path))
        else:
            found.append(configs.get(value, {}))
    return found


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "extends" not in config:
        return config
    base = _read(find_template("recipe", config["extends"]).path)
    return base | config | {"vars": base.get("vars", {}) | config.get("vars", {})}


def _check_options(words: list[str], configs: list[dict[str, Any]]) -> None:
    from lightning.pytorch import Trainer

    variables = {name for config in configs for name in config.get("vars", {})}
    for word in words:
        if not word.startswith("--"):
            continue
        first, _, rest = word.removeprefix("--").partition("=")[0].partition(".")
        second = rest.partition(".")[0].removesuffix("+")
        if first == "vars":
            assert second in variables, f"{word}: no config has this variable, they have {sorted(variables)}"
        elif first == "trainer":
            assert second in _arguments(Trainer), f"{word}: the Trainer has no argument {second!r}"
        elif first in ("model", "data"):
            classes = [config[first]["class_path"] for config in configs if "class_path" in config.get(first, {})]
            for path in classes:
                assert second in _known(path), f"{word}: {path} has no argument {second!r}"
        else:
            assert first in _FLAGS, f"{word}: there is no such option"


# ----------------------------------------------------------------------------- configs


def check_config(config: Any) -> None:
    """Assert that a config has known keys only, and names classes with arguments that they take."""
    from lightning.pytorch import Trainer

    assert isinstance(config, dict), "a config is a mapping"
    unknown = config.keys() - _TOP
    assert not unknown, f"a config has no {sorted(unknown)}"
    for name in config.get("trainer", {}):
        assert name.removesuffix("+") in _arguments(Trainer), f"the Trainer has no argument {name!r}"
    for path, arguments in _classes(config):
        known = _known(path)
        unknown = set(arguments) - set(known)
        assert not unknown, f"{path} has no arguments {sorted(unknown)}, it has {known}"


def _classes(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each class that a config names, with the arguments that it is given."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node["class_path"], node.get("init_args", {})
        for value in node.values():
            yield from _classes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _classes(value)


def _known(path: str) -> list[str]:
    """Return the names of the arguments of a class, given by its dotted path."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    assert found is not None, f"{module} has no class {name!r}"
    return _arguments(found)


def _arguments(kind: type) -> list[str]:
    """Return the names of the arguments of a class, with those that it passes on to its bases."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names |= {each.name: None for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    return list(names)
