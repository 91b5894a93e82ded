"""What a run takes once and was given twice: strategies, precisions, schedules, averages, or any one plugin.

Configs are merged key by key, so without this the strategy of one addon would take the place of another's without a
word. An addon takes no other config's place. A file or an option that comes later does: there the user has chosen.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lightning_stable.cli._configs import Config, walk_arguments
from lightning_stable.cli.locate import CommandError
from lightning_stable.registry import methods

__all__ = ["refuse_conflicts"]

# What any strategy for several processes may take the place of: nobody has chosen it for what it does.
_PLAIN = ("", "auto", "ddp")
_SCHEDULE = "WarmupStableDecay"
_AVERAGES = ("EMA", "BalancedEMA", "StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")


class _Part(NamedTuple):
    """A class that a run was given.

    Attributes:
        name: Its bare name.
        source: The config or option that brought it.
        is_addon: Whether that is an addon.
    """

    name: str
    source: str
    is_addon: bool


def refuse_conflicts(arguments: Sequence[str], trainer: Any, lr_scheduler: Any = None) -> None:
    """Raise if a run was given twice what it takes once.

    Args:
        arguments: The command line, which tells who brought what.
        trainer: What the merged config says of the Trainer.
        lr_scheduler: What it says of the scheduler.

    Raises:
        CommandError: The message names both.
    """
    walked = list(walk_arguments(arguments))
    _check_strategies(_given(walked, "strategy"))
    _check_callbacks(_names(trainer.callbacks), _given(walked, "callbacks"))
    _check_schedules(_names(trainer.callbacks), _given(walked, "callbacks"), lr_scheduler)
    _check_precisions(trainer, _given(walked, "plugins"), _given(walked, "precision"))


def _check_strategies(given: Iterable[_Part]) -> None:
    """Raise if an addon took the place of another strategy, and nothing later took its place."""
    before = clash = None
    for part in given:
        clash = (before, part) if part.is_addon and before is not None else None
        before = None if part.name in _PLAIN else part
    if clash is None:
        return
    first, second = clash
    raise CommandError(
        f"{first.source} and {second.source} both set trainer.strategy ({first.name} and {second.name}), and a run has "
        f"one. Leave one of them out, or choose by an option at the end, as in --trainer.strategy {second.name}."
    )


def _check_callbacks(present: list[str], given: list[_Part]) -> None:
    """Raise if a method is there twice, or two averages of the weights are."""
    for name, count in Counter(present).items():
        if count > 1 and name in {method.class_name for method in methods()}:
            raise CommandError(
                f"{_bring([name, name], given)} {name} ({count} times in trainer.callbacks), and a run takes one. "
                f"{_cure([name], given)}"
            )
    averages = [name for name in _AVERAGES if name in present]
    if len(averages) > 1:
        raise CommandError(
            f"{_bring(averages, given)} {' and '.join(averages)}, and a run takes one average of the weights. "
            f"{_cure(averages, given)}"
        )


def _check_schedules(present: list[str], given: list[_Part], lr_scheduler: Any) -> None:
    """Raise if a callback and a scheduler would both set the learning rate."""
    other = _name(lr_scheduler)
    if _SCHEDULE in present and other:
        raise CommandError(
            f"lr_scheduler is {other}, and {_sources([_SCHEDULE], given) or 'trainer.callbacks'} brings {_SCHEDULE}: "
            "both would set the learning rate. Leave one of them out."
        )


def _check_precisions(trainer: Any, plugins: list[_Part], settings: list[_Part]) -> None:
    """Raise if there are two precision plugins, or one beside ``trainer.precision``."""
    present = [name for name in _names(trainer.plugins) if name.endswith("Precision")]
    if len(present) > 1:
        raise CommandError(
            f"{_bring(present, plugins)} {' and '.join(present)} (trainer.plugins), and a run takes one precision. "
            f"{_cure(present, plugins)}"
        )
    if present and trainer.precision is not None:
        chosen = str(trainer.precision)
        source = next((f" ({part.source})" for part in reversed(settings) if not part.source.startswith("--")), "")
        addon = next((part.source.partition(":")[2] for part in plugins if part.is_addon), None)
        compute = f"--vars.{addon}_compute {chosen}" if addon else f"compute: {chosen} among its settings"
        raise CommandError(
            f"trainer.precision is {chosen}{source}, and {_sources(present, plugins) or 'trainer.plugins'} brings "
            f"{present[0]}, which takes its place. Leave one of them out; for {present[0]} with the rest in {chosen}: "
            f"--trainer.precision null {compute}"
        )


# ---------------------------------------------------------------------------- who brought what


def _given(walked: Iterable[Config | tuple[str, str]], key: str) -> list[_Part]:
    """Return what each config and option gives under a key of the Trainer, in order."""
    found: list[_Part] = []
    for each in walked:
        if isinstance(each, Config):
            trainer = each.trainer
            parts = [*_listed(trainer.get(key)), *_listed(trainer.get(f"{key}+"))]
            names = [_name(part) for part in parts] or ([""] if key in trainer else [])  # null is a choice, too
            replaced, given = key in trainer, [_Part(name, each.name, each.is_addon) for name in names]
        elif each[0].rstrip("+") == f"--trainer.{key}":
            replaced, given = not each[0].endswith("+"), [_Part(_name(each[1]), " ".join(each), is_addon=False)]
        else:
            continue
        # Of strategies all are of interest: who was there before whom.
        found = [*(found if key == "strategy" or not replaced else []), *given]
    return found


def _bring(names: list[str], given: list[_Part]) -> str:
    """Return who brings some classes, as the beginning of a sentence."""
    sources = _sources(names, given)
    if " and " in sources:
        return f"{sources} both bring"
    return f"{sources or 'trainer.callbacks'} brings"


def _sources(names: list[str], given: list[_Part]) -> str:
    return " and ".join(dict.fromkeys(part.source for part in given if part.name in names))


def _cure(names: list[str], given: list[_Part]) -> str:
    """Return what to do: to leave an addon out, where there is one."""
    addons = [part.source for part in given if part.name in names and part.is_addon]
    if not addons:
        return "Leave one of them out."
    return f"Leave out {addons[-1]}, and set the numbers of the other by --vars or in a config of yours."


def _names(parts: Any) -> list[str]:
    return [_name(part) for part in _listed(parts)]


def _name(part: Any) -> str:
    """Return the bare class name of a part of a config; of an object, that of its class."""
    if part is None or isinstance(part, str):
        return (part or "").rpartition(".")[2]
    path = part.get("class_path", "") if hasattr(part, "get") else type(part).__name__
    return str(path).rpartition(".")[2]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
