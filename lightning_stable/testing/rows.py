"""What a contract is told about a method: its row."""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_stable.testing.harness import Run

__all__ = [
    "CUT",
    "STEPS",
    "PeftSettings",
    "PrecisionSettings",
    "Row",
    "Settings",
    "StrategySettings",
    "found_by",
    "on_top_of",
    "preparation",
    "resolve",
]

STEPS = 14
"""Optimizer steps of a fit under contract."""
CUT = 8
"""The step after which it is cut: in the middle of the second epoch of six batches."""


@dataclass(frozen=True)
class Settings:
    """What the contracts need to know about one method.

    Attributes:
        make: The plugin with settings that make its effect visible within :data:`STEPS` optimizer steps.
        oracle: Recomputes from the recorded steps what the plugin should have done, and asserts that it did.
        identities: The plugin at each setting that changes nothing; none with a reason in ``expected_failures``.
        observer: The plugin changes nothing and only reports: its effect is what it logs.
        ask: What a user may ask of the plugin in the middle of a fit, and which has to be over with that fit.
        refused_modules: Kinds of module (keys of ``modules.MODULES``) that give a clear error, with a pattern of it.
        conflicts: Names of methods that cannot be in the same Trainer, with a pattern of the error.
        company: Names of the methods that it is put into one Trainer with; by default all of the suite.
        twin: How the single-process run that two processes have to equal is made; by default the same plugin.
        expected_failures: Names of contracts that cannot hold, with the reason.
    """

    make: Callable[[], Any]
    oracle: Callable[[Run, Any], None]
    identities: tuple[Callable[[], Any], ...]
    observer: bool = False
    ask: Callable[[Any], None] | None = None
    refused_modules: dict[str, str] = field(default_factory=dict)
    conflicts: dict[str, str] = field(default_factory=dict)
    company: tuple[str, ...] | None = None
    twin: Callable[[], Any] | None = None
    expected_failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StrategySettings(Settings):
    """What the contracts need to know about a strategy, whose effect shows in two processes alone.

    Its identities are compared with the host's DDP in two processes.

    Attributes:
        alone: The strategy at settings with which a single process trains as without it.
        rounds: Workers' weights differ between exchanges. A checkpoint is the end of a round, which changes training.
        saves: It has a state of its own, which is in the checkpoint under its class name.
        tolerance: How far an identity may be from DDP, which may add up in another order.
        optimizer: What modules train with: ``"sgd"`` or ``"adam"``.
    """

    alone: tuple[Callable[[], Any], ...] = ()
    rounds: bool = False
    saves: bool = True
    tolerance: float = 0.0
    optimizer: str = "sgd"


@dataclass(frozen=True)
class PrecisionSettings(Settings):
    """What the contracts need to know about a precision plugin, which takes the place of the host's.

    Attributes:
        under: Makes the plugin on top of one of the host's precisions, such as ``"bf16-mixed"``.
    """

    under: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class PeftSettings(Settings):
    """What the contracts need to know about a method of adapters.

    Attributes:
        carrier: Name of the class that a Trainer takes, where that of the method is a part of it.
        prepare: What the constructor of a module does, for the method to have something to work on. Modules without
            the plugin are prepared, too.
        adapts: The plugin puts adapters into the module, so that no other needs a prepared one.
    """

    carrier: str | None = None
    prepare: Callable[[LightningModule], None] | None = None
    adapts: bool = False


@dataclass(frozen=True)
class Row:
    """A method under contract.

    Attributes:
        name: The one name of the method.
        class_path: Dotted path of its class.
        settings: What the contracts need to know about it.
        kind: What the class plugs into: a metric is a part of the module, the rest a Trainer takes. Strategies are
            under contract in two processes.
        addons: Its addon templates.
        card: Its card.
        find: Returns this row in another process, to which it is sent in its place: settings hold functions that have
            no name there. So it is one that can be pickled, such as a ``functools.partial`` of :func:`resolve`.
    """

    name: str
    class_path: str
    settings: Settings
    kind: str = "callback"
    addons: tuple[Path, ...] = ()
    card: Path | None = None
    find: Callable[[], "Row"] | None = None

    @property
    def class_name(self) -> str:
        """Name of the class that a Trainer takes."""
        carrier = self.settings.carrier if isinstance(self.settings, PeftSettings) else None
        return carrier or self.class_path.rpartition(".")[2]

    @property
    def has_rounds(self) -> bool:
        """Whether saving a checkpoint changes training, since it is the end of a round."""
        return isinstance(self.settings, StrategySettings) and self.settings.rounds


def preparation(*rows: Row) -> Callable[[LightningModule], None] | None:
    """Return what constructors do to modules that are trained with all of these."""
    settings = [row.settings for row in rows if isinstance(row.settings, PeftSettings)]
    if any(each.adapts for each in settings):
        return None
    return next((each.prepare for each in settings if each.prepare is not None), None)


def on_top_of(row: Row, settings: dict[str, Any]) -> tuple[Row, dict[str, Any]]:
    """Return a row and a Trainer's settings, of which a precision plugin takes the precision upon itself."""
    if not isinstance(row.settings, PrecisionSettings) or "precision" not in settings:
        return row, settings
    assert row.settings.under is not None, f"{row.name} does not say how it is made on top of a precision"
    make = functools.partial(row.settings.under, settings["precision"])
    rest = {name: value for name, value in settings.items() if name != "precision"}
    return replace(row, settings=replace(row.settings, make=make)), rest


def found_by(row: Row) -> Callable[[], Row]:
    """Return what another process calls to have this row."""
    if row.find is None:
        raise ValueError(f"The row {row.name!r} does not say how another process finds it: give it `find`.")
    return row.find


def resolve(path: str) -> Any:
    """Return what ``module:name.name`` or ``module:name[key].attribute`` means, for jobs that cross processes."""
    module, _, expression = path.partition(":")
    name, *rest = re.split(r"[.\[]", expression)
    value = getattr(importlib.import_module(module), name)
    for part in rest:
        value = value[part.rstrip("]")] if part.endswith("]") else getattr(value, part)
    return value
