"""The ``lightning-stable`` command: finds out what is asked and imports only what that needs."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

import lightning_stable
from lightning_stable.cli.locate import PICTURE_FORMATS, CommandError, find_template, list_templates
from lightning_stable.registry import nearest

__all__ = ["COMMANDS", "DEBUG_VARIABLE", "TRAINER_COMMANDS", "main"]

PROGRAM = "lightning-stable"
DEBUG_VARIABLE = "LIGHTNING_STABLE_DEBUG"
TRAINER_COMMANDS = {
    "fit": "train from config files",
    "validate": "run the validation set",
    "test": "run the test set",
    "predict": "run the prediction set",
}
COMMANDS = {
    "run": "train a packaged recipe",
    "sweep": "run a grid of seeds, learning rates and precisions, and tell what diverges",
    "list": "list methods, recipes, addons, guides and scripts",
    "show": "print the card of a method, a guide, or a packaged config or script",
    "plot": "draw the stability gap of a run",
    "report": "write one page of a run, or of several beside each other",
    "export-adapter": "take trained adapters elsewhere, as LoRA for PEFT or merged into the model",
    "new": "start a project, or a package with a plugin of your own",
    "doctor": "tell what can run here, and why the rest cannot",
    **TRAINER_COMMANDS,
}
# Commands with a module of their own: `add_options(parser)` imports nothing heavy, `run(options)` gives the exit code.
_MODULES = {"report": "report", "export-adapter": "export_adapter", "new": "new", "doctor": "doctor"}
# What the commands that train import, by the names of the modules.
_NEEDED = (
    *("torch", "lightning", "torchmetrics", "lightning_utilities", "peft", "transformers", "huggingface_hub"),
    *("safetensors", "numpy", "omegaconf", "jsonargparse", "yaml", "rich", "jinja2"),
)

_EXAMPLES = f"""\
examples:
  {PROGRAM} run quickstart
  {PROGRAM} run lm_pretrain --trainer.max_steps 20
  {PROGRAM} fit --config mine.yaml --config addon:ema
  {PROGRAM} validate --config recipe:quickstart --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt
  {PROGRAM} sweep --config quickstart --lr 1e-3 1e-2 --precision 32-true e4m3 --seeds 3
  {PROGRAM} show wsd
  {PROGRAM} plot runs/stability_gap/version_0
  {PROGRAM} report runs/quickstart/version_0
  {PROGRAM} new my-project
  {PROGRAM} doctor
  {PROGRAM} export-adapter runs/lm_finetune_pissa/version_0/checkpoints/last.ckpt my_adapter
"""


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and whose options are written out in full."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})

    @override
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message[:1].upper()}{message[1:]}. See '{self.prog} --help'.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments after the program's name, ``sys.argv[1:]`` when not given.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 wrong use (command, name, option, config), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments, debug)
    except CommandError as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        if debug and error.details not in ("", str(error)):
            sys.stderr.write(f"The parser's own message:\n{error.details}\n")
        return 2
    except ModuleNotFoundError as error:
        # A package itself, not a part of it, which would be somebody's mistake.
        if debug or error.name not in _NEEDED:
            raise
        sys.stderr.write(
            f"{PROGRAM}: error: the package {error.name} is missing, and '{PROGRAM} {arguments[0]}' needs it. "
            f"'{PROGRAM} doctor' tells what is missing and how to install it.\n"
        )
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted\n")
        return 130
    except SystemExit as stop:
        # The host turns Ctrl-C into exit code 1, after its shutdown; shells expect 128 + SIGINT.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:
        # `lightning-stable list | head`: the reader has what it wanted. Python's own flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str], debug: bool) -> int:
    """Run the one command that the arguments name."""
    command = arguments[0] if arguments else ""
    if command in TRAINER_COMMANDS:
        return _train(arguments, debug)
    if command == "run" and not {"-h", "--help"}.intersection(arguments):
        return _run(arguments[1:], debug)
    if command and not command.startswith("-") and command not in COMMANDS:
        raise CommandError(f"There is no command {command!r}. {nearest(command, list(COMMANDS))}")
    parser = _parser()
    if not command:
        parser.print_help(sys.stderr)
        return 2
    if command == "sweep":
        from lightning_stable.cli.sweep import sweep

        return sweep(*parser.parse_known_args(arguments))
    options = parser.parse_args(arguments)
    if command in _MODULES:
        code = int(import_module(f"lightning_stable.cli.{_MODULES[command]}").run(options))
    else:
        code = _run_light(options)
    sys.stdout.flush()
    return code


def _run_light(options: argparse.Namespace) -> int:
    """Run a command that needs no torch."""
    if options.command == "plot":
        from lightning_stable.cli.plot import plot

        plot(options.source, options.output)
        return 0
    from lightning_stable.cli.catalogue import print_list, show

    if options.command == "show":
        show(options.name)
    else:
        print_list()
    return 0


def _run(arguments: list[str], debug: bool) -> int:
    """Train a packaged recipe; everything after its name goes on to ``fit``."""
    names = [template.name for template in list_templates("recipe")]
    if not arguments or arguments[0].startswith("-"):
        given = f", not {arguments[0]!r}" if arguments else ""
        raise CommandError(f"The name of a recipe comes first{given}: {PROGRAM} run NAME. Recipes: {', '.join(names)}.")
    name, *options = arguments
    if name not in names and name in {template.name for template in list_templates("addon")}:
        raise CommandError(
            f"{name!r} is an addon, not a recipe: add it by --config addon:{name}. Recipes: {', '.join(names)}."
        )
    if name not in names and Path(name).is_file():
        raise CommandError(f"{name!r} is a file, not a packaged recipe: use '{PROGRAM} fit --config {name}'.")
    find_template("recipe", name)
    return _train(["fit", "--config", f"recipe:{name}", *options], debug)


def _train(arguments: list[str], debug: bool) -> int:
    """Hand over to the host's command line; torch is imported from here on."""
    from lightning_stable.cli.training import train

    return train(arguments, debug=debug)


def _parser() -> _Parser:
    """Return the parser of the options that need no torch."""
    parser = _Parser(
        prog=PROGRAM,
        description="Stable training runs with PyTorch Lightning, from config files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {lightning_stable.__version__}")
    parser.add_argument(
        "--debug", action="store_true", help=f"print tracebacks in full (also by {DEBUG_VARIABLE}=1 in the environment)"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    run = commands.add_parser(
        "run",
        help=COMMANDS["run"],
        description="Train a packaged recipe: 'fit' with its config first and your options after it.",
        epilog="All options of a run: 'lightning-stable fit --help'. The numbers of a recipe: 'lightning-stable show "
        "NAME', or 'lightning-stable run NAME --print_config' for every setting.",
    )
    recipes = ", ".join(template.name for template in list_templates("recipe"))
    run.add_argument("name", metavar="NAME", help=f"the recipe: {recipes}")
    run.add_argument(
        "options",
        metavar="OPTION",
        nargs="*",
        help="options of fit, e.g. --vars.lr 0.01, --trainer.max_steps 20, --config mine.yaml, --config addon:ema",
    )
    from lightning_stable.cli._sweep_options import add_sweep_options

    add_sweep_options(
        commands.add_parser(
            "sweep",
            help=COMMANDS["sweep"],
            description="Train once for each seed, learning rate and precision, each run in a process of its own, and "
            "report the share that diverged.",
        )
    )
    commands.add_parser("list", help=COMMANDS["list"], description="List methods, recipes, addons, guides and scripts.")
    show = commands.add_parser(
        "show",
        help=COMMANDS["show"],
        description="Print the card of a method, a guide, the YAML of a recipe or an addon, or a script that starts a "
        "recipe on several machines.",
    )
    show.add_argument(
        "name",
        metavar="NAME",
        help="a method, guide, recipe, addon or script; addon:, recipe: or guide:NAME where a method has that name",
    )
    plot = commands.add_parser(
        "plot",
        help=COMMANDS["plot"],
        description="Print the table of a stability_gap.json, the file of the callback StabilityGap, and draw the "
        "score of each task over the steps.",
    )
    plot.add_argument(
        "source", metavar="PATH", help="the file, or the folder of its run or one above (then the newest)"
    )
    *first, last = PICTURE_FORMATS
    formats = f"{', '.join(first)} or {last}"
    plot.add_argument(
        "--output", metavar="FILE", help=f"the picture, as {formats}; by default stability_gap.png beside the file"
    )
    for command, module in _MODULES.items():
        import_module(f"lightning_stable.cli.{module}").add_options(
            commands.add_parser(command, help=COMMANDS[command])
        )
    for command, text in TRAINER_COMMANDS.items():
        commands.add_parser(command, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
