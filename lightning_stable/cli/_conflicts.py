"""What a run takes once and was given twice: strategies, precisions, schedules, averages, or any one plugin.

Configs are merged key by key, so without this the strategy of one addon would take the place of another's without a
word. An addon takes no other config's place, and is read after all files. An option that comes later takes its place,
and a file that of earlier files: there the user has chosen.
A class is told by its full path, so one of the user's may have the name of one of ours.
"""

import importlib
import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from lightning_stable.cli._configs import Config, walk_arguments
from lightning_stable.cli._sweep_precision import left_out
from lightning_stable.cli.locate import CommandError
from lightning_stable.registry import methods

__all__ = ["refuse_conflicts", "settle_precision"]

_SCHEDULE = "lightning_stable.callbacks.wsd.WarmupStableDecay"
_HOST = "lightning.pytorch.callbacks"
_AVERAGES = (
    "lightning_stable.callbacks.ema.EMA",
    "lightning_stable.callbacks.balanced_ema.BalancedEMA",
    f"{_HOST}.stochastic_weight_avg.StochasticWeightAveraging",
    f"{_HOST}.weight_averaging.WeightAveraging",
    f"{_HOST}.weight_averaging.EMAWeightAveraging",
)
_PLAIN_CLASSES = ("lightning.pytorch.strategies.ddp.DDPStrategy",)


class _Part(NamedTuple):
    """A class that a run was given.

    Attributes:
        path: Its full path where it has one, else its name.
        source: The config or option that brought it.
        is_addon: Whether that is an addon.
        place: Which of the configs and options of the command line that is, counted from 0.
    """

    path: str
    source: str
    is_addon: bool
    place: int

    @property
    def name(self) -> str:
        """Its bare name."""
        return _bare(self.path)

    @property
    def is_plain(self) -> bool:
        """Whether any strategy may take its place: plain DDP, or none; nobody has chosen it for what it does."""
        return self.path in ("", "auto", "ddp", *_PLAIN_CLASSES) or self.path.startswith("ddp_")


def refuse_conflicts(arguments: Sequence[str], trainer: Any, lr_scheduler: Any = None) -> None:
    """Raise if a run was given twice what it takes once.

    Args:
        arguments: The command line in the order in which it is read, which tells who brought what.
        trainer: What the merged config says of the Trainer.
        lr_scheduler: What it says of the scheduler.

    Raises:
        CommandError: The message names both.
    """
    walked = list(walk_arguments(arguments))
    _check_strategies(_given(walked, "strategy"))
    _check_callbacks(_paths(trainer.callbacks), _given(walked, "callbacks"))
    _check_schedules(_paths(trainer.callbacks), _given(walked, "callbacks"), lr_scheduler)
    _check_precisions(trainer, _given(walked, "plugins"), _given(walked, "precision"))


def settle_precision(arguments: Sequence[str], trainer: Any) -> str:
    """Drop the precision plugins of a run whose ``trainer.precision`` was given after them.

    With them go the callbacks that need what they simulate, as in a sweep.

    Args:
        arguments: The command line in the order in which it is read, which tells what came after what.
        trainer: What the merged config says of the Trainer; its ``plugins`` and ``callbacks`` are changed.

    Returns:
        One sentence that tells what was dropped; nothing where nothing was.
    """
    walked = list(walk_arguments(arguments))
    settings = [part for part in _given(walked, "precision") if part.path and not part.is_addon]
    dropped = [part for part in _listed(trainer.plugins) if _is_precision(_path(part))]
    paths = [_path(part) for part in dropped]
    brought = [part for part in _given(walked, "plugins") if part.path in paths]
    if trainer.precision is None or not settings or not brought or settings[-1].place <= brought[-1].place:
        return ""
    trainer.plugins = [part for part in _listed(trainer.plugins) if part not in dropped] or None
    callbacks = _listed(trainer.callbacks)
    needing = [part for part in callbacks if left_out(str(trainer.precision), [_plain(part)])]
    if needing:
        trainer.callbacks = [part for part in callbacks if part not in needing] or None
    without = f", and of {' and '.join(_bare(_path(part)) for part in needing)} with it" if needing else ""
    source = settings[-1].source
    given = source if source.startswith("--") else f"trainer.precision {trainer.precision} ({source})"
    return (
        f"{given} comes last and takes the place of "
        f"{' and '.join(map(_bare, paths))} ({_sources(paths, brought)}){without}. "
        f"To have both: {_both(str(trainer.precision), brought[-1])}"
    )


def _check_strategies(given: Iterable[_Part]) -> None:
    """Raise if an addon took the place of another strategy, and nothing later took its place."""
    before = clash = None
    for part in given:
        clash = (before, part) if part.is_addon and before is not None else None
        before = None if part.is_plain else part
    if clash is None:
        return
    first, second = clash
    raise CommandError(
        f"{first.source} and {second.source} both set trainer.strategy ({first.name} and {second.name}), and a run has "
        f"one. Leave one of them out, or choose by an option at the end, as in --trainer.strategy {second.name}."
    )


def _check_callbacks(present: list[str], given: list[_Part]) -> None:
    """Raise if a method is there twice, or two averages of the weights are."""
    for path, count in Counter(present).items():
        if count > 1 and path in _ours(_bare(path)):
            raise CommandError(
                f"{_bring([path], given)} {_bare(path)} ({count} times in trainer.callbacks), and a run takes one. "
                f"{_cure([path], given)}"
            )
    averages = [path for path in _AVERAGES if path in present]
    if len(averages) > 1:
        raise CommandError(
            f"{_bring(averages, given)} {' and '.join(map(_bare, averages))}, and a run takes one average of the "
            f"weights. {_cure(averages, given)}"
        )


def _check_schedules(present: list[str], given: list[_Part], lr_scheduler: Any) -> None:
    """Raise if a callback and a scheduler would both set the learning rate."""
    other = _bare(_path(lr_scheduler))
    if _SCHEDULE in present and other:
        raise CommandError(
            f"lr_scheduler is {other}, and {_sources([_SCHEDULE], given) or 'trainer.callbacks'} brings "
            f"{_bare(_SCHEDULE)}: both would set the learning rate. Leave one of them out."
        )


def _check_precisions(trainer: Any, plugins: list[_Part], settings: list[_Part]) -> None:
    """Raise if there are two precision plugins, or one beside ``trainer.precision``."""
    present = [path for path in _paths(trainer.plugins) if _is_precision(path)]
    if len(present) > 1:
        raise CommandError(
            f"{_bring(present, plugins)} {' and '.join(map(_bare, present))} (trainer.plugins), and a run takes one "
            f"precision. {_cure(present, plugins)}"
        )
    if present and trainer.precision is not None:
        chosen, name = str(trainer.precision), _bare(present[0])
        source = next((f" ({part.source})" for part in reversed(settings) if not part.source.startswith("--")), "")
        brought = next((part for part in plugins if part.path == present[0]), None)
        raise CommandError(
            f"trainer.precision is {chosen}{source}, and {_sources(present, plugins) or 'trainer.plugins'} brings "
            f"{name}, which takes its place. Leave one of them out, or end the command with --trainer.precision "
            f"{chosen} to do without {name}; for {name} with the rest in {chosen}: {_both(chosen, brought)}"
        )


def _both(precision: str, plugin: _Part | None) -> str:
    """Return what gives a precision plugin, and lets the rest compute in a precision."""
    if plugin is not None and plugin.is_addon:
        return f"--trainer.precision null --vars.{plugin.source.partition(':')[2]}_compute {precision}"
    name = plugin.name if plugin is not None else "the plugin"
    return f"--trainer.precision null, and compute: {precision} among the settings of {name} in a config of yours."


# ---------------------------------------------------------------------------- who brought what


def _given(walked: Iterable[Config | tuple[str, str]], key: str) -> list[_Part]:
    """Return what each config and option gives under a key of the Trainer, in order."""
    found: list[_Part] = []
    for place, each in enumerate(walked):
        if isinstance(each, Config):
            trainer, source, is_addon = each.trainer, each.name, each.is_addon
        elif each[0].rstrip("+") == f"--trainer.{key}":
            trainer, source, is_addon = {each[0].removeprefix("--trainer."): _value(each[1])}, " ".join(each), False
        else:
            continue
        parts = [*_listed(trainer.get(key)), *_listed(trainer.get(f"{key}+"))]
        paths = [_path(part) for part in parts] or ([""] if key in trainer else [])  # null is a choice, too
        # Of strategies all are of interest: who was there before whom.
        replaced = key in trainer and key != "strategy"
        found = [*(found if not replaced else []), *(_Part(path, source, is_addon, place) for path in paths)]
    return found


def _value(text: str) -> Any:
    """Return the value of an option, which may be YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # the parser has taken it
        return text


def _bring(paths: list[str], given: list[_Part]) -> str:
    """Return who brings some classes, as the beginning of a sentence."""
    sources = _sources(paths, given)
    if " and " in sources:
        return f"{sources} both bring"
    return f"{sources or 'trainer.callbacks'} brings"


def _sources(paths: list[str], given: list[_Part]) -> str:
    return " and ".join(dict.fromkeys(part.source for part in given if part.path in paths))


def _cure(paths: list[str], given: list[_Part]) -> str:
    """Return what to do: to leave an addon out, where there is one."""
    addons = [part.source for part in given if part.path in paths and part.is_addon]
    if not addons:
        return "Leave one of them out."
    return f"Leave out {addons[-1]}, and set the numbers of the other by --vars or in a config of yours."


# ---------------------------------------------------------------------------- which class it is


def _paths(parts: Any) -> list[str]:
    return [_path(part) for part in _listed(parts)]


def _path(part: Any) -> str:
    """Return where the class of a part of a config is defined, else the name that is given; of an object, its class."""
    if part is None or isinstance(part, (str, int, float)):
        given = "" if part is None else str(part)
    elif hasattr(part, "get"):
        given = str(part.get("class_path", ""))
    else:
        given = f"{type(part).__module__}.{type(part).__qualname__}"
    known = [given] if "." in given else [*_ours(given), *(path for path in _AVERAGES if _bare(path) == given)]
    found = _class(known[0]) if known else None
    return given if found is None else f"{found.__module__}.{found.__qualname__}"


def _class(path: str) -> type | None:
    """Return the class of a path; ``None`` if there is none, which the parser tells."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if inspect.isclass(found) else None


def _ours(name: str) -> list[str]:
    """Return where the method of a class name is defined; nothing if there is none."""
    classes = [_class(method.class_path) for method in methods() if method.class_name == name]
    return [f"{found.__module__}.{found.__qualname__}" for found in classes if found is not None]


def _is_precision(path: str) -> bool:
    from lightning.fabric.plugins import Precision

    found = _class(path) if "." in path else None
    return path.endswith("Precision") if found is None else issubclass(found, Precision)


def _plain(part: Any) -> Any:
    """Return a part of a config as plain mappings."""
    return part.as_dict() if hasattr(part, "as_dict") else part


def _bare(path: str) -> str:
    return path.rpartition(".")[2]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
