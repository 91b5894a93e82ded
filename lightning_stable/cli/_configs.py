"""The configs that a command line names: addons, recipes and files, with the recipes that they extend.

A config may begin with all of a packaged recipe: ``extends: lm_pretrain``, on a line of its own at the left margin. It
is read as if ``--config recipe:lm_pretrain`` stood before it, so it says only what differs.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_stable.cli.locate import CommandError, resolve_config

__all__ = ["Config", "read_configs", "walk_arguments"]

_EXTENDS = re.compile(r"^(?P<quote>['\"]?)extends(?P=quote)[ \t]*:(?P<name>[^#\n]*)(#[^\n]*)?$", re.MULTILINE)

# A config that says nothing. The parser takes no empty text, nor comments alone.
_EMPTY = "{}"


class Config(NamedTuple):
    """One config file.

    Attributes:
        name: What the user calls it: ``addon:ema``, ``recipe:quickstart`` or a path.
        value: What the parser is given: its path, or its text where that is not all that is in the file.
        text: What is in it, without the line ``extends``.
        is_addon: Whether it is a packaged addon, whose ``vars`` are defaults.
    """

    name: str
    value: str
    text: str
    is_addon: bool

    @property
    def content(self) -> dict[str, Any]:
        """What it says, before references are filled in.

        Raises:
            CommandError: If it is no YAML.
        """
        try:
            found = yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            raise CommandError(f"--config {self.name} is no YAML: {' '.join(str(error).split())}") from error
        return found if isinstance(found, dict) else {}

    @property
    def trainer(self) -> dict[str, Any]:
        """What it says of the Trainer."""
        found = self.content.get("trainer")
        return found if isinstance(found, dict) else {}

    def check(self) -> None:
        """Raise ``CommandError`` if it is no YAML, or its ``trainer`` would take the place of all settings before."""
        found = self.content.get("trainer", {})
        if not isinstance(found, dict):
            raise CommandError(
                f"--config {self.name}: trainer is {'empty' if found is None else repr(found)}. Give it settings, as "
                "in 'trainer: {max_steps: 100}', or leave it out."
            )


def read_configs(given: str) -> list[Config]:
    """Return the config of one ``--config``, last, and before it the recipes that it extends.

    Args:
        given: ``addon:NAME``, ``recipe:NAME``, a path, or YAML itself, as the parser takes it too.

    Raises:
        CommandError: If there is no such template, or ``extends`` names none.
    """
    path, is_addon = resolve_config(given)
    # What is no file is left to the parser, which reads it as YAML or says that it does not exist.
    is_file = _is_file(path)
    text = Path(path).read_text(encoding="utf-8-sig") if is_file else path  # some editors begin a file with a mark
    found = _EXTENDS.search(text)
    if found is None:
        return [Config(given, _EMPTY if is_file and _says_nothing(text) else path, text, is_addon)]
    name = found["name"].strip().strip("'\"")
    if not name or is_addon:
        raise CommandError(f"--config {given}: extends has to name a packaged recipe, as in 'extends: lm_pretrain'.")
    text = text[: found.start()] + text[found.end() :]
    value = _EMPTY if _says_nothing(text) else text
    return [*read_configs(f"recipe:{name.removeprefix('recipe:')}"), Config(given, value, text, is_addon)]


def walk_arguments(arguments: Sequence[str]) -> Iterator[Config | tuple[str, str]]:
    """Yield the configs of a command line, each after those that it extends, and ``(name, value)`` of other options."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")  # of --trainer.callbacks+=EMA the name keeps its plus
        if name in ("-c", "--config"):
            yield from read_configs(value if equals else following)
        elif name.startswith("--"):
            yield name, value if equals else following


def _says_nothing(text: str) -> bool:
    return all(not line.strip() or line.lstrip()[0] == "#" or line.strip() == "---" for line in text.splitlines())


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a text that is too long for a name
        return False
