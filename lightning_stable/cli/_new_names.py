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
# What a project has beside its package: folders, of which its .gitignore leaves some out, and modules of its tests.
_BESIDE = (
    *("__pycache__", "build", "configs", "conftest", "dist", "makefile", "runs", "tests"),
    *("test_contracts", "test_parts", "test_rows", "test_train"),
)
# No file or folder of Windows can be called so, whatever its suffix.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?")


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
    """Return a name for the Python package of a project, which no module of Python and nothing else in it has."""
    name = re.sub(r"[^a-z0-9]+", "_", _plain(project).lower()).strip("_")
    if name[:1].isdigit():
        name = f"project_{name}"
    return f"{name}_project" if _is_taken(name) or name in _BESIDE else name


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
        if question != "class_name":
            _check_file(question, given, f"test_{answers.get('method_name')}")
        if question != "project_name":
            _check_identifier(question, given)
        if question in ("project_name", "package_name"):
            if re.sub(r"[-_.]+", "_", given).lower() in reserved["packages"]:
                raise CommandError(
                    f"{question} {given!r} would hide or replace a package of that name, which lightning-stable or a "
                    "project of it needs. Give another one."
                )
        elif given in reserved[question] or (question == "class_name" and given in dir(builtins)):
            raise CommandError(
                f"{question} {given!r} is taken by Python, lightning or the files of a plugin. Give another one."
            )
    _check_method(answers.get("method_name"), answers.get("class_name"))


def _check_file(question: str, given: str, test: str) -> None:
    """Raise if there can be no file or folder of a name, or if a package would get into the way of another one."""
    if _DEVICE.fullmatch(given.lower()):
        raise CommandError(
            f"{question} {given!r} is a device on Windows, where no file or folder can be called so. Give another one."
        )
    if question == "package_name" and given.lower() in (*_BESIDE, test):
        raise CommandError(
            f"{question} {given!r} is that of another file or folder of the project, or hides one. Give another one."
        )


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
        raise CommandError(f"{question} {given!r} would hide what Python has of that name. Give another one.")


def _is_taken(name: str) -> bool:
    return keyword.iskeyword(name) or name in sys.stdlib_module_names


def _plain(text: str) -> str:
    """Return a text without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
