"""Names of a new project: what a folder, a distribution and a Python package can be called."""

import keyword
import re
import sys
import unicodedata

from lightning_stable.cli.locate import CommandError

__all__ = ["check_identifier", "package_name", "project_name"]

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
# What a project's folder holds beside its package, and the packages that its runs import first of all.
_TAKEN = frozenset(
    ("configs", "runs", "tests", "lightning", "lightning_stable", "numpy", "peft", "pytest", "sklearn", "torch", "yaml")
)


def project_name(given: str) -> str:
    """Return the name of the folder and of the distribution: as given where it is one, else the nearest.

    Raises:
        CommandError: If it is a path, or nothing is left of it.
    """
    if "/" in given or "\\" in given:
        raise CommandError(f"{given!r} is a path. Give a name, and where it goes by --output-dir DIR.")
    if _DISTRIBUTION.fullmatch(given):
        return given
    name = re.sub(r"[^A-Za-z0-9._]+", "-", _plain(given)).strip("-._")
    if not name:
        raise CommandError(f"{given!r} has no letter or digit for a name. Give one like my-project.")
    return name


def package_name(project: str) -> str:
    """Return a name for the Python package of a project, which no other package that it needs has."""
    name = re.sub(r"[^a-z0-9]+", "_", _plain(project).lower()).strip("_")
    if name[:1].isdigit():
        name = f"project_{name}"
    return f"{name}_project" if _is_taken(name) else name


def check_identifier(question: str, given: str) -> None:
    """Raise if a name given by the user cannot stand in Python code.

    Raises:
        CommandError: If it is no identifier, or another package has it.
    """
    if not (given.isascii() and given.isidentifier()) or keyword.iskeyword(given):
        raise CommandError(
            f"{question} {given!r} is no name in Python: letters, digits and underscores, no digit first."
        )
    if _is_taken(given):
        raise CommandError(f"{question} {given!r} would hide what Python or the project itself has of that name.")


def _is_taken(name: str) -> bool:
    return keyword.iskeyword(name) or name in sys.stdlib_module_names or name in _TAKEN


def _plain(text: str) -> str:
    """Return a text without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
