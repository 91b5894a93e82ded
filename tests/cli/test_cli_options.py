"""The commands and their options, frozen: a change of the command line is a change of ``options.txt``.

After a change that is meant: ``python tests/cli/test_cli_options.py``
"""

import argparse
from pathlib import Path

from lightning_stable.cli.main import TRAINER_COMMANDS, _parser

LISTING = Path(__file__).with_name("options.txt")

# What the host's own classes take, which is theirs to change.
_HOSTS = ("trainer", "model", "data", "optimizer", "lr_scheduler", "help", "print_shtab")


def listing() -> str:
    """Return a line for each command, and for each of its options with the values that it takes."""
    lines = ["lightning-stable", *_options(_parser())]
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in commands.choices.items():
        lines += ["", f"lightning-stable {name}"]
        lines += _own_options(name) if name in TRAINER_COMMANDS else _options(parser)
    return "\n".join(lines) + "\n"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    found = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
        several = f" {action.nargs}" if isinstance(action.nargs, str) else ""
        flag = " (flag)" if action.nargs == 0 else ""
        needed = " (required)" if action.required and action.option_strings else ""
        found.append(f"  {names}{choices}{several}{flag}{needed}")
    return found


def _own_options(command: str) -> list[str]:
    """Return the options of a command of the Trainer that are this package's or LightningCLI's."""
    from lightning_stable.cli.training import StableCLI

    class Parsers(StableCLI):
        def parse_arguments(self, parser, args):
            raise _Built(self._subcommand_parsers)

    if not _BUILT:
        try:
            Parsers([command])
        except _Built as built:
            _BUILT.update(built.args[0])
    found = [
        action.option_strings
        for action in _BUILT[command]._actions
        if action.option_strings and action.dest.partition(".")[0] not in _HOSTS
    ]
    return [f"  {', '.join(names)}" for names in found]


class _Built(Exception):
    """Carries the parsers out of the constructor."""


_BUILT: dict = {}


def test_the_commands_and_their_options_are_frozen():
    assert listing() == LISTING.read_text(encoding="utf-8"), "if it is meant: python tests/cli/test_cli_options.py"


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
