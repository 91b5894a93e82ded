"""``lightning-stable new``: start a project, or with ``--plugin`` a package with a method of one's own.

Both are cookiecutter templates: ``templates/scaffold`` and ``templates/plugin``. Nothing is downloaded, and nothing is
written before all answers are known to go together.
"""

import argparse
import re
import shlex
import shutil
import sys
from pathlib import Path

from lightning_stable._extensions import PAGES, host_classes
from lightning_stable.cli._new_names import check_names, package_name, project_name
from lightning_stable.cli._new_template import answer, check_answers, check_folder, reserved, write_project
from lightning_stable.cli.locate import CommandError, short_path
from lightning_stable.registry import methods

__all__ = ["add_options", "run"]

_PROJECT, _PLUGIN = "scaffold", "plugin"
# The questions with options of their own, and their choices. Written out: other commands are not to read the template.
_CHOICES = {
    "task": "vision, causal_lm, tabular",
    "schedule": "wsd, wsd_s, none",
    "averaging": "ema, balanced_ema, none",
    "sharpness": "none, sam, saf, mesa",
    "precision": "none, bf16, simulated, float8, int8",
    "peft": "none, pissa, lora_ga, eva, loldu, svfit; for causal_lm",
    "strategy": "none, ddp, co2, local_sgd, slowmo, diloco, compressed_ddp, one_bit_adam",
}

# Nothing may be downloaded unasked, so that is how a project begins; what it learns then is no fine-tuning.
_ON_RANDOM_WEIGHTS = (
    "The adapters sit on random weights until model.init_args.pretrained in configs/train.yaml names a model: a folder "
    "of save_pretrained, or a name on the hub."
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``new``."""
    parser.description = (
        "Start a project: a package with a LightningModule and a LightningDataModule, a config with the plugins you "
        "choose, tests, Makefile and CI. With --plugin: a package that adds a method of your own to lightning-stable. "
        "What is not given as an option is asked for."
    )
    parser.add_argument("name", metavar="NAME", help="name of the project, and of its folder")
    parser.add_argument("--plugin", action="store_true", help="a package with a plugin of your own, not a project")
    parser.add_argument("--no-input", action="store_true", help="ask nothing: what is not given is as by default")
    parser.add_argument(
        "--output-dir", metavar="DIR", default=".", help="where the folder goes; the current one if not given"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that exists, replacing files in it")
    parser.add_argument(
        "--set",
        metavar="QUESTION=ANSWER",
        action="append",
        default=[],
        help="answer any question, such as package_name=demo; repeatable",
    )
    group = parser.add_argument_group("answers to the questions of a project, the default first")
    for question, choices in _CHOICES.items():
        group.add_argument(f"--{question}", metavar="CHOICE", help=choices)


def run(options: argparse.Namespace) -> int:
    """Write a project, and say what to do with it.

    Args:
        options: As :func:`add_options` defines them.

    Returns:
        0: failures are errors.

    Raises:
        CommandError: If a name, an answer or a combination cannot be, or the folder exists. Nothing is written then.
    """
    template = _PLUGIN if options.plugin else _PROJECT
    given = {"project_name": project_name(options.name), **_given(options, template)}
    _check(template, given)
    output = Path(options.output_dir)
    check_folder(output / given["project_name"], force=options.force)
    defaults = {"package_name": package_name(given["project_name"])}
    answers = answer(template, given, defaults, ask=not options.no_input)
    _check(template, answers)
    folder = write_project(template, answers, output, force=options.force)
    _report(folder, answers, options.plugin)
    return 0


def _given(options: argparse.Namespace, template: str) -> dict[str, str]:
    """Return the answers that options give."""
    given = {name: value for name in _CHOICES if (value := getattr(options, name)) is not None}
    if given and template == _PLUGIN:
        raise CommandError(f"--{next(iter(given))} is a question of a project, and --plugin asks none of them.")
    for text in options.set:
        question, equals, value = text.partition("=")
        if not equals or not value:
            raise CommandError(f"--set {text}: write QUESTION=ANSWER, as in --set package_name=demo.")
        if question == "project_name":
            raise CommandError(f"--set {text}: the name of the project is the first argument, here {options.name!r}.")
        if given.get(question, value) != value:
            raise CommandError(f"{question} is given twice, as {given[question]!r} and as {value!r}.")
        given[question] = value
    return given


def _check(template: str, answers: dict[str, str]) -> None:
    """Raise if answers, some or all, cannot be or do not go together."""
    check_answers(template, answers)
    check_names(answers, reserved(template))
    name, class_name = answers.get("method_name", ""), answers.get("class_name", "")
    if name in PAGES:
        raise CommandError(f"There is a guide or recipe {name!r} already. Give another method_name.")
    if class_name and class_name in host_classes():
        raise CommandError(f"There is a class {class_name!r} already, of lightning. Give another class_name.")
    for method in methods() if name or class_name else ():
        if name in (method.name, *method.addons):
            raise CommandError(f"There is a method {name!r} already: {method.class_path}. Give another method_name.")
        if class_name in (method.class_name, *method.relatives):
            raise CommandError(f"There is a class {class_name!r} already, of {method.name}. Give another class_name.")


def _report(folder: Path, answers: dict[str, str], plugin: bool) -> None:
    """Say what was written and what comes next."""
    path = short_path(folder)
    lines = [f"Written: {path} (package {answers['package_name']})", "", f"  cd {shlex.quote(path)}"]
    # Which Python `make` would find is a matter of the shell.
    found = shutil.which("python3")
    same = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "" if same else f" PYTHON={_quote_for_make(sys.executable)}"
    if plugin:
        lines += [f"  make install{python}", f"  make test{python}", "  lightning-stable list"]
    else:
        lines += [f"  make test{python}", f"  make train{python}"]
    lines.append("")
    if answers.get("peft", "none") != "none":
        lines.append(_ON_RANDOM_WEIGHTS)
    sys.stdout.write("\n".join([*lines, "README.md says more.", ""]))


def _quote_for_make(path: str) -> str:
    """Return a path for a variable of make: quoted for the shell that starts make, and for those that make starts."""
    return shlex.quote(re.sub(r"([^\w@%+=:,./-])", r"\\\1", path).replace("$", "$$"))
