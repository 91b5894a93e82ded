"""``lightning-stable fit|validate|test|predict``: LightningCLI with packaged templates and free variables.

These are added to the host's command line:

* ``--config addon:NAME`` and ``--config recipe:NAME`` name packaged templates. An addon is read after all files,
  wherever it is given. Its ``vars`` are defaults: what a file or an earlier option has set stays. A config may begin
  with a recipe by ``extends: NAME``.
* ``vars`` holds free variables that any key may use, as in ``lr: ${vars.lr}``, also across files. References are
  filled in after all files and options are merged, so they follow later overrides (``--vars.lr 0.01``).
* ``${share:TOTAL,0.25}`` and ``${shares:TOTAL,0.25,0.5}`` are whole numbers of steps, so that a template's intervals
  follow ``--trainer.max_steps``. ``${interval:TOTAL,0.05}`` is a share that divides the total, and
  ``${marks:TOTAL,INTERVAL,0.25,0.5}`` are shares that are multiples of an interval. ``${product:A,B}`` multiplies.
* A variable that is set and that nothing refers to is an error.
* What a run takes once and two configs bring, such as two strategies, is an error that names both.
* Wrong keys and values give one message instead of a traceback. Options are written out in full.
"""

import contextlib
import logging
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import jsonargparse
import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # exported, but by a computed __all__
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from lightning_stable._extensions import load_classes
from lightning_stable.cli._configs import addons_last, read_configs
from lightning_stable.cli._conflicts import refuse_conflicts, settle_precision
from lightning_stable.cli._variables import check_variables
from lightning_stable.cli.locate import CommandError
from lightning_stable.cli.messages import explain_interpolation, explain_parsing, is_bad_input, near_path, root_error
from lightning_stable.cli.summary import print_interrupted, print_summary, warn_if_untrained
from lightning_stable.registry import methods, nearest

__all__ = ["DEFAULT_SEED", "StableCLI", "interval", "marks", "product", "share", "shares", "train"]

DEFAULT_SEED = 0

# How long the other processes of a run that is over may take to end.
_SECONDS_TO_END = 300

_REMARKS = ("torchao", "torch.utils._pytree")


def share(total: int | None, fraction: float) -> int:
    """Return a share of ``total`` steps, at least one step."""
    return max(1, int((total or 0) * fraction))


def shares(total: int | None, *fractions: float) -> list[int] | None:
    """Return increasing shares of ``total`` steps below it, or ``None`` where the total is not known (unset or -1)."""
    steps = sorted({int((total or 0) * fraction) for fraction in fractions})
    return [step for step in steps if 0 < step < (total or 0)] or None


def interval(total: int | None, fraction: float) -> int:
    """Return a number of steps that divides ``total`` and is near that share of it, so that one ends with the run.

    It is within a factor of two of the share; where no divisor is, as for a prime, it is the share itself.
    """
    wanted = share(total, fraction)
    divisors = [step for step in range((wanted + 1) // 2, 2 * wanted + 1) if (total or 0) % step == 0]
    return min(divisors, key=lambda step: max(step / wanted, wanted / step), default=wanted)


def marks(total: int | None, every: Any, *fractions: float) -> list[int] | None:
    """Return increasing shares of ``total`` steps, each at the nearest multiple of ``every`` that is below the total.

    Where ``every`` is no whole number of steps (a share of an epoch, a time), they are plain :func:`shares`.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1 or (total or 0) <= 0:
        return shares(total, *fractions)
    steps = {max(1, round((total or 0) * fraction / every)) * every for fraction in fractions}
    return [step for step in sorted(steps) if step < (total or 0)] or None


def product(*factors: Any) -> int:
    """Return the product of whole numbers.

    Raises:
        ValueError: If one is none.
    """
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, int):
            raise ValueError(f"{factor!r} is no whole number, and this is a product of such.")  # noqa: TRY004  of a config
    return math.prod(factors)


class StableParser(LightningArgumentParser):
    """The host's parser; its errors are raised, to be explained and printed in one place."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise CommandError(message) from ex


class TemplateConfig(ActionConfigFile):
    """``--config``: a file, ``addon:NAME`` or ``recipe:NAME``; the ``vars`` of several are merged."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        for config in read_configs(values):
            config.check()
            before = dict(cfg.get("vars") or {})
            super().__call__(parser, cfg, config.value, option_string)  # type: ignore[no-untyped-call]
            given = dict(cfg.get("vars") or {})
            cfg["vars"] = {**given, **before} if config.is_addon else {**before, **given}


class StableCLI(LightningCLI):
    """LightningCLI in subclass mode for model and data, with late interpolation across files.

    Args:
        args: Arguments as on the command line, beginning with the sub-command.
        **kwargs: Further arguments of LightningCLI, such as ``run=False``.

    Raises:
        CommandError: If an option, a key or a reference is wrong.
    """

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        _register_resolvers()
        load_classes()  # an imported class goes by its bare name in configs, a strategy by its own name too
        self._arguments: list[str] = []
        super().__init__(
            args=args,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=DEFAULT_SEED,
            parser_class=StableParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-stable"},
            **kwargs,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # A shortened name would be another option's as soon as the host has one more of them.
        parser = StableParser(allow_abbrev=False, **kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=TemplateConfig,
            help="A YAML file, addon:NAME or recipe:NAME ('lightning-stable list'); repeatable, later ones win, and "
            "addons come after all files.",
        )
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--vars", type=dict[str, Any], default={}, help="Free variables, used elsewhere as ${vars.NAME}."
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Not the host's: it warns about arguments given beside sys.argv, which `run NAME` does on purpose.
        try:
            self._arguments = addons_last(cast("list[str]", args))
            self.config = parser.parse_args(self._arguments)
            self._say(check_variables(self._arguments))
        except CommandError as error:
            raise CommandError(self._explain(str(error), args), details=str(error)) from error.__cause__
        except OmegaConfBaseException as error:
            raise CommandError(explain_interpolation(str(error), error.full_key)) from error

    @staticmethod
    @override
    def configure_optimizers(lightning_module: LightningModule, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """Return what the options say, with parameters that the module has only got since, such as those of adapters.

        The host makes the optimizer before the run begins.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in held for parameter in lightning_module.parameters()):
            (group,) = optimizer.param_groups
            group["params"] = [parameter for parameter in lightning_module.parameters() if parameter.requires_grad]
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        if isinstance(trainer.strategy, str):
            trainer.strategy = _strategy_name(trainer.strategy)
        self._say(settle_precision(self._arguments, trainer))
        refuse_conflicts(self._arguments, trainer, self._get(self.config, "lr_scheduler"))

    def fit(self, **given: Any) -> None:
        """Run the Trainer's ``fit``; where Ctrl-C ends it, say how to go on."""
        started = time.time()
        try:
            self.trainer.fit(**given)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt) and self.trainer.is_global_zero:
                print_interrupted(self.trainer, started)
            raise

    def after_fit(self) -> None:
        """Say what came out and where it is, once, on the first process."""
        folder = self.trainer.log_dir  # asks the other processes: all of them have to come by
        if self.trainer.is_global_zero and folder is not None:
            warn_if_untrained(self.trainer)
            print_summary(self.trainer, Path(folder))

    @staticmethod
    def _say(told: str) -> None:
        """Print a line about the configs, if there is one, on the first process."""
        if told:
            rank_zero_info(f"lightning-stable: {told}")

    def _explain(self, message: str, args: ArgsType) -> str:
        """Return the parser's message in short, with the names that were near."""
        command = args[0] if isinstance(args, list) and args else ""
        parsers = getattr(self, "_subcommand_parsers", {})  # there are none with run=False
        if command not in parsers:
            return message
        known = [action.dest for action in parsers[command]._actions]
        return explain_parsing(message, command, known)


def _strategy_name(given: str) -> str:
    """Return the registered name of a strategy that is given by its name or, without options, by its bare class.

    Raises:
        CommandError: If there is none; the message suggests the near ones.
    """
    classes = {method.class_name: method.name for method in methods() if method.kind == "strategy"}
    name = classes.get(given, given)
    known = ["auto", *StrategyRegistry.available_strategies()]
    if name.lower() not in known:
        module, _, last = given.rpartition(".")
        near = (module and near_path(module, last)) or nearest(given.lower(), known)
        raise CommandError(
            f"trainer.strategy: there is no strategy {given!r}. {near} A class of your own "
            "goes by its full path, as in package.module.Class."
        )
    return name


def _register_resolvers() -> None:
    """Make the functions of step counts known to the interpolation."""
    with warnings.catch_warnings():
        # Its name until 2.3; 2.4 deprecates that for a name that means something else in 2.3.
        warnings.simplefilter("ignore")
        for resolver in (share, shares, interval, marks, product):
            OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)


def train(args: list[str], *, debug: bool = False) -> int:
    """Run one of the Trainer's sub-commands.

    Args:
        args: The sub-command and its options.
        debug: Let every exception through, with its traceback.

    Returns:
        The exit code: 0, or 1 after an error that was printed, or if another process of the run failed.

    Raises:
        CommandError: If an option, a key or a reference is wrong.
    """
    here = str(Path.cwd())
    if here not in sys.path:  # a console script has its own directory there, not the user's
        sys.path.insert(0, here)
    with warnings.catch_warnings(), _without_remarks():
        # The host calls a name that torch deprecates; nothing in a user's run causes or cures it.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # An optimizer in a config is asked for, in place of the module's own.
        warnings.filterwarnings("ignore", message=".*configure_optimizers` will be overridden by.*")
        try:
            return _failed_processes(StableCLI(_with_torch_names(args)).trainer)
        except CommandError:
            raise
        except Exception as error:
            root = root_error(error)
            if debug or (root is error and not is_bad_input(error)):
                raise
            if not is_bad_input(root):
                raise root from None
            # Each process of a run has its own reason to fail, and says it; the same one is told apart by its rank.
            rank = getattr(rank_zero_only, "rank", 0)
            place = f" on rank {rank}" if rank else ""
            sys.stderr.write(f"lightning-stable: error{place}: {root} (The traceback: --debug.)\n")
            return 1


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep libraries from telling what the user has no part in, while they are imported and while a command runs.

    torchao names the kernels that it has none of for this machine, and torch a name that torchao should not use; both
    also where a run takes nothing from torchao. What the user has set a level for, such as by TORCH_LOGS, stays.
    """
    loggers = [logging.getLogger(name) for name in _REMARKS]
    raised = [logger for logger in loggers if logger.level == logging.NOTSET]
    for logger in raised:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger in raised:
            logger.setLevel(logging.NOTSET)


def _with_torch_names(args: list[str]) -> list[str]:
    """Let ``--optimizer SGD`` and ``--lr_scheduler StepLR`` be torch's.

    A bare name is that of any class which is imported. Libraries that a plugin imports, such as bitsandbytes by way of
    peft, have optimizers of the same names, and two are none.
    """
    rooms = {"--optimizer": torch.optim, "--lr_scheduler": torch.optim.lr_scheduler}
    found = list(args)
    for place, argument in enumerate(args):
        option, equals, name = argument.partition("=")
        if option in rooms and not equals:
            name, place = args[place + 1] if place + 1 < len(args) else "", place + 1
        if option in rooms and isinstance(getattr(rooms[option], name, None), type):
            found[place] = f"{option}=" * bool(equals) + f"{rooms[option].__name__}.{name}"
    return found


def _failed_processes(trainer: Trainer) -> int:
    """Wait until the processes that the host started beside this one are over; return 1 if one of them failed.

    The host does not wait: a run whose last rank fails at the very end would count as done.
    """
    launcher: Any = trainer.strategy.launcher
    started = [process for process in getattr(launcher, "procs", []) if isinstance(process, subprocess.Popen)]
    failed = 0
    for rank, process in enumerate(started, 1):
        try:
            code = process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            sys.stderr.write(f"lightning-stable: error: the process of rank {rank} ended with exit code {code}.\n")
            failed = 1
    return failed
