"""One row a method: what the contracts need to know about it. A method without a row breaks collection."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from contract.harness import Run
from contract.rows import STEPS, Row, Settings
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy
from oracles.averaging_twin import BalancedAverage, ema
from oracles.wsd_twin import curve
from torchmetrics import Metric

from lightning_stable import registry
from lightning_stable.callbacks import EMA, BalancedEMA, WarmupStableDecay

ROOT = Path(__file__).parents[2]
# The rooms whose public classes are methods.
ROOMS = ("callbacks", "strategies", "precision", "peft", "metrics")


def _flat(weights: dict[str, Any]) -> list[list[float]]:
    return [value.double().flatten().tolist() for value in weights.values()]


def _assert_module_is(run: Run, expected: list[list[float]], what: str) -> None:
    for (name, value), twin in zip(run.module.named_parameters(), expected, strict=True):
        found = value.detach().double().flatten().tolist()
        assert found == pytest.approx(twin, rel=1e-4, abs=1e-6), f"{what}: {name} is not what the twin says"


WSD: dict[str, Any] = {"warmup": 2, "decay": 3, "shape": "inverse", "min_ratio": 0.1, "budgets": [6, 10]}


def _wsd_oracle(run: Run, plugin: WarmupStableDecay) -> None:
    factors = curve(STEPS, STEPS, WSD["warmup"], WSD["decay"], WSD["shape"], WSD["min_ratio"], WSD["budgets"])
    for step, factor in zip(run.steps, factors, strict=True):
        assert step.rates == pytest.approx([peak * factor for peak in run.module.rates], rel=1e-9)


def _ema_oracle(run: Run, plugin: EMA) -> None:
    # Begins after step 3, then every second step; the module ends on the average.
    history = [run.steps[2].weights, *(run.steps[step - 1].weights for step in range(4, STEPS + 1, 2))]
    _assert_module_is(run, ema([_flat(weights) for weights in history], 0.8, "power"), "EMA")
    assert plugin.updates == len(history) - 1


def _balanced_ema_oracle(run: Run, plugin: BalancedEMA) -> None:
    twin = BalancedAverage(_flat(run.steps[0].before), form="derived", fallback=0.7)
    for step in run.steps:
        twin.update(_flat(step.weights), _flat(step.before), _flat(step.gradients))
    _assert_module_is(run, twin.shadow, "BalancedEMA")


_ONE_AVERAGE = "would validate and finish with its own average"

SETTINGS: dict[str, Settings] = {
    "wsd": Settings(
        make=lambda: WarmupStableDecay(**WSD),
        oracle=_wsd_oracle,
        identities=(lambda: WarmupStableDecay(warmup=0, decay=0),),
        ask=lambda plugin: plugin.decay_now(3),
        refused_modules={"two optimizers": "does not work with 2 optimizers"},
    ),
    "ema": Settings(
        make=lambda: EMA(decay=0.8, warmup="power", every_n_steps=2, start_step=3, validate_with="both"),
        oracle=_ema_oracle,
        identities=(
            lambda: EMA(decay=0.8, validate_with="live", finish_with="live"),
            # An average that is the live weights at each step, validated and finished with.
            lambda: EMA(decay=0.0, validate_with="both"),
        ),
        conflicts={"balanced_ema": _ONE_AVERAGE},
    ),
    "balanced_ema": Settings(
        make=lambda: BalancedEMA(form="derived", fallback_decay=0.7),
        oracle=_balanced_ema_oracle,
        identities=(lambda: BalancedEMA(validate_with="live", finish_with="live"),),
        refused_modules={"two optimizers": "does not work with 2 optimizers"},
        conflicts={"ema": _ONE_AVERAGE},
    ),
}


def build_rows() -> list[Row]:
    """Return a row for every method.

    Raises:
        ValueError: If a method has no settings, settings have no method, or a public class is no method.
    """
    names = {method.name for method in registry.METHODS}
    if names != SETTINGS.keys():
        raise ValueError(f"METHODS and the contract settings differ in {sorted(names ^ SETTINGS.keys())}.")
    unlisted = public_classes() - {method.class_path for method in registry.METHODS}
    if unlisted:
        raise ValueError(f"Public classes without a row in METHODS: {sorted(unlisted)}.")
    return [
        Row(
            name=method.name,
            class_path=method.class_path,
            settings=SETTINGS[method.name],
            addons=tuple(ROOT / "templates" / "addons" / f"{addon}.yaml" for addon in (method.name, *method.addons)),
            card=ROOT / "docs" / "methods" / f"{method.name}.md",
        )
        for method in registry.METHODS
    ]


def public_classes(folder: Path = ROOT / "lightning_stable") -> set[str]:
    """Return the dotted paths of the classes that the rooms' files export, or that could be plugins of the host.

    Args:
        folder: The package, which can be imported by its folder's name.
    """
    found = set()
    for room in ROOMS:
        for path in sorted((folder / room).rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
            private = any(part.startswith("_") and part != "__init__" for part in parts)
            exported = [] if private else [getattr(module, name) for name in getattr(module, "__all__", ())]
            own = [value for value in vars(module).values() if _is_plugin(value, of=module.__name__)]
            found |= {f"{value.__module__}.{value.__name__}" for value in [*exported, *own] if inspect.isclass(value)}
    return found


def _is_plugin(value: Any, of: str) -> bool:
    """Tell whether this is a class of a module that a Trainer, or a LightningModule as a metric, could be given."""
    kinds = (Callback, Strategy, Precision, Metric)
    if not inspect.isclass(value) or not issubclass(value, kinds) or value.__module__ != of:
        return False
    return not value.__name__.startswith("_") and not inspect.isabstract(value)


ROWS = build_rows()
