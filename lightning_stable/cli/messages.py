"""One clear message for each way a config can be wrong, from the long ones of the parsers below."""

import difflib
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import FrameType, TracebackType

from lightning_stable.cli._sweep_precision import is_simulated_format
from lightning_stable.cli.values import explain_value, inner_problem
from lightning_stable.registry import methods

__all__ = ["explain_interpolation", "explain_parsing", "is_bad_input", "near_path", "root_error"]

_UNKNOWN_KEY = re.compile(r"does not accept option '(?P<key>[^']+)'|unrecognized arguments: --(?P<argument>[\w.]+)")
_CLASS_PROBLEM = re.compile(
    r'Parser key "(?P<key>[^"]+)".*?Problem with given class_path \'(?P<path>[^\']+)\':', re.DOTALL
)
_OPTION = re.compile(r"Option '(?P<option>[^']+)' is not accepted")
_NO_CLASS = re.compile(
    r'Parser key "(?P<key>[^"]+)".*(?:Expected a dot import path string: |Import path )\'?(?P<name>[^\s\']+)',
    re.DOTALL,
)
_REQUIRED = re.compile(r"arguments are required: (?:\w+\.)?(?P<key>.+)")
_NO_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")
_NO_MODULE = re.compile(r"No module named '(?P<module>[\w.]+)\.(?P<name>\w+)'")
_NO_TOP_MODULE = re.compile(r"No module named '(?P<name>\w+)'")
_PRECISION = re.compile(r"trainer\.precision: expected .*, got (?P<given>\S+)\.", re.DOTALL)
_RESOLVED = re.compile(r"resolved to '(?:fit|validate|test|predict)\.(?P<key>[^']+)'")

_PARSER = "jsonargparse."
# Where an exception about a bad value is raised on purpose, with a message made for the user.
_TRUSTED = ("lightning_stable.", "lightning.", _PARSER, "torch.optim.")
# Who says by such a message which package to install.
_OF_PACKAGES = ("lightning_stable.", "lightning.")


def explain_parsing(message: str, command: str, known: list[str]) -> str:
    """Shorten a message of the parser to what is wrong and what to do.

    Args:
        message: What the parser says.
        command: The sub-command, for the hint on its help.
        known: The option names that the sub-command has.

    Returns:
        One line where the kind of message is known, else the message as it is.
    """
    help_text = f"lightning-stable {command} --help"
    if found := _UNKNOWN_KEY.search(message):
        key = found["key"] or found["argument"]
        if key.rpartition(".")[2] == "extends":
            return "extends has to stand once, on a line of its own at the left margin, as in 'extends: lm_pretrain'."
        return f"Unknown key {key!r}. {_suggest(key, known, f'All keys: {help_text}')}"
    in_class, no_class = _CLASS_PROBLEM.search(message), _NO_CLASS.search(message)
    if (in_class or not no_class) and (value := explain_value(message)):
        return _explain_format(value) or value
    if found := in_class:
        problem = inner_problem(message)
        option = _OPTION.search(problem)
        if option:
            options = _options(found["path"])
            listing = f"Its options: {', '.join(options)}" if options else f"See --{found['key']}.help {found['path']}"
            hint = _suggest(option["option"], options, listing)
            return f"{found['key']}: the class {found['path']} has no option {option['option']!r}. {hint}"
        near = _near_import(problem, found["path"])
        return f"{found['key']}: problem with the class {found['path']}: {' '.join(problem.split())}{near}"
    if found := no_class:
        named = next((method.class_name for method in methods() if method.name == found["name"].rstrip(".,")), None)
        if named:
            return (
                f"{found['key']}: {named} goes by the name {found['name']!r} where no options follow. With options, or "
                f"as a class_path, write {named}."
            )
        name = found["name"].rstrip(".,")
        near = f"{_near(difflib.get_close_matches(name, [method.class_name for method in methods()]))} ".lstrip()
        return (
            f"{found['key']}: there is no class {name!r}. {near}Give its full path, as in package.module.Class; "
            "the methods of 'lightning-stable list' go by their bare class names."
        )
    if found := _REQUIRED.search(message):
        return f"{found['key']} is not set. Give a config by --config FILE, or see {help_text}."
    return (
        message.replace('Parser key "', f"{command} --", 1).replace('":', ":", 1)
        if 'Parser key "' in message
        else message
    )


def _explain_format(value: str) -> str | None:
    """Return how to simulate a format that was given as a precision; ``None`` if it was none."""
    found = _PRECISION.fullmatch(value)
    if found is None or not is_simulated_format(found["given"]):
        return None
    name = found["given"]
    return (
        f"trainer.precision: {name} is no precision of the Trainer, but it can be simulated: --config addon:simulated "
        f"--vars.simulated_weights {name} --vars.simulated_activations {name} --vars.simulated_gradients {name}"
    )


def explain_interpolation(message: str, full_key: str | None) -> str:
    """Shorten a message about a ``${...}`` that cannot be filled in.

    Args:
        message: What the resolver says.
        full_key: The key that holds the reference, as the resolver writes it.
    """
    holder = (full_key or "").partition(".")[2] or "The config"
    if found := _RESOLVED.search(message):
        name = found["key"]
        cure = f"by --{name} VALUE or under '{name.partition('.')[0]}:' in a config" if "." in name else "in a config"
        return f"{holder} refers to ${{{name}}}, which is not defined. Define it {cure}."
    return f"{holder}: {message.splitlines()[0]}"


def is_bad_input(error: BaseException) -> bool:
    """Return whether an exception says all in its message, so that its traceback would only hide it.

    True for errors about values and settings that this package, the host or an optimizer raised, for those about a
    package that they say is missing or too old, and for those about another process of the run, which tells its own
    reason; an error of the same type from anywhere else may be a bug, and is shown in full.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_stable.strategies._workers import LostWorkerError

    if isinstance(error, ImportError):
        # Python's own name the module; one without a name was raised on purpose.
        return error.name is None and _raised_in(error).startswith(_OF_PACKAGES)
    if not isinstance(error, (ValueError, FileNotFoundError, MisconfigurationException, LostWorkerError)):
        return False
    if isinstance(error, LostWorkerError) and error.__cause__ is not None and error.__cause__.__context__ is not None:
        return False  # it came up while an error of this process was dealt with, which is the one to show
    return _raised_in(error).startswith(_TRUSTED)


def root_error(error: Exception) -> Exception:
    """Return the exception of a class's constructor, out of what the parser wraps around it."""
    found = _of_a_class(error)
    while found is None and isinstance(inner := error.__cause__, Exception) and _is_of_the_parser(error):
        error = inner
    return found or error


def _of_a_class(error: BaseException | None) -> Exception | None:
    """Return the first exception within this one that is not of the parser; ``None`` if there is none.

    Where several types may stand the parser tries one after the other, and names as the cause what the first one said,
    which need not be the class. In a list there are such trials within each other.
    """
    if not isinstance(error, Exception):
        return None
    if not _is_of_the_parser(error):
        return error
    frame = _raising_frame(error)
    tried = frame.f_locals.get("exceptions") if frame is not None else None
    within = [*tried, error.__cause__] if isinstance(tried, list) else [error.__cause__]
    return next((found for each in within if (found := _of_a_class(each)) is not None), None)


def _is_of_the_parser(error: BaseException) -> bool:
    return _raised_in(error).startswith(_PARSER)


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an exception."""
    frame = _raising_frame(error)
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _raising_frame(error: BaseException) -> FrameType | None:
    """Return the frame that an exception was raised in."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame


def near_path(module: str, name: str) -> str:
    """Return a sentence with the names of a module or package that are near to one which it has not; or nothing.

    Args:
        module: The module's full name.
        name: What was looked for in it.
    """
    try:
        place = importlib.import_module(module)
    except ImportError:
        return ""
    names = [each for each in dir(place) if not each.startswith("_")]
    names += [each.name for each in pkgutil.iter_modules(getattr(place, "__path__", []))]
    return _near([f"{module}.{each}" for each in difflib.get_close_matches(name, sorted(set(names)), n=3, cutoff=0.6)])


def _near_import(problem: str, path: str) -> str:
    """Return what is near to a class or module that a problem says is not there; nothing where it says none.

    Args:
        problem: What the parser says.
        path: The full path of the class that was given.
    """
    first, _, rest = path.partition(".")
    if (found := _NO_TOP_MODULE.search(problem)) and found["name"] == first:
        return f". {_place_of_module(first, rest)}"
    found = _NO_ATTRIBUTE.search(problem) or _NO_MODULE.search(problem)
    near = near_path(found["module"], found["name"]) if found else ""
    return f". {near}" if near else ""


def _place_of_module(name: str, rest: str) -> str:
    """Return where a module is looked for that was not found, and the near ones that are there."""
    here = [path.stem for path in Path.cwd().glob("*.py")]
    here += [path.parent.name for path in Path.cwd().glob("*/*.py")]
    near = difflib.get_close_matches(name, sorted(set(here)), n=3, cutoff=0.6)
    place = f"{name} has to be importable from where you start: as {name}.py in the current folder, or installed."
    return f"{place} {_near([f'{each}.{rest}' for each in near])}".rstrip()


def _suggest(name: str, candidates: list[str], otherwise: str) -> str:
    """Return the near names, else a fallback."""
    return _near(difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)) or f"{otherwise}."


def _near(names: list[str]) -> str:
    return f"Did you mean {' or '.join(map(repr, names))}?" if names else ""


def _options(class_path: str) -> list[str]:
    """Return the names of a class's own options, none where they cannot be read."""
    module, _, name = class_path.rpartition(".")
    try:
        signature = inspect.signature(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in signature.parameters.values() if parameter.kind in named]
