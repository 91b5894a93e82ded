"""Names of a new project: what a folder, a distribution and a Python package can be called."""

import builtins
import keyword
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence

from lightning_stable._extensions import NAME
from lightning_stable.cli.locate import CommandError

__all__ = ["check_names", "package_name", "project_name"]

# The hooks of the templates, which have Python alone, check the same.
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_CLASS = re.compile(r"(?!Test)[A-Z][A-Za-z0-9_]*")
_LONGEST = 64
# What a project's folder holds beside its package.
_FOLDERS = frozenset(("configs", "runs", "tests"))


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
    """Return a name for the Python package of a project, which no module of Python and no folder of it has."""
    name = re.sub(r"[^a-z0-9]+", "_", _plain(project).lower()).strip("_")
    if name[:1].isdigit():
        name = f"project_{name}"
    return f"{name}_project" if _is_taken(name) else name


def check_names(answers: Mapping[str, str], reserved: Mapping[str, Sequence[str]]) -> None:
    """Raise if a name among the answers cannot be, or is taken.

    Args:
        answers: Some answers, or all of them.
        reserved: Names that are taken: ``packages``, and by question those of a method and its class.

    Raises:
        CommandError: For the first that cannot be.
    """
    for question in ("project_name", "package_name", "method_name", "class_name"):
        given = answers.get(question)
        if given is None:
            continue
        if len(given) > _LONGEST:
            raise CommandError(f"{question} {given[:12]}... has {len(given)} letters. At most {_LONGEST} will do.")
        if question != "project_name":
            _check_identifier(question, given)
        if question in ("project_name", "package_name"):
            if re.sub(r"[-_.]+", "_", given).lower() in reserved["packages"]:
                raise CommandError(
                    f"{question} {given!r} would hide or replace a package of that name, which lightning-stable or a "
                    "project of it needs. Give another one."
                )
        elif given in reserved[question] or (question == "class_name" and given in dir(builtins)):
            raise CommandError(f"{question} {given!r} is taken by the files of a plugin. Give another one.")
    _check_method(answers.get("method_name"), answers.get("class_name"))


def _check_method(name: str | None, class_name: str | None) -> None:
    if name is not None and not NAME.fullmatch(name):
        raise CommandError(
            f"method_name {name!r} has to be lower case: letters and digits, with single underscores between."
        )
    if class_name is not None and not _CLASS.fullmatch(class_name):
        raise CommandError(f"class_name {class_name!r} has to begin with a capital letter, and not with Test.")


def _check_identifier(question: str, given: str) -> None:
    if not (given.isascii() and given.isidentifier()) or keyword.iskeyword(given):
        raise CommandError(
            f"{question} {given!r} is no name in Python: letters, digits and underscores, no digit first."
        )
    if _is_taken(given):
        raise CommandError(f"{question} {given!r} would hide what Python or the project itself has of that name.")


def _is_taken(name: str) -> bool:
    return keyword.iskeyword(name) or name in sys.stdlib_module_names or name.lower() in _FOLDERS


def _plain(text: str) -> str:
    """Return a text without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
