"""Settings of initialisers: which there are, and whether their values make sense, before anything runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional.eva import converged, eva_components, init_pca
from lightning_stable.functional.lora_ga import lora_ga_factors
from lightning_stable.functional.pissa import pissa_factors
from lightning_stable.peft._quantized import FORMATS, import_bitsandbytes
from lightning_stable.registry import nearest

__all__ = ["check_options", "residual_format"]

_KNOWN = {
    "pissa": ("iterations", "oversampling", "quantize_residual", "rounds"),
    "lora_ga": ("direction", "scale", "gamma", "exact", "iterations"),
    "eva": ("rho", "tau", "whiten", "share_inputs"),
    "corda": ("method",),
}


def check_options(owner: str, init: str, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless the initialiser has these settings, with such values, and what they need is there."""
    known = _KNOWN.get(init, ())
    for name in options:
        if name not in known:
            there = nearest(str(name), list(known)) if known else "It has none."
            raise ValueError(f"{owner}: init_options has {name!r}, which is no setting of init={init!r}. {there}")
    try:
        _TRIALS.get(init, _nothing)(dict(options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}: init_options={dict(options)!r}: {error}") from error
    if residual_format(options):
        import_bitsandbytes(owner)


def residual_format(options: Mapping[str, Any]) -> str:
    """Return the format that bases are to be held in, ``""`` for that of the model."""
    return str(options.get("quantize_residual") or "")


def _nothing(_options: dict[str, Any]) -> None:
    """Look at no setting."""


def _try_pissa(options: dict[str, Any]) -> None:
    form, rounds = options.pop("quantize_residual", None), options.pop("rounds", 1)
    pissa_factors(torch.eye(4), 1, 1.0, **options)
    check_count("rounds", rounds, 1, "rounds")
    if form is not None:
        check_choice("quantize_residual", form, FORMATS)
    elif rounds > 1:
        raise ValueError(
            f"rounds={rounds} is of quantize_residual, which is not there. Leave rounds out, or give both."
        )


def _try_lora_ga(options: dict[str, Any]) -> None:
    lora_ga_factors(torch.eye(4), torch.diag(torch.arange(4.0)), 1, 1.0, **options)
    _check_switch("exact", options.get("exact", False))


def _try_eva(options: dict[str, Any]) -> None:
    eva_components(1, options.get("rho", 2.0), 4)
    state = init_pca(1, 1)
    converged(state, state, options.get("tau", 0.99))
    for name in ("whiten", "share_inputs"):
        _check_switch(name, options.get(name, False))


def _try_corda(options: dict[str, Any]) -> None:
    check_choice("method", options.get("method", "ipm"), ("ipm", "kpm"))


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not true or false.")  # noqa: TRY004  a setting, as every bad one


_TRIALS: dict[str, Callable[[dict[str, Any]], None]] = {
    "pissa": _try_pissa,
    "lora_ga": _try_lora_ga,
    "eva": _try_eva,
    "corda": _try_corda,
}
