"""PEFT configs: built from what the user gives, turned into plain values for a checkpoint, and compared."""

import copy
import dataclasses
import importlib
from collections.abc import Mapping
from enum import Enum
from typing import Any

from lightning_stable.registry import nearest

__all__ = [
    "DATA_INITS",
    "INITS",
    "SHIFTING_INITS",
    "build_config",
    "config_differences",
    "plain_config",
    "rebuild_config",
]

LORA_INITS = ("default", "gaussian", "orthogonal", "mica", "olora", "pissa", "lora_ga", "eva", "corda")
OWN_TUNERS = {"loldu": "LOLDU", "svfit": "SVFIT"}
INITS = (*LORA_INITS, *OWN_TUNERS)
SHIFTING_INITS = ("pissa", "lora_ga", "olora", "corda")
"""What takes the product of the first factors out of the base, so that the function stays."""
DATA_INITS = ("lora_ga", "eva", "corda")

# What says where a config comes from or how it is run, not what it is.
_ASIDE = ("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "runtime_config")
# Fields that name layers, one or a list.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
# Configs of peft's own initialisers, which ours take the place of.
_OF_INITIALISERS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")


def build_config(owner: str, config: Any, init: str) -> Any:
    """Return a PEFT config of its own from a dict or a config, checked against the initialiser.

    Raises:
        ValueError: If the initialiser is unknown, the config is no config, or the two contradict each other.
    """
    if init not in INITS:
        raise ValueError(f"{owner}: init={init!r} is unknown. {nearest(str(init), list(INITS))}")
    if isinstance(config, Mapping):
        fields = dict(config)
        fields.setdefault("peft_type", OWN_TUNERS.get(init, "LORA"))
        built = _from_fields(owner, fields)
    else:
        from peft import PeftConfig

        if not isinstance(config, PeftConfig):
            raise ValueError(  # noqa: TRY004  a setting, as every bad one
                f"{owner}: config is a {type(config).__name__}, not a PEFT config. Give a dict such as "
                "{'r': 8, 'target_modules': ['q_proj', 'v_proj']} or a peft.LoraConfig."
            )
        built = copy.deepcopy(config)
    _check_numbers(owner, built)
    _check_agreement(owner, built, init)
    if init == "mica":
        built.init_lora_weights = "mica"  # peft freezes one factor by it
    elif init in LORA_INITS and _kind(built) == "LORA":
        built.init_lora_weights = True
    return built


def rebuild_config(owner: str, fields: Mapping[str, Any]) -> Any:
    """Return the PEFT config that a checkpoint holds as plain values."""
    return _from_fields(owner, {name: value for name, value in fields.items() if name not in _ASIDE})


def plain_config(config: Any) -> dict[str, Any]:
    """Return a PEFT config as strings, numbers, lists and dicts, which every checkpoint can hold."""
    return {name: _plain(value) for name, value in config.to_dict().items() if name not in _ASIDE}


def config_differences(
    stored: Mapping[str, Any], present: Mapping[str, Any], where: str = "in the checkpoint"
) -> list[str]:
    """Say in which fields two plain configs differ, one phrase each; ``where`` says whose ``stored`` is."""
    missing = "nothing"
    return [
        f"{name} is {present.get(name, missing)!r} here and {stored.get(name, missing)!r} {where}"
        for name in sorted({*stored, *present})
        if stored.get(name) != present.get(name)
    ]


def _from_fields(owner: str, fields: dict[str, Any]) -> Any:
    kind = str(getattr(fields["peft_type"], "value", fields["peft_type"])).upper()
    if kind in OWN_TUNERS.values():
        importlib.import_module(f"lightning_stable.peft.{kind.lower()}")  # registers itself with peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known: dict[str, Any] = {str(name.value): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise ValueError(f"{owner}: peft_type={fields['peft_type']!r} is unknown. {nearest(kind, list(known))}")
    allowed = [field.name for field in dataclasses.fields(known[kind])]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise ValueError(
            f"{owner}: config has {unknown[0]!r}, which is no field of {known[kind].__name__}. "
            f"{nearest(unknown[0], allowed)}"
        )
    names = {name: _layer_names(fields[name]) for name in _NAMES if name in fields}
    try:
        return known[kind](**{**fields, **names, "peft_type": kind})
    except TypeError as error:
        raise ValueError(f"{owner}: config does not make a {known[kind].__name__}: {error}") from error


def _layer_names(given: Any) -> Any:
    """Return names of layers as text: a command line makes numbers of ``"0"`` and ``"2"``, names in a Sequential."""
    if isinstance(given, (list, tuple, set)):
        return type(given)(_layer_names(each) for each in given)
    return str(given) if isinstance(given, int) else given


def _check_numbers(owner: str, config: Any) -> None:
    """Raise ``ValueError`` for a number that was given as something else, such as text with quotes in YAML."""
    for name in ("r", "lora_alpha", "lora_dropout"):
        value = getattr(config, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(
                f"{owner}: config has {name}={value!r}, a {type(value).__name__} and no number. Give it without quotes."
            )


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_agreement(owner: str, config: Any, init: str) -> None:
    """Raise ``ValueError`` if the config asks for another kind of adapter or another start than ``init``."""
    kind, wanted = _kind(config), OWN_TUNERS.get(init, "LORA")
    if init != "default" and kind != wanted:
        raise ValueError(
            f"{owner}: init={init!r} starts adapters of peft_type {wanted!r}, and the config is of {kind!r}. Leave out "
            "peft_type, or take init='default', which leaves the start to the PEFT method."
        )
    if config.inference_mode:
        raise ValueError(f"{owner}: config has inference_mode=True, with which nothing would train. Leave it out.")
    if kind != "LORA":
        return
    asked = config.init_lora_weights
    if asked is not True and asked != init:
        raise ValueError(
            f"{owner}: config has init_lora_weights={asked!r} beside init={init!r}. Leave init_lora_weights out and "
            f"say the start by init: one of {', '.join(map(repr, INITS))}."
        )
    given = [name for name in _OF_INITIALISERS if getattr(config, name, None)]
    if given:
        raise ValueError(
            f"{owner}: config has {given[0]!r}, which is of peft's own initialisers. Say by init which one to use, and "
            "give its settings as init_options."
        )
    variants = ("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config")
    other = [name for name in (*variants, "use_qalora", "use_bdlora", "lora_bias") if getattr(config, name, None)]
    if init != "default" and other:
        raise ValueError(
            f"{owner}: config has {other[0]!r}, a variant of LoRA that init={init!r} is not made for. Leave it out, or "
            "take init='default'."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(each) for each in value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
