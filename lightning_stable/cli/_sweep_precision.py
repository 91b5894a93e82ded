"""What ``--precision`` of a sweep means: what it adds to the user's config, and what it leaves out of it."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from lightning_stable.cli._configs import read_configs
from lightning_stable.cli.locate import CommandError
from lightning_stable.precision._presets import PROJECTIONS

__all__ = [
    "HOST_PRECISIONS",
    "check_precision",
    "class_name",
    "is_simulated_format",
    "left_out",
    "precision_settings",
    "trainer_parts",
]

HOST_PRECISIONS = (
    *("64", "32", "16", "bf16", "64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"),
    *("transformer-engine", "transformer-engine-float16"),
)
"""What ``--precision`` hands to the Trainer as it is."""

_SIMULATED = "lightning_stable.precision.simulated.SimulatedPrecision"
# As lightning_stable.functional.quantize has them, which needs torch.
_FORMAT = re.compile(
    r"e[1-8]m(\d|10)|int[2-8]|shift[2-8]|mxfp8(_e5m2)?|mxfp6(_e2m3)?|mxfp4|nvfp4|binary|ternary", re.ASCII
)
_SCALING = re.compile(r"none|tensor|channel|row|(group|shift):[1-9]\d*", re.ASCII)
# Formats that bring the scales of their blocks, and take none besides.
_BLOCKS = re.compile(r"mxfp.*|nvfp4")
# Those whose scale is a mean, which makes nothing of halvings of the largest.
_MEANS = re.compile(r"binary|ternary")
_ALL_LAYERS = ["*"]
# As wide as float32, or nearly: simulated without a scale, as in the paper that cuts bits off them (arXiv 2405.18710).
_WIDE = re.compile(r"e[678]m\d+")


def is_simulated_format(name: str) -> bool:
    """Tell whether this is the name of a format to simulate."""
    return bool(_FORMAT.fullmatch(name))


def check_precision(precision: str) -> None:
    """Raise ``CommandError`` unless this is a precision of the host, or a format to simulate with a scaling for it."""
    if precision in HOST_PRECISIONS:
        return
    names, colon, scaling = precision.partition(":")
    formats = names.split("/")
    if len(formats) > 2 or not all(map(is_simulated_format, formats)) or (colon and not _SCALING.fullmatch(scaling)):
        raise CommandError(
            f"--precision {precision}: give a precision of the Trainer (32-true, bf16-mixed ...) or a format "
            "FORMAT[/GRADIENTS][:SCALING], as in e8m5, e4m3/e5m2:row or int4:group:128. Formats: eXmY, int2 to int8, "
            "mxfp8, mxfp8_e5m2, mxfp6, mxfp6_e2m3, mxfp4, nvfp4, shift2 to shift8, binary, ternary."
        )
    if scaling not in ("", "none") and all(map(_BLOCKS.fullmatch, formats)):
        raise CommandError(
            f"--precision {precision}: {names} has a scale for each of its blocks, and :{scaling} would change "
            f"nothing. Write {names}."
        )
    if scaling.startswith("shift") and any(map(_MEANS.fullmatch, formats)):
        raise CommandError(
            f"--precision {precision}: the scale of binary and ternary is a mean, which :{scaling} cannot give. Take "
            "tensor, channel, row or group:N."
        )


def precision_settings(precision: str, configs: Sequence[str]) -> dict[str, Any]:
    """Return what a run's config says under ``trainer`` to train in a precision.

    ``FORMAT[/GRADIENTS][:SCALING]`` is simulated: the first format for weights and activations, and for gradients
    unless they have their own. Without a scaling, formats with six or more bits of exponent have none and the others
    that of SimulatedPrecision. A SimulatedPrecision in the user's configs keeps its other settings, and its scaling
    where none is asked for and the format takes one. Of its preset stays which layers it converts.

    Args:
        precision: A precision of the host, or a format.
        configs: The user's configs, as ``fit`` takes them.
    """
    kept, simulated = _plugins(configs)
    if precision in HOST_PRECISIONS:
        return {"precision": precision, "plugins": kept or None}
    formats, _, scaling = precision.partition(":")
    both, _, gradients = formats.partition("/")
    asked = {"weights": both, "activations": both, "gradients": gradients or both}
    settings = {**simulated, **asked}
    if settings.pop("preset", None) is not None and settings.get("include", _ALL_LAYERS) == _ALL_LAYERS:
        settings["include"] = list(PROJECTIONS)  # the preset itself would set formats, too
    for operand, name in asked.items():
        if scaling or _BLOCKS.fullmatch(name):
            settings.pop(f"{operand.removesuffix('s')}_scaling", None)
    if scaling or ("scaling" not in simulated and _WIDE.fullmatch(both)):
        settings["scaling"] = scaling or "none"
    return {"precision": None, "plugins": [*kept, {"class_path": _SIMULATED, "init_args": settings}]}


def left_out(precision: str, callbacks: Sequence[Any]) -> list[Any]:
    """Return those of a config's callbacks that need a simulated format, where a precision simulates none.

    They are PrecisionFallback, which switches simulated formats, and NumericsMonitor, unless it has a format to try.
    """
    if precision not in HOST_PRECISIONS:
        return []
    found = []
    for callback in callbacks:
        name = class_name(callback)
        if name == "PrecisionFallback" or (name == "NumericsMonitor" and _settings(callback).get("format") is None):
            found.append(callback)
    return found


def _plugins(configs: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Return the plugins of the user's configs without those of precision, and the settings of SimulatedPrecision."""
    kept: list[Any] = []
    simulated: dict[str, Any] = {}
    for plugin in trainer_parts("plugins", configs):
        name = class_name(plugin)
        if name == "SimulatedPrecision":
            simulated = _settings(plugin)
        elif not name.endswith(("Precision", "Precision8bit")):
            kept.append(plugin)
    return kept, simulated


def trainer_parts(key: str, configs: Sequence[str]) -> list[Any]:
    """Return the list under ``trainer`` that all configs together make, such as the callbacks.

    Args:
        key: Its key; with a plus behind it a config adds to what is there.
        configs: The user's configs, as ``fit`` takes them.
    """
    found: list[Any] = []
    for config in itertools.chain.from_iterable(map(read_configs, configs)):
        trainer = config.trainer
        if key in trainer:
            found = _listed(trainer[key])  # a later file replaces the list
        found = [*found, *_listed(trainer.get(f"{key}+"))]
    return found


def class_name(part: Any) -> str:
    """Return the bare class name of a plugin or callback of a config."""
    path = part.get("class_path", "") if isinstance(part, dict) else part
    return str(path).rpartition(".")[2]


def _settings(part: Any) -> dict[str, Any]:
    """Return its settings."""
    return dict(part.get("init_args") or {}) if isinstance(part, dict) else {}


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
