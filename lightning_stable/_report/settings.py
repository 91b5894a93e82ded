"""What runs were started with, and on: configs as lines, in what they differ, adapters, versions and hardware."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_stable._report.run import Run

__all__ = ["adapter_facts", "callbacks_in", "differences", "environment", "flat_settings"]

_PEFT = "lightning_stable.peft."
_SHOWN = ("init", "init_batches", "save", "trainable", "merge_on_end")
_ENTRY = re.compile(r".*?\[[^]]+\]")  # a callback, or another class in a list
_CONFIG = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern")


def flat_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Return settings as dotted names and values; entries of lists that are classes go by the class's name."""
    flat: dict[str, str] = {}
    _flatten("", settings, flat)
    return flat


def differences(settings: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the names in which the settings of some runs differ, and the value of each."""
    flats = [flat_settings(each) for each in settings]
    names = dict.fromkeys(name for flat in flats for name in flat)
    rows = [(name, [flat.get(name, "-") for flat in flats]) for name in names]
    return _whole_entries([(name, values) for name, values in rows if len(set(values)) > 1])


def _whole_entries(rows: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return rows, those of a callback that some runs do not have at all as one."""
    groups: dict[str, list[tuple[str, list[str]]]] = {}
    for name, values in rows:
        found = _ENTRY.match(name)
        groups.setdefault(found[0] if found else name, []).append((name, values))
    joined: list[tuple[str, list[str]]] = []
    for entry, group in groups.items():
        columns = list(zip(*(values for _, values in group), strict=True))
        if len(group) < 2 or not any(set(column) == {"-"} for column in columns):
            joined += group
            continue
        ends = [name.removeprefix(entry).lstrip(".") for name, _ in group]
        said = [", ".join(f"{e}: {v}" for e, v in zip(ends, column, strict=True) if v != "-") for column in columns]
        joined.append((entry, [each or "-" for each in said]))
    return joined


def adapter_facts(run: Run) -> list[tuple[str, str]]:
    """Return what is known of a run's adapters: names and values."""
    facts: list[tuple[str, str]] = []
    for callback in callbacks_in(run.config):
        path, given = str(callback.get("class_path", "")), callback.get("init_args") or {}
        if not path.startswith(_PEFT) or not isinstance(given, dict):
            continue
        facts.append(("Callback", path.rpartition(".")[2]))
        facts += [(name.replace("_", " ").capitalize(), _text(given[name])) for name in _SHOWN if given.get(name)]
        config = given.get("config") or {}
        if isinstance(config, dict):
            inner = config.get("init_args") or config
            if "class_path" in config:
                facts.append(("Config", str(config["class_path"]).rpartition(".")[2]))
            facts += [(name, _text(inner[name])) for name in _CONFIG if isinstance(inner, dict) and inner.get(name)]
    model = run.record.get("model", {})
    ranks = {str(layer): int(rank) for layer, rank in (model.get("adapter_ranks") or {}).items()}
    if ranks:
        low, high = min(ranks.values()), max(ranks.values())
        facts.append(
            ("Ranks", f"{low} to {high} in {len(ranks)} layers" if low < high else f"{low}, {len(ranks)} layers")
        )
    if facts and model.get("parameters"):
        share = model["trained"] / model["parameters"]
        facts.append(("Trained", f"{model['trained']:,} of {model['parameters']:,} parameters ({share:.2%})"))
    return facts


def environment(run: Run) -> list[tuple[str, str]]:
    """Return versions and hardware: names and values."""
    known = [(name.replace("_", " "), _text(value)) for name, value in run.record.get("environment", {}).items()]
    model = run.record.get("model", {})
    if model.get("class"):
        known.append(("module", str(model["class"])))
    if model.get("parameters"):
        known.append(("parameters", f"{model['parameters']:,}, of which {model['trained']:,} train"))
    return known


def callbacks_in(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Return the callbacks of a config."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    found = callbacks if isinstance(callbacks, list) else [callbacks]
    return [callback for callback in found if isinstance(callback, dict)]


def _flatten(name: str, value: Any, flat: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            _flatten(f"{name}.{key}" if name else str(key), entry, flat)
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        seen: dict[str, int] = {}
        for place, entry in enumerate(value):
            label = str(entry.get("class_path", place)).rpartition(".")[2]
            seen[label] = seen.get(label, 0) + 1
            end = f"#{seen[label]}" if seen[label] > 1 else ""
            inner = entry.get("init_args") or {}
            _flatten(f"{name}[{label}{end}]", inner if "class_path" in entry else entry, flat)
            if "class_path" in entry and not inner:
                flat[f"{name}[{label}{end}]"] = "with defaults"
    else:
        flat[name] = _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) or "none"
    return "none" if value is None else str(value)
