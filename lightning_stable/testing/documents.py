"""The contracts on what is written down: 2, the addon templates, and 11, the card."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_stable.testing.examples import run_examples
from lightning_stable.testing.harness import assert_same
from lightning_stable.testing.rows import Row, resolve

__all__ = ["HEADINGS", "check_card", "check_yaml"]

# ---------------------------------------------------------------------------------------------------- 2


def check_yaml(row: Row, tmp_path: Path) -> None:
    """Each addon builds the plugin through LightningCLI, beside a user's own callbacks; the saved config does again."""
    assert row.addons, f"{row.name} has no addon template"
    for addon in row.addons:
        assert addon.exists(), f"{addon} does not exist"
        first = _command_line(["--config", str(_own_config(tmp_path)), "--config", str(addon)])
        saved = tmp_path / f"saved-{addon.stem}.yaml"
        first.parser.save(first.config, saved, overwrite=True)
        second = _command_line(["--config", str(saved)])
        built = []
        for command in (first, second):
            trainer = command.trainer
            parts = [*trainer.callbacks, trainer.strategy, trainer.precision_plugin]
            kinds = [type(part).__name__ for part in parts]
            assert "LearningRateMonitor" in kinds, f"{addon.name} replaced the user's own callbacks: {kinds}"
            assert kinds.count(row.class_name) == 1, f"{addon.name} did not add one {row.class_name}: {kinds}"
            built.append(parts[kinds.index(row.class_name)])
        assert_same(_public(built[1]), _public(built[0]), f"{row.class_name} from the saved config of {addon.name}")


def _own_config(tmp_path: Path) -> Path:
    """Write a user's config, with a callback of its own."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
                "trainer": {
                    "accelerator": "cpu",
                    "logger": False,
                    "enable_checkpointing": False,
                    "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
                },
            }
        )
    )
    return config


def _command_line(arguments: list[str]) -> Any:
    from lightning_stable.cli.training import StableCLI

    return StableCLI(arguments, run=False)


def _public(plugin: Any) -> dict[str, Any]:
    # Of an object it is the kind that counts, not where it lies in memory.
    values = {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in vars(plugin).items()}
    return {name: value for name, value in values.items() if not name.startswith("_")}


# ---------------------------------------------------------------------------------------------------- 11

HEADINGS = (
    "In one line",
    "Use it",
    "How it works",
    "Settings",
    "Works with",
    "Cost",
    "Fails when",
    "Evidence",
    "Reference",
)
"""What a card has, in this order."""


def check_card(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card has the fixed headings in order, names each argument and each expected failure, and its blocks run."""
    assert row.card is not None
    assert row.card.exists(), f"{row.card} does not exist"
    text = row.card.read_text(encoding="utf-8")
    headings = tuple(re.findall(r"^## (.+)$", text, flags=re.MULTILINE))
    assert headings == HEADINGS, f"{row.card.name} has the headings {headings}, not {HEADINGS}"
    arguments = [name for name in _arguments(row) if f"`{name}`" not in text]
    assert not arguments, f"{row.card.name} does not name the settings {arguments}"
    for reason in row.settings.expected_failures.values():
        assert reason in text, f"{row.card.name} does not say: {reason}"
    run_examples(row.card.name, text, row.addons, tmp_path, monkeypatch)


def _arguments(row: Row) -> list[str]:
    module, _, name = row.class_path.rpartition(".")
    plugin = resolve(f"{module}:{name}")
    arguments: dict[str, None] = {}
    for kind in plugin.__mro__:
        if dataclasses.is_dataclass(kind) and kind.__module__.partition(".")[0] == module.partition(".")[0]:
            # Its constructor takes the fields of the host's base, too, in one signature.
            fields: Any = kind
            arguments |= dict.fromkeys(inspect.get_annotations(fields))
            continue
        # What a class passes on to its base is a setting of the base, up to the host's own.
        if kind.__module__.partition(".")[0] != module.partition(".")[0] or "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(kind).parameters.values()
        arguments |= dict.fromkeys(each.name for each in parameters if each.kind != each.VAR_KEYWORD)
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    return list(arguments)
