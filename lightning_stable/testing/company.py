"""Plugins of this package that those of others are put into one Trainer with."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_stable.registry import find_method
from lightning_stable.testing.rows import PrecisionSettings, Row, Settings

__all__ = ["COMPANY", "company_row"]


def company_row(name: str) -> Row:
    """Return the row of one of our plugins, without an oracle.

    Args:
        name: A key of :data:`COMPANY`.
    """
    method, make = find_method(name), COMPANY[name]
    settings: Settings = Settings(make=make, oracle=_none, identities=())
    if method.kind == "precision":
        settings = PrecisionSettings(make=make, oracle=_none, identities=())
    return Row(name, method.class_path, settings, method.kind, find=partial(company_row, name))


def _none(run: Any, plugin: Any) -> None:
    """Ask for nothing: they have oracles elsewhere."""


def _ema() -> Any:
    from lightning_stable.callbacks import EMA

    return EMA(decay=0.8, every_n_steps=2, start_step=3, validate_with="both")


def _sam() -> Any:
    from lightning_stable.callbacks import SAM

    return SAM(rho=0.3, interval=2, start_step=1)


def _wsd() -> Any:
    from lightning_stable.callbacks import WarmupStableDecay

    return WarmupStableDecay(warmup=2, decay=3, min_ratio=0.1, budgets=[6, 10])


def _stable_spam() -> Any:
    from lightning_stable.callbacks import StableSPAM

    return StableSPAM(gamma3=0.9, reset_every_n_steps=5)


def _mesa() -> Any:
    from lightning_stable.callbacks import MESA

    return MESA(lam=5.0, start_epoch=0, decay=0.5)


def _simulated() -> Any:
    from lightning_stable.precision import SimulatedPrecision

    return SimulatedPrecision(weights="int8", activations="int8", gradients="int8", scaling="row", exclude=())


COMPANY: dict[str, Callable[[], Any]] = {
    "ema": _ema,  # other weights in a validation and at the end
    "sam": _sam,  # a second pass
    "wsd": _wsd,  # rates
    "stable_spam": _stable_spam,  # gradients, and the optimizer's state
    "mesa": _mesa,  # a term of the loss
    "simulated": _simulated,  # layers of another class
}
"""How each of them is made, so that its effect shows: one of each way to act on training."""
