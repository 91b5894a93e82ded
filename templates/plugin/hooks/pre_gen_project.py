"""Refuses bad names before anything is written. Needs Python alone."""

import builtins
import json
import keyword
import re
import sys

# Quotes come as escapes, so that this is one string whatever the answers are.
ANSWERS = json.loads(r'''{{ cookiecutter | tojson }}''')
# What a project has beside its package: folders, of which its .gitignore leaves some out, and modules of its tests.
BESIDE = (
    "__pycache__", "build", "configs", "conftest", "dist", "makefile", "runs", "tests",
    "test_contracts", "test_parts", "test_rows", "test_train",
)
# No file or folder of Windows can be called so, whatever its suffix.
DEVICE = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?")


def main() -> None:
    """End with exit code 1 and one line if something cannot be."""
    check_names()
    check_method()


def check_names() -> None:
    """Refuse names of the project and its package that cannot be, or that others have."""
    project, package = ANSWERS["project_name"], ANSWERS["package_name"]
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", project):
        sys.exit(
            f"project_name {project!r} has to be letters, digits, '-', '_' and '.', with a letter or a digit at both "
            "ends."
        )
    for question, name in (("project_name", project), ("package_name", package)):
        if len(name) > 64:
            sys.exit(f"{question} has {len(name)} letters. At most 64 will do.")
        if re.sub(r"[-_.]+", "_", name).lower() in ANSWERS["_reserved"]["packages"]:
            sys.exit(f"{question} {name!r} is that of a package that the project itself needs. Choose another.")
        check_file(question)
    check_identifier("package_name")
    if package.lower() in (*BESIDE, f"test_{ANSWERS['method_name']}"):
        sys.exit(f"package_name {package!r} is that of another file or folder of the project. Choose another.")


def check_method() -> None:
    """Refuse names of the method and its class that lightning-stable, or a file of the template, would not take."""
    check_file("method_name")
    for question in ("method_name", "class_name"):
        check_identifier(question)
        if len(ANSWERS[question]) > 64:
            sys.exit(f"{question} has {len(ANSWERS[question])} letters. At most 64 will do.")
        builtin = dir(builtins) if question == "class_name" else []
        if ANSWERS[question] in (*ANSWERS["_reserved"][question], *builtin):
            sys.exit(f"{question} {ANSWERS[question]!r} is taken by Python, lightning or the files of a plugin.")
    method, class_name = ANSWERS["method_name"], ANSWERS["class_name"]
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", method):
        sys.exit(f"method_name {method!r} has to be lower case: letters and digits, with single underscores between.")
    if not re.fullmatch(r"(?!Test)[A-Z][A-Za-z0-9_]*", class_name):
        sys.exit(f"class_name {class_name!r} has to begin with a capital letter, and not with Test.")


def check_file(question: str) -> None:
    """Refuse a name that no file or folder can have."""
    if DEVICE.fullmatch(ANSWERS[question].lower()):
        sys.exit(f"{question} {ANSWERS[question]!r} is a device on Windows, where no file can be called so.")


def check_identifier(question: str) -> None:
    """Refuse a name that cannot stand in Python code."""
    name = ANSWERS[question]
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        sys.exit(f"{question} {name!r} is no name for Python code, or one that is taken. Choose another.")


main()
