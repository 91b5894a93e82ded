"""The free variables: which of them a text refers to, and whether any that is set is referred to by nothing."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import yaml

from lightning_stable.cli._configs import Config, walk_arguments
from lightning_stable.cli.locate import CommandError, TemplateKind, list_templates
from lightning_stable.registry import nearest

__all__ = ["check_variables", "used_variables"]

# As ${vars.lr}, or by brackets: ${vars[lr]}, ${[vars].lr}.
_USE = re.compile(r"\$\{[^${}]*\bvars\]?(?:\.|\[)(\w+)")
# All of them together, as for a logger that records them.
_USE_OF_ALL = re.compile(r"\$\{[^${}]*\bvars\]?\}")
# Of a variable by another one beside it.
_USE_BESIDE = re.compile(r"\$\{\.\[?(\w+)")

_KINDS: tuple[TemplateKind, ...] = ("addon", "recipe")


class _Set(NamedTuple):
    """A variable that is set.

    Attributes:
        name: Its name.
        file: The config that sets it; nothing for an option.
    """

    name: str
    file: str


def used_variables(text: str) -> set[str]:
    """Return the names of the variables that a text refers to, as in ``${vars.lr}``."""
    return set(_USE.findall(text))


def check_variables(arguments: Sequence[str]) -> str:
    """Raise if a variable is set that nothing refers to: it would change nothing.

    Those of an addon are not looked at, nor those of a config that a run has saved, where all references are filled in.
    A file may set variables of addons that are not given, so that it can be tried with and without them.

    Args:
        arguments: The command line.

    Returns:
        A sentence on those in files for addons that are not given; nothing where there are none.

    Raises:
        CommandError: The message says what to do.
    """
    walked = list(walk_arguments(arguments))
    text = "\n".join([*arguments, *(each.text for each in walked if isinstance(each, Config))])
    if _USE_OF_ALL.search(text):
        return ""
    used = used_variables(text)
    beside = {*used, *_USE_BESIDE.findall(text)}
    spare: dict[tuple[str, str], list[str]] = {}
    for each in dict.fromkeys(_variables(walked)):
        if each.name in beside:
            continue
        addons = _users("addon", each.name)
        if not each.file or not addons:
            where = f" in {each.file}" if each.file else ""
            raise CommandError(
                f"vars.{each.name} is set{where}, but nothing refers to it, so it would change nothing. "
                f"{_place_of(each.name, used)}"
            )
        spare.setdefault((" or ".join(addons), each.file), []).append(f"vars.{each.name}")
    return " ".join(
        f"without {key[0]} there is no use for {', '.join(found)} ({key[1]})." for key, found in spare.items()
    )


def _variables(walked: Sequence[Config | tuple[str, str]]) -> Iterator[_Set]:
    """Yield the variables that files and options set, in order."""
    for each in walked:
        if isinstance(each, Config):
            given = each.content.get("vars")
            is_read = not each.is_addon and not _is_saved(each)
            yield from (_Set(str(name), each.name) for name in (given if is_read and isinstance(given, dict) else ()))
        elif found := re.match(r"--vars\.(\w+)", each[0]):
            yield _Set(found[1], "")
        elif each[0] == "--vars":
            given = yaml.safe_load(each[1])  # the parser has taken it
            yield from (_Set(str(name), "") for name in (given if isinstance(given, dict) else ()))


def _is_saved(config: Config) -> bool:
    """Tell whether a config is what a run has saved, or ``--print_config`` printed: all options, and no reference."""
    return "${" not in config.text and {"model", "trainer", "ckpt_path"} <= set(config.content)


def _place_of(name: str, used: set[str]) -> str:
    """Return what to do about a variable that nothing refers to: the packaged config that does, or the near names."""
    addons, recipes = (_users(kind, name) for kind in _KINDS)
    if addons:
        use = "uses it" if len(addons) == 1 else "use it"
        return f"{' and '.join(addons)} {use}: add --config {addons[0]}."
    known = nearest(name, sorted(used)) if used else "No config refers to a variable."
    if recipes and "Did you mean" not in known:
        use = "uses it" if len(recipes) == 1 else "use it"
        return f"{known} {', '.join(recipes)} {use}: give --config {recipes[0]} before, or begin with 'extends'."
    return known


def _users(kind: TemplateKind, name: str) -> list[str]:
    """Return the packaged configs of a kind that refer to a variable, as ``--config`` takes them."""
    found = [each for each in list_templates(kind) if name in used_variables(each.path.read_text(encoding="utf-8"))]
    return [f"{kind}:{each.name}" for each in found]
