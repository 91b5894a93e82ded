"""A packaged cookiecutter template: its questions, the answers, and the files made of them.

cookiecutter's own command line would read the user's settings and write a replay into the home folder, and asks for
what was given. Its functions below that do neither.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_stable.cli.locate import CommandError, find_project_template
from lightning_stable.registry import nearest

__all__ = ["answer", "check_answers", "check_folder", "questions", "reserved", "write_project"]


def questions(template: str) -> dict[str, str | list[str]]:
    """Return the questions of a template, in their order, with the default or the choices; the first is the default."""
    return {name: value for name, value in _settings(template).items() if not name.startswith("_")}


def reserved(template: str) -> dict[str, list[str]]:
    """Return the names that a template's answers cannot have: ``packages``, and more by question."""
    names: dict[str, list[str]] = _settings(template)["_reserved"]
    return names


def check_answers(template: str, answers: Mapping[str, str]) -> None:
    """Raise if answers are not those that a template takes, or do not go together.

    Args:
        template: The template.
        answers: Some answers, or all of them.

    Raises:
        CommandError: For the first that cannot be.
    """
    asked = questions(template)
    for question, given in answers.items():
        if question not in asked:
            raise CommandError(f"There is no question {question!r} to answer. {nearest(question, list(asked))}")
        choices = asked[question]
        if isinstance(choices, list) and given not in choices:
            raise CommandError(f"{question}: there is no choice {given!r}. {nearest(given, choices)}")
    for conflict in _conflicts(_settings(template), answers):
        pair = " and ".join(f"{question}={answers[question]}" for question in conflict["given"])
        raise CommandError(f"{pair} do not go together: {conflict['why']}")


def answer(template: str, given: Mapping[str, str], defaults: Mapping[str, str], ask: bool) -> dict[str, str]:
    """Return an answer to every question of a template.

    Args:
        template: The template.
        given: Answers that are not asked for.
        defaults: Defaults in place of those of the template.
        ask: Ask at the terminal for the rest; else the rest is as by default. What does not go with answers so far is
            not offered, and where one choice is left there is no question.

    Raises:
        CommandError: If the input ends before the questions do.
    """
    from cookiecutter.prompt import read_user_choice, read_user_variable, render_variable
    from cookiecutter.utils import create_env_with_context

    settings = _settings(template)
    prompts, environment = settings["__prompts__"], create_env_with_context({"cookiecutter": settings})
    open_questions = [question for question in questions(template) if question not in given]
    answers: dict[str, str] = {}
    for question, value in questions(template).items():
        if question in given:
            answers[question] = given[question]
            continue
        prefix = f"  [dim][{open_questions.index(question) + 1}/{len(open_questions)}][/] "
        try:
            if isinstance(value, list):
                fits = [each for each in value if not _conflicts(settings, {**given, **answers, question: each})]
                offered = fits if ask and fits else value
                alone = len(offered) == 1 or not ask
                answers[question] = offered[0] if alone else read_user_choice(question, offered, prompts, prefix)
                continue
            default = defaults.get(question) or render_variable(environment, value, answers)
            answers[question] = read_user_variable(question, default, prompts, prefix) if ask else default
        except EOFError as error:
            raise CommandError(
                f"The input ended at the question for {question!r}. Give --no-input to take the defaults."
            ) from error
    return answers


def check_folder(folder: Path, *, force: bool) -> None:
    """Raise if a folder is there already and may not be written into, or cannot be.

    Raises:
        CommandError: If so.
    """
    try:
        in_the_way = folder.exists() and not (force and folder.is_dir())
    except OSError as error:  # such as a name that is too long
        raise CommandError(f"The folder cannot be written: {error.strerror or error}. Give another one.") from error
    if in_the_way:
        raise CommandError(f"{folder} exists. Give another name or --output-dir, or --force to replace files in it.")


def write_project(template: str, answers: Mapping[str, str], output: Path, *, force: bool) -> Path:
    """Write the files of a template, and return their folder.

    Args:
        template: The template.
        answers: An answer to every question.
        output: Where the folder goes.
        force: Write into a folder that exists: files of the same names are replaced.

    Raises:
        CommandError: If the folder exists and ``force`` is false, or it cannot be written.
    """
    from cookiecutter.generate import generate_context, generate_files

    folder = output / answers["project_name"]
    check_folder(folder, force=force)
    with tempfile.TemporaryDirectory() as scratch:
        # An installer compiles what it installs; that is no part of the template.
        source = Path(scratch, template)
        shutil.copytree(find_project_template(template), source, ignore=shutil.ignore_patterns("__pycache__"))
        context = generate_context(context_file=str(source / "cookiecutter.json"))
        context["cookiecutter"].update(answers)
        try:
            # What its hook would check was checked.
            written = generate_files(str(source), context, str(output), overwrite_if_exists=force, accept_hooks=False)
        except OSError as error:
            raise CommandError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return Path(written)


def _conflicts(settings: Mapping[str, Any], answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the conflicts of a template that these answers are in."""
    return [
        conflict
        for conflict in settings.get("_conflicts", [])
        if all(answers.get(question) in values for question, values in conflict["given"].items())
    ]


def _settings(template: str) -> dict[str, Any]:
    text = (find_project_template(template) / "cookiecutter.json").read_text(encoding="utf-8")
    settings: dict[str, Any] = json.loads(text)
    return settings
