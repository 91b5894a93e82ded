"""One row a method: what the contracts need to know about it. A method without a row breaks collection."""

import importlib
import inspect
from functools import partial
from pathlib import Path
from typing import Any

from contract import (
    continual_rows,
    fallback_checks,
    metric_checks,
    numerics_checks,
    oracle_checks,
    peft_rows,
    precision_checks,
    report_checks,
    strategy_rows,
    torchao_checks,
)
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from oracles.sam_twin import SharedSAM
from torchmetrics import Metric

from lightning_stable import registry
from lightning_stable.callbacks import (
    EMA,
    MESA,
    SAF,
    SAM,
    BalancedEMA,
    LogitSharpness,
    NumericsMonitor,
    OrthoGrad,
    SoftmaxCollapseMonitor,
    SpikeGuard,
    StableSPAM,
    WarmupStableDecay,
)
from lightning_stable.metrics import ContinualMetrics
from lightning_stable.testing.rows import STEPS, Row, Settings, resolve

ROOT = Path(__file__).parents[2]
# The rooms whose public classes are methods.
ROOMS = ("callbacks", "strategies", "precision", "peft", "metrics")

_ONE_AVERAGE = "would validate and finish with its own average"
_MANUAL = "does not work with manual optimisation"

SETTINGS: dict[str, Settings] = {
    "wsd": Settings(
        make=lambda: WarmupStableDecay(**oracle_checks.WSD),
        oracle=oracle_checks.wsd,
        identities=(lambda: WarmupStableDecay(warmup=0, decay=0),),
        ask=lambda plugin: plugin.decay_now(3),
        refused_modules={"two optimizers": "does not work with 2 optimizers"},
    ),
    "ema": Settings(
        make=lambda: EMA(decay=0.8, warmup="power", every_n_steps=2, start_step=3, validate_with="both"),
        oracle=oracle_checks.averaged,
        identities=(
            lambda: EMA(decay=0.8, validate_with="live", finish_with="live"),
            # An average that is the live weights at each step, validated and finished with.
            lambda: EMA(decay=0.0, validate_with="both"),
        ),
        conflicts={"balanced_ema": _ONE_AVERAGE},
    ),
    "balanced_ema": Settings(
        make=lambda: BalancedEMA(form="derived", fallback_decay=0.7),
        oracle=oracle_checks.balanced,
        identities=(lambda: BalancedEMA(validate_with="live", finish_with="live"),),
        refused_modules={"two optimizers": "does not work with 2 optimizers"},
        conflicts={"ema": _ONE_AVERAGE},
    ),
    "sam": Settings(
        make=lambda: SAM(**oracle_checks.SHARP),
        oracle=oracle_checks.sam,
        # Every perturbation changes something; one that would begin after the end does not.
        identities=(lambda: SAM(start_step=10 * STEPS),),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL},
        # Each process climbs along the gradient of its own samples.
        twin=lambda: SharedSAM(**oracle_checks.SHARP),
    ),
    "saf": Settings(
        make=lambda: SAF(**oracle_checks.SAF_SETTINGS),
        oracle=oracle_checks.saf,
        identities=(
            lambda: SAF(**{**oracle_checks.SAF_SETTINGS, "lam": 0.0}),
            # Records from the first epoch on, to be used after the end.
            lambda: SAF(**{**oracle_checks.SAF_SETTINGS, "start_epoch": STEPS, "lag_epochs": STEPS}),
        ),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL, "iterable": "needs a map-style dataset"},
    ),
    "mesa": Settings(
        make=lambda: MESA(**oracle_checks.MESA_SETTINGS),
        oracle=oracle_checks.mesa,
        identities=(
            lambda: MESA(**{**oracle_checks.MESA_SETTINGS, "lam": 0.0}),
            # An average from the first step on, to be used after the end.
            lambda: MESA(**{**oracle_checks.MESA_SETTINGS, "start_epoch": STEPS}),
        ),
        refused_modules={"manual": _MANUAL, "two optimizers": _MANUAL},
    ),
    "stable_spam": Settings(
        make=lambda: StableSPAM(**oracle_checks.STABLE_SPAM),
        oracle=oracle_checks.stable_spam,
        identities=(lambda: StableSPAM(clip=False, norm=None, reset_every_n_steps=None),),
    ),
    "spike_guard": Settings(
        make=lambda: SpikeGuard(**oracle_checks.GUARD),
        oracle=oracle_checks.spike_guard,
        identities=(
            # So high a limit that only what is not finite would be above it.
            lambda: SpikeGuard(threshold=1e9, warmup_steps=3, window=6),
            lambda: SpikeGuard(action="clip", threshold=1e9, warmup_steps=3, window=6, rewind_after=2),
        ),
    ),
    "orthograd": Settings(
        make=OrthoGrad,
        oracle=oracle_checks.orthograd,
        identities=(),
        expected_failures={"inert": "It has no settings, so none at which it changes nothing."},
    ),
    "softmax_collapse": Settings(
        make=lambda: SoftmaxCollapseMonitor(**oracle_checks.MONITOR),
        oracle=oracle_checks.softmax_collapse,
        identities=(lambda: SoftmaxCollapseMonitor(**oracle_checks.MONITOR),),
        observer=True,
    ),
    "continual": Settings(
        make=lambda: ContinualMetrics(**metric_checks.CONTINUAL),
        oracle=metric_checks.continual,
        identities=(lambda: ContinualMetrics(**metric_checks.CONTINUAL),),
        observer=True,
        expected_failures={
            "yaml": "A metric is no part of a Trainer: StabilityGap, which has an addon, computes the same values in "
            "a run."
        },
    ),
    **continual_rows.SETTINGS,
    **strategy_rows.SETTINGS,
    **precision_checks.SETTINGS,
    **torchao_checks.SETTINGS,
    **peft_rows.SETTINGS,
    "numerics_monitor": Settings(
        make=lambda: NumericsMonitor(**numerics_checks.WATCHED),
        oracle=numerics_checks.numerics_monitor,
        identities=(lambda: NumericsMonitor(**numerics_checks.WATCHED),),
        observer=True,
        # The loss of each process is a mean over half as many samples.
        twin=lambda: numerics_checks.MonitorOfTwo(**numerics_checks.WATCHED),
    ),
    "logit_sharpness": Settings(
        make=lambda: LogitSharpness(**numerics_checks.SHARPNESS),
        oracle=numerics_checks.logit_sharpness,
        identities=(lambda: LogitSharpness(**numerics_checks.SHARPNESS),),
        observer=True,
        refused_modules={"boring": "logits='head' of LogitSharpness is no submodule of PlainBoring"},
    ),
    "precision_fallback": fallback_checks.SETTINGS,
    "stability_report": report_checks.SETTINGS,
}


def build_rows() -> list[Row]:
    """Return a row for every method.

    Raises:
        ValueError: If a method has no settings, settings have no method, or a public class is no method.
    """
    names = {method.name for method in registry.METHODS}
    if names != SETTINGS.keys():
        raise ValueError(f"METHODS and the contract settings differ in {sorted(names ^ SETTINGS.keys())}.")
    unlisted = public_classes() - listed_classes()
    if unlisted:
        raise ValueError(f"Public classes without a row in METHODS: {sorted(unlisted)}.")
    return [
        Row(
            name=method.name,
            class_path=method.class_path,
            settings=SETTINGS[method.name],
            kind=method.kind,
            find=partial(resolve, f"contract.settings:BY_NAME[{method.name}]"),
            addons=tuple(ROOT / "templates" / "addons" / f"{addon}.yaml" for addon in addons_of(method)),
            card=ROOT / "docs" / "methods" / f"{method.name}.md",
        )
        for method in registry.METHODS
    ]


def addons_of(method: registry.Method) -> tuple[str, ...]:
    """Return the names of a method's addons: its own and those besides. A metric is nothing that a Trainer takes."""
    return method.addons if method.kind == "metric" else (method.name, *method.addons)


def listed_classes() -> set[str]:
    """Return the dotted paths of the classes that METHODS names: one for each row, and its relatives."""
    found = set()
    for method in registry.METHODS:
        module = method.class_path.rpartition(".")[0]
        found |= {method.class_path, *(f"{module}.{relative}" for relative in method.relatives)}
    return found


def public_classes(folder: Path = ROOT / "lightning_stable") -> set[str]:
    """Return the dotted paths of the classes that the rooms' files export, or that could be plugins of the host.

    Not those of files that are private and export nothing to users, nor abstract bases of plugins.

    Args:
        folder: The package, which can be imported by its folder's name.
    """
    found = set()
    for room in ROOMS:
        for path in sorted((folder / room).rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            private = any(part.startswith("_") and part != "__init__" for part in parts)
            if private:
                continue
            exported = [getattr(module, name) for name in getattr(module, "__all__", ())]
            own = [value for value in vars(module).values() if _is_plugin(value, of=module.__name__)]
            classes = [value for value in [*exported, *own] if inspect.isclass(value) and not inspect.isabstract(value)]
            found |= {f"{value.__module__}.{value.__name__}" for value in classes}
    return found


def _is_plugin(value: Any, of: str) -> bool:
    """Tell whether this is a class of a module that a Trainer, or a LightningModule as a metric, could be given."""
    kinds = (Callback, Strategy, Precision, Metric)
    if not inspect.isclass(value) or not issubclass(value, kinds) or value.__module__ != of:
        return False
    return not value.__name__.startswith("_") and not inspect.isabstract(value)


ROWS = build_rows()
# Where a process finds the row of a method.
BY_NAME = {row.name: row for row in ROWS}
