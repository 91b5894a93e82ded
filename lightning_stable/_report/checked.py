"""Checks what files of others hold, so that nothing in it ends the command: a field is taken whole or not at all."""

import math
from collections.abc import Callable
from typing import Any

from lightning_stable._report.spikes import SpikeRule

__all__ = ["checked_record", "leaves", "number", "numbers_in", "share", "step"]

_MOST_LEAVES = 20_000
# Beyond it steps are no longer exact as the numbers that are drawn.
_LAST_STEP = 2**53


def step(value: Any) -> int:
    """Return a count of steps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LAST_STEP:
        raise ValueError(f"{value!r} is no step")
    return int(value)


def number(value: Any) -> float:
    """Return a number; null stands for what is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def share(value: Any) -> float | None:
    """Return a finite number, or ``None``."""
    if value is None:
        return None
    found = number(value)
    return found if math.isfinite(found) else None


def numbers_in(entry: Any, *names: str) -> dict[str, Any]:
    """Return an object of which the named entries are finite numbers or ``None``."""
    if not isinstance(entry, dict):
        raise TypeError(f"{entry!r:.40} is no object")
    return {**entry, **{name: share(entry.get(name)) for name in names}}


def checked_record(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what StabilityReport wrote without the fields that are damaged, and their names."""
    kept, damaged = dict(record), []
    for name, check in _FIELDS.items():
        if record.get(name) is None:
            kept.pop(name, None)
            continue
        try:
            kept[name] = check(record[name])
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            del kept[name]
            damaged.append(name)
    return kept, damaged


def leaves(value: Any, most: int = _MOST_LEAVES) -> int:
    """Return how many values some settings hold, each alias counted as what it stands for.

    Raises:
        ValueError: If they are more than that: a few lines of aliases can stand for millions.
    """
    known: dict[int, int] = {}
    count = _leaves(value, known, set())
    if count > most:
        raise ValueError(f"it stands for {count if count < 10**9 else 'billions of'} values, and {most} are read")
    return count


def _leaves(value: Any, known: dict[int, int], above: set[int]) -> int:
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in above:
        raise ValueError("it holds itself")
    if id(value) not in known:
        entries = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_leaves(entry, known, above | {id(value)}) for entry in entries)
    return known[id(value)]


def _seconds(value: Any) -> float:
    found = number(value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{value!r} is no time")
    return found


def _rule(value: Any) -> dict[str, float]:
    rule = SpikeRule(**value)
    given = [number(setting) for setting in rule]
    if not all(math.isfinite(setting) for setting in given):
        raise ValueError("a setting is not finite")
    return SpikeRule(given[0], int(given[1]), given[2])._asdict()


def _spikes(value: Any) -> dict[str, list[list[float]]]:
    return {str(signal): [_spike(spike) for spike in found] for signal, found in value.items()}


def _spike(value: Any) -> list[float]:
    at, height, limit = value
    return [step(at), number(height), number(limit)]


def _not_finite(value: Any) -> dict[str, list[int | None]]:
    return {
        str(signal): [step(count), None if first is None else step(first)] for signal, (count, first) in value.items()
    }


def _plain(value: Any) -> dict[str, Any]:
    """Return an object that holds text and numbers, no objects within."""
    return {str(name): entry for name, entry in value.items() if not isinstance(entry, (dict, list))}


def _model(value: Any) -> dict[str, Any]:
    ranks = {str(layer): step(rank) for layer, rank in (value.get("adapter_ranks") or {}).items()}
    counts = {name: step(value[name]) for name in ("parameters", "trained") if name in value}
    return {
        "class": str(value.get("class") or ""),
        **(counts if len(counts) == 2 else {}),
        **({"adapter_ranks": ranks} if ranks else {}),
    }


def _events(value: Any) -> list[dict[str, Any]]:
    return [{"step": step(event["step"]), "what": str(event["what"])} for event in value]


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "steps": step,
    "epochs": step,
    "seconds": _seconds,
    "rule": _rule,
    "spikes": _spikes,
    "spike_counts": lambda value: {str(signal): step(count) for signal, count in value.items()},
    "not_finite": _not_finite,
    "unknown": lambda value: {str(signal): step(count) for signal, count in value.items()},
    "phases": lambda value: [[step(begin), str(phase)] for begin, phase in value],
    "rounds": lambda value: [step(end) for end in value],
    "finished_rounds": step,
    "strategy": _plain,
    "environment": _plain,
    "model": _model,
    "events": _events,
    "validated_weights": str,
}
