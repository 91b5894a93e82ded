"""Where the packaged templates and cards lie: inside an installed wheel, or beside the package in a source tree.

Those of methods that other distributions add lie in their packages: ``cards/NAME.md``, ``templates/addons/NAME.yaml``.
"""

import difflib
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_stable._extensions import extensions
from lightning_stable.registry import addons_of, nearest

__all__ = [
    "FOLDERS",
    "GUIDES",
    "PICTURE_FORMATS",
    "CommandError",
    "Template",
    "find_project_template",
    "find_template",
    "list_guides",
    "list_scripts",
    "list_templates",
    "read_card",
    "read_guide",
    "resolve_config",
    "short_path",
    "suggest",
]

TemplateKind = Literal["recipe", "addon"]

FOLDERS: dict[TemplateKind, str] = {"recipe": "recipes", "addon": "addons"}

_PACKAGE = Path(__file__).resolve().parents[1]


GUIDES = (
    "continual",
    "doctor",
    "export_adapter",
    "extend",
    "faq",
    "finetune",
    "low_bits",
    "migrate",
    "pretrain",
    "recipes",
    "slow_links",
    "start",
    "sweep",
    "task_stream",
)
"""Pages about what is no method: how to begin, jobs, commands."""

PICTURE_FORMATS = (".png", ".svg", ".pdf")
"""The suffixes that ``lightning-stable plot --output`` takes."""


class CommandError(Exception):
    """A wrong use of the command: its message is printed as one line and the command ends with exit code 2.

    Args:
        message: What is wrong, and what to do.
        details: The long message behind it, which ``--debug`` prints besides.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Template(NamedTuple):
    """A packaged config file.

    Attributes:
        kind: ``"recipe"`` for a whole run, ``"addon"`` for one plugin that any run can add.
        name: The file's name without its suffix.
        path: The YAML file.
    """

    kind: TemplateKind
    name: str
    path: Path

    @property
    def summary(self) -> str:
        """The first line of the file, which is a comment that says what it is."""
        return self.path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".")


def list_templates(kind: TemplateKind) -> list[Template]:
    """Return the packaged templates of one kind, and the addons of methods that were added, sorted by name."""
    paths = list((_folder("templates", "templates") / FOLDERS[kind]).glob("*.yaml"))
    if kind == "addon":
        paths += _added_addons()
    return sorted((Template(kind, path.stem, path) for path in paths), key=lambda template: template.name)


def list_scripts() -> list[Path]:
    """Return the packaged scripts that start a recipe on several machines, sorted by name."""
    return sorted((_folder("templates", "templates") / "launch").glob("*.*"))


def list_guides() -> list[tuple[str, str]]:
    """Return the names and headings of the guides that are installed."""
    paths = [_guide(name) for name in GUIDES]
    return [(path.stem, _heading(path)) for path in paths if path.is_file()]


def find_project_template(name: str) -> Path:
    """Return the folder of a packaged cookiecutter template, ``"scaffold"`` or ``"plugin"``."""
    return _folder("templates", "templates") / name


def find_template(kind: TemplateKind, name: str) -> Template:
    """Return the packaged template ``name``.

    Raises:
        CommandError: If there is none; the message suggests the near ones.
    """
    templates = {template.name: template for template in list_templates(kind)}
    if name not in templates:
        raise CommandError(f"There is no {kind} {name!r}. {suggest(name, list(templates))}")
    return templates[name]


def resolve_config(value: str) -> tuple[str, bool]:
    """Turn the value of ``--config`` into a path.

    Args:
        value: ``addon:NAME``, ``recipe:NAME``, or anything else, which is left as it is.

    Returns:
        The path, and whether it is that of a packaged addon.

    Raises:
        CommandError: If the packaged template does not exist; the message suggests the near ones.
    """
    for kind in FOLDERS:
        if value.startswith(f"{kind}:"):
            return str(find_template(kind, value.removeprefix(f"{kind}:")).path), kind == "addon"
    return value, False


def read_card(name: str) -> str:
    """Return the Markdown text of a method's card.

    Raises:
        CommandError: If the method has no card.
    """
    folders = [e.folder / "cards" for e in extensions() if name in {method.name for method in e.methods}]
    path = (folders or [_folder("cards", "docs/methods")])[0] / f"{name}.md"
    if not path.is_file():
        raise CommandError(f"The method {name!r} has no card: {path} does not exist.")
    return path.read_text(encoding="utf-8")


def read_guide(name: str) -> str:
    """Return the Markdown text of a guide.

    Raises:
        CommandError: If this installation has none of that name; the message suggests the near ones.
    """
    if name not in GUIDES:
        raise CommandError(f"There is no guide {name!r}. {suggest(name, list(GUIDES))}")
    path = _guide(name)
    if not path.is_file():
        raise CommandError(f"The guide {name!r} is not installed. Install the package anew.")
    return path.read_text(encoding="utf-8")


def suggest(name: str, known: list[str]) -> str:
    """Return the near ones among the names of what is packaged, and where all are: there are too many for an error."""
    # Of so many names some are always half alike.
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    where = "'lightning-stable list' prints all names."
    return f"{nearest(name.lower(), near)} {where}" if near else where


def short_path(path: Path) -> str:
    """Return a path as seen from the current directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _added_addons() -> list[Path]:
    """Return the addons of methods that other distributions add; no other file of theirs."""
    names = [(e.folder, addon) for e in extensions() for method in e.methods for addon in addons_of(method)]
    paths = (folder / "templates" / FOLDERS["addon"] / f"{name}.yaml" for folder, name in names)
    return [path for path in paths if path.is_file()]


def _guide(name: str) -> Path:
    return _folder("guides", "docs") / f"{name}.md"


def _heading(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _folder(installed: str, in_source: str) -> Path:
    """Return a data folder of the installed package, or of the source tree that the package lies in."""
    inside = _PACKAGE / installed
    return inside if inside.is_dir() else _PACKAGE.parent / in_source
