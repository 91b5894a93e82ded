"""Methods that other installed distributions add, found by their entry points without importing torch.

The value of an entry point of the group :data:`GROUP` is a row (:class:`~lightning_stable.registry.Method`) or a
sequence of rows. What is wrong with one is told on stderr, once, and stops nothing else.
"""

import contextlib
import functools
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lightning_stable.registry import METHODS, Kind, Method, load_class

__all__ = ["GROUP", "NAME", "PAGES", "Extension", "extensions", "host_classes", "load_classes"]

GROUP = "lightning_stable.methods"
"""The group of entry points by which other distributions add methods."""

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
"""What the name of a method, or of an addon, looks like."""

PAGES = frozenset(
    (
        *("continual", "doctor", "export_adapter", "extend", "faq", "finetune", "low_bits", "migrate", "pretrain"),
        *("recipes", "slow_links", "start", "sweep", "task_stream"),
        *("co2_multi_node", "co2_two_processes", "continual_finetune", "image_classification"),
        *("image_classification_ddp", "lm_finetune_eva", "lm_finetune_loldu", "lm_finetune_lora_ga"),
        *("lm_finetune_pissa", "lm_finetune_pissa_ddp", "lm_finetune_svfit", "lm_int4_stable_spam", "lm_pretrain"),
        *("lm_pretrain_ddp", "lm_pretrain_float8", "lm_pretrain_fsdp2", "lowbit_digits", "quickstart", "stability_gap"),
    )
)
"""The guides and recipes: ``show`` finds them by their names, as it does methods. (The name of a script has a dot.)"""

_OURS = "lightning-stable"
# Where the host has the classes that configs give by their bare names.
_HOST_ROOMS = ("callbacks", "strategies", "plugins")
_HOST_CLASS = re.compile(r"^class ([A-Za-z]\w*)", re.MULTILINE)
# What a stranger's module may raise at import. Ctrl-C still ends everything.
_FAILURES = (Exception, SystemExit)


class Extension(NamedTuple):
    """The methods that one entry point of another distribution adds.

    Attributes:
        distribution: Name and version of the distribution, as in ``"my-plugin 0.1.0"``.
        folder: Where its cards (``cards/NAME.md``) and addons (``templates/addons/NAME.yaml``) lie: the folder of the
            module that the entry point names.
        methods: Its rows.
    """

    distribution: str
    folder: Path
    methods: tuple[Method, ...]


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """Return what installed distributions add, in the order of their names.

    What cannot be loaded, is no row, or has a name that is taken, is told on stderr and left out.
    """
    found: list[Extension] = []
    points = [(_distribution(point), point) for point in entry_points(group=GROUP)]
    taken = _taken() if points else {}
    for distribution, point in sorted(points, key=lambda pair: (pair[0], pair[1].name)):
        try:
            # What it prints must not get into the output of a command, which may be JSON.
            with contextlib.redirect_stdout(sys.stderr):
                value = point.load()
            folder = Path(str(sys.modules[point.module].__file__)).resolve().parent
            rows = _accept(value, distribution, point.value, taken)
        except _FAILURES as error:
            _tell(f"the methods of {distribution} ({point.value}) cannot be loaded: {type(error).__name__}: {error}")
            continue
        if rows:
            found.append(Extension(distribution, folder, rows))
    return tuple(found)


@functools.cache
def host_classes() -> frozenset[str]:
    """Return the names of the classes that a plugin's cannot have, or the host's would go by its full path alone.

    They are read from the files of the host, of whatever version it is: importing it takes seconds.
    """
    try:
        host = Path(str(getattr(find_spec("lightning"), "origin", ""))).parent / "pytorch"
        files = [*host.glob("cli.py"), *(file for room in _HOST_ROOMS for file in (host / room).rglob("*.py"))]
        texts = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, ValueError):  # without the host, or with another thing in its place, nothing of it is taken
        return frozenset()
    return frozenset(name for text in texts for name in _HOST_CLASS.findall(text))


def load_classes() -> None:
    """Import the class of every part of a Trainer, so that configs may give it by its bare name.

    Configs of PEFT are no such part; to import them takes seconds, for PEFT comes with them.
    One of another distribution that cannot be imported is told on stderr, once, and left out.
    """
    for method in METHODS:
        if not method.class_name.endswith("Config"):
            load_class(method)
    for extension in extensions():
        for method in extension.methods:
            _load_foreign(method, extension.distribution)


def _distribution(point: EntryPoint) -> str:
    """Return the name and the version of what an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown distribution"


def _accept(value: Any, distribution: str, source: str, taken: dict[str, str]) -> tuple[Method, ...]:
    """Return the rows of an entry point that can be used, tell of the others, and note the names that they take."""
    rows: list[Method] = []
    for row in value if isinstance(value, (tuple, list)) and not isinstance(value, Method) else [value]:
        problem = _shape(row) or _collision(row, taken)
        if problem:
            _tell(f"a method of {distribution} ({source}) is left out: {problem}")
            continue
        rows.append(row)
        taken.update(dict.fromkeys(_names(row), f"a method of {distribution}"))
    return tuple(rows)


def _shape(row: Any) -> str:
    """Return in what a row is none, or nothing."""
    if not isinstance(row, Method):
        return f"expected a lightning_stable.registry.Method, got {row!r}."
    problem = _types(row)
    if problem:
        return problem
    if not NAME.fullmatch(row.name):
        return f"its name {row.name!r} has to be lower case letters, digits and underscores."
    if row.kind not in get_args(Kind):
        return f"{row.name!r} has the kind {row.kind!r}, which is none of {', '.join(get_args(Kind))}."
    parts = row.class_path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return f"{row.name!r} has the class_path {row.class_path!r}, which is not of the form package.module.Class."
    return ""


def _types(row: Method) -> str:
    """Return which field of a row is not of its type, or nothing."""
    for field, value in row._asdict().items():
        if field in ("addons", "relatives"):
            good = isinstance(value, tuple) and all(isinstance(name, str) and name.isidentifier() for name in value)
            expected = "a tuple of names"
        else:
            good = isinstance(value, str) and len(value.splitlines()) <= 1
            expected = "one line of text"
        if not good:
            return f"the {field} of {row.name!r} has to be {expected}, got {value!r}."
    return ""


def _collision(row: Method, taken: dict[str, str]) -> str:
    """Return which name of a row is taken, and by whom, or nothing."""
    for name in _names(row):
        if name in taken:
            kind = "class name" if name in (row.class_name, *row.relatives) else "name"
            return f"the {kind} {name!r} is taken by {taken[name]}. Give another one."
    return ""


def _taken() -> dict[str, str]:
    """Return the names that are taken before any distribution is asked, and by what."""
    return {
        **dict.fromkeys(host_classes(), "a class of lightning, which configs give by that name"),
        **dict.fromkeys(PAGES, f"a guide or recipe of {_OURS}"),
        **{name: f"a method of {_OURS}" for method in METHODS for name in _names(method)},
    }


def _names(method: Method) -> list[str]:
    """Return the names that a method takes: its own, its addons', and those of its public classes."""
    return [method.name, *method.addons, method.class_name, *method.relatives]


@functools.cache
def _load_foreign(method: Method, distribution: str) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            load_class(method)
    except _FAILURES as error:
        _tell(f"{method.class_path} of {distribution} cannot be imported: {type(error).__name__}: {error}")


def _tell(problem: str) -> None:
    sys.stderr.write(f"{_OURS}: warning: {' '.join(problem.split())}\n")
