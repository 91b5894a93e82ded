"""The configs that a command line names: addons, recipes and files, with the recipes that they extend.

A config may begin with all of a packaged recipe: ``extends: lm_pretrain``, on a line of its own at the left margin. It
is read as if ``--config recipe:lm_pretrain`` stood before it, so it says only what differs.

Files take the place of what stands before them, such as a list of callbacks. An addon adds to all of them, so it is
read after the last file, wherever it was given.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_stable.cli.locate import CommandError, resolve_config

__all__ = ["Config", "addons_last", "read_configs", "walk_arguments"]

_EXTENDS = re.compile(r"^(?P<quote>['\"]?)extends(?P=quote)[ \t]*:(?P<name>[^#\n]*)(#[^\n]*)?$", re.MULTILINE)

_SPELLINGS = ("-c", "--config")

_SWEEP_RECORD = "lightning_stable.cli._sweep_record.SweepRecord"

_KINDS = {list: "list", str: "text", int: "number", float: "number"}

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
        found = self._parsed()
        return found if isinstance(found, dict) else {}

    def _parsed(self) -> Any:
        try:
            return yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            told = " ".join(str(error).replace(' in "<unicode string>",', " in").split())
            raise CommandError(f"--config {self.name} is no YAML: {told}") from error

    @property
    def trainer(self) -> dict[str, Any]:
        """What it says of the Trainer."""
        found = self.content.get("trainer")
        return found if isinstance(found, dict) else {}

    @property
    def is_settled(self) -> bool:
        """Whether it is what a sweep adds for one run: made from the other configs and addons, to come after all."""
        return _SWEEP_RECORD in self.text and list(self.content) == ["trainer"]

    def check(self) -> None:
        """Raise ``CommandError`` if it is no YAML of settings, or its ``trainer`` would take the place of all before.

        What is no file is left to the parser, as ever.
        """
        whole = self._parsed()
        if isinstance(whole, list) or not (whole is None or isinstance(whole, dict) or not _is_file(self.name)):
            raise CommandError(
                f"--config {self.name} is no mapping of settings but a {_KINDS.get(type(whole), 'value')}. Write them "
                "as 'trainer: {max_steps: 100}'."
            )
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
    text = _read(path, given) if is_file else path
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
        if (config := _config_of(argument, following)) is not None:
            yield from read_configs(config)
        elif name.startswith("--"):
            yield name, value if equals else following


def addons_last(arguments: Sequence[str]) -> list[str]:
    """Return a command line in the order in which it is read: no addon stands before a file.

    The files behind the first addon are moved to before it. Addons keep their order, and files theirs. An option stays
    behind the addons that it stood behind, as it may choose; one that a file takes the place of stays before that file,
    and its sub-options with it: ``--optimizer.betas`` is for the class of ``--optimizer``, not for that of the file.

    Args:
        arguments: The sub-command and its options.

    Raises:
        CommandError: If a config cannot be read.
    """
    parts: list[list[str]] = [[]]
    for argument in arguments:
        if argument.startswith(("--", "-c")):
            parts.append([])
        parts[-1].append(argument)
    given = [_config_of(*part) for part in parts]
    first = next((place for place, name in enumerate(given) if (name or "").startswith("addon:")), len(parts))
    configs = {place: read_configs(name) for place, name in enumerate(given) if name is not None and place >= first}
    options = [part[0].partition("=")[0].rstrip("+") for part in parts if part]
    addons = {place: found[-1] for place, found in configs.items() if found[-1].is_addon}
    files = {place: found for place, found in configs.items() if not (found[-1].is_addon or found[-1].is_settled)}

    def is_ahead(place: int) -> bool:
        if place < first or place in configs:
            return place < first or place in files
        before = [addon for other, addon in addons.items() if other < place]
        later = [config for other, found in files.items() if other > place for config in found]
        option = parts[place][0]
        wholes = [other for other in options if option.startswith(f"{other}.")]
        return any(_gives_way(each, before, later) for each in (option, *wholes))

    places = sorted(range(len(parts)), key=lambda place: not is_ahead(place))
    return [argument for place in places for argument in parts[place]]


def _gives_way(option: str, addons: Sequence[Config], files: Sequence[Config]) -> bool:
    """Tell whether an option goes before the files behind it: one says the same, and it is no choice over an addon."""
    is_choice = not option.startswith("--vars") and any(_says(addon, option) for addon in addons)
    return not is_choice and any(_says(file, option) for file in files)


def _config_of(argument: str = "", following: str = "", *_: str) -> str | None:
    """Return the config that an argument gives, perhaps by the one that follows; ``None`` if it gives none."""
    name, equals, value = argument.partition("=")
    if name in _SPELLINGS:
        return value if equals else following
    return argument[2:] if argument.startswith("-c") else None


def _says(config: Config, option: str) -> bool:
    """Tell whether a config says what an option says, too: under its key, or for the class that stands there."""
    found: Any = config.content
    for key in option.partition("=")[0].lstrip("-").rstrip("+").split("."):
        settings = found.get("init_args") if isinstance(found, dict) and key not in found else found
        if not isinstance(settings, dict) or key not in settings:
            return False
        found = settings[key]
    return True


def _read(path: str, given: str) -> str:
    """Return what is in a file.

    Raises:
        CommandError: If it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise CommandError(f"--config {given} is no text in UTF-8: {error}. Save it anew in that encoding.") from error
    except OSError as error:
        raise CommandError(f"--config {given} cannot be read: {error.strerror}.") from error


def _says_nothing(text: str) -> bool:
    return all(not line.strip() or line.lstrip()[0] == "#" or line.strip() == "---" for line in text.splitlines())


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a text that is too long for a name
        return False
