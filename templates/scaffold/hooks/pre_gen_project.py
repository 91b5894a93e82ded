"""Refuses bad names and answers that do not go together, before anything is written. Needs Python alone."""

import json
import keyword
import re
import sys

# Quotes come as escapes, so that this is one string whatever the answers are.
ANSWERS = json.loads(r'''{{ cookiecutter | tojson }}''')


def main() -> None:
    """End with exit code 1 and one line if something cannot be."""
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", ANSWERS["project_name"]):
        sys.exit(
            f"project_name {ANSWERS['project_name']!r} has to be letters, digits, '-', '_' and '.', with a letter or a "
            "digit at both ends."
        )
    for question in ("package_name",):
        name = ANSWERS[question]
        if not name.isidentifier() or keyword.iskeyword(name) or name in (*sys.stdlib_module_names, "tests"):
            sys.exit(f"{question} {name!r} is no name for Python code, or one that is taken. Choose another.")
    for conflict in ANSWERS.get("_conflicts", []):
        if all(ANSWERS[question] in values for question, values in conflict["given"].items()):
            given = " and ".join(f"{question}={ANSWERS[question]}" for question in conflict["given"])
            sys.exit(f"{given} do not go together: {conflict['why']}")


main()
