"""Refuses bad names and answers that do not go together, before anything is written. Needs Python alone."""

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
    for conflict in ANSWERS.get("_conflicts", []):
        if all(ANSWERS[question] in values for question, values in conflict["given"].items()):
            given = " and ".join(f"{question}={ANSWERS[question]}" for question in conflict["given"])
            sys.exit(f"{given} do not go together: {conflict['why']}")


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
    if package.lower() in BESIDE:
        sys.exit(f"package_name {package!r} is that of another file or folder of the project. Choose another.")


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
