"""The runs of a sweep: which there are, where each has its files, and the config that each adds to the user's.

A run is one subprocess of ``lightning-stable fit``. Its folder has ``run.yaml``, which sets the precision, the logger
and the callback that records it, ``log.txt`` with what it printed, and at its end ``result.json``.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_stable.cli.locate import CommandError, find_template, list_templates, resolve_config
from lightning_stable.precision._presets import PROJECTIONS

__all__ = [
    "HOST_PRECISIONS",
    "LOG_NAME",
    "RECORD_NAME",
    "RESULT_NAME",
    "Run",
    "command_of",
    "config_paths",
    "make_grid",
    "parse_seeds",
    "precision_settings",
    "read_json",
    "run_config",
    "write_json",
]

LOG_NAME, RECORD_NAME, RESULT_NAME = "log.txt", "record.json", "result.json"

HOST_PRECISIONS = (
    *("64", "32", "16", "bf16", "64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"),
    *("transformer-engine", "transformer-engine-float16"),
)
"""What ``--precision`` hands to the Trainer as it is."""

_SIMULATED = "lightning_stable.precision.simulated.SimulatedPrecision"
_RECORD = "lightning_stable.cli._sweep_record.SweepRecord"
# As lightning_stable.functional.quantize has them, which needs torch.
_FORMAT = re.compile(
    r"e[1-8]m(\d|10)|int[2-8]|shift[2-8]|mxfp8(_e5m2)?|mxfp6(_e2m3)?|mxfp4|nvfp4|binary|ternary", re.ASCII
)
_SCALING = re.compile(r"none|tensor|channel|row|(group|shift):[1-9]\d*", re.ASCII)
# Formats that bring the scales of their blocks, and take none besides.
_BLOCKS = re.compile(r"mxfp.*|nvfp4")
_ALL_LAYERS = ["*"]
# As wide as float32, or nearly: simulated without a scale, as in the paper that cuts bits off them (arXiv 2405.18710).
_WIDE = re.compile(r"e[678]m\d+")


class Run(NamedTuple):
    """One run of a sweep.

    Attributes:
        precision: A precision of the host, or a format to simulate.
        lr: The learning rate.
        seed: The seed.
    """

    precision: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, which no other run has.

        A format may have an underscore where another has a slash, as in mxfp8_e5m2 and mxfp8/e5m2.
        """
        return f"{self.precision.replace('/', '--').replace(':', '_')}-lr{self.lr!r}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.precision} lr {self.lr!r} seed {self.seed}"


def parse_seeds(given: Sequence[int]) -> list[int]:
    """Return the seeds: one number is how many, from 0 on; several are the seeds themselves.

    Raises:
        CommandError: If there is none, or one is negative or there twice.
    """
    if len(given) == 1 and given[0] < 1:
        raise CommandError(f"--seeds {given[0]}: one number is how many seeds there are, from 1 on.")
    if len(given) == 1:
        return list(range(given[0]))
    if min(given) < 0:
        raise CommandError(f"--seeds {' '.join(map(str, given))}: seeds are from 0 on.")
    return _unique("--seeds", given)


def make_grid(precisions: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Run]:
    """Return all runs, seed by seed, so that a sweep that is stopped early has seen the whole map.

    Raises:
        CommandError: If a value is out of range or there twice.
    """
    wrong = [rate for rate in rates if not 0 < rate < float("inf")]
    if wrong:
        raise CommandError(f"--lr {wrong[0]}: a learning rate is a finite number above 0.")
    rates, precisions = _unique("--lr", rates), _unique("--precision", precisions)
    for precision in precisions:
        _check_precision(precision)
    return [Run(precision, rate, seed) for seed in seeds for precision in precisions for rate in rates]


def _check_precision(precision: str) -> None:
    """Raise ``CommandError`` unless this is a precision of the host or a format to simulate."""
    formats, colon, scaling = precision.partition(":")
    known = all(_FORMAT.fullmatch(name) for name in formats.split("/")) and formats.count("/") < 2
    if precision not in HOST_PRECISIONS and not (known and (not colon or _SCALING.fullmatch(scaling))):
        raise CommandError(
            f"--precision {precision}: give a precision of the Trainer (32-true, bf16-mixed ...) or a format "
            "FORMAT[/GRADIENTS][:SCALING], as in e8m5, e4m3/e5m2:row or int4:group:128. Formats: eXmY, int2 to int8, "
            "mxfp8, mxfp8_e5m2, mxfp6, mxfp6_e2m3, mxfp4, nvfp4, shift2 to shift8, binary, ternary."
        )


def _unique(option: str, values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value in found:
            raise CommandError(f"{option}: {value} is given twice.")
        found.append(value)
    return found


# ---------------------------------------------------------------------------- configs


def config_paths(given: Sequence[str]) -> list[str]:
    """Return each ``--config`` as ``fit`` takes it; a bare name may be that of a recipe.

    Raises:
        CommandError: If there is no such file or template.
    """
    recipes = [template.name for template in list_templates("recipe")]
    found = []
    for value in given:
        named = f"recipe:{value}" if value in recipes and not Path(value).is_file() else value
        path = Path(resolve_config(named)[0])
        if not path.is_file():
            if path.suffix not in (".yaml", ".yml"):
                find_template("recipe", value)  # says which there are
            raise CommandError(f"--config {value}: there is no such file.")
        found.append(named)
    return found


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


def _plugins(configs: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Return the plugins of the user's configs without those of precision, and the settings of SimulatedPrecision."""
    kept: list[Any] = []
    simulated: dict[str, Any] = {}
    for config in configs:
        trainer = (yaml.safe_load(Path(resolve_config(config)[0]).read_text(encoding="utf-8")) or {}).get("trainer")
        if not isinstance(trainer, dict):
            continue
        if "plugins" in trainer:
            kept, simulated = [], {}  # a later file replaces the list
        given = [*_listed(trainer.get("plugins")), *_listed(trainer.get("plugins+"))]
        for plugin in given:
            path = plugin.get("class_path", "") if isinstance(plugin, dict) else str(plugin)
            name = path.rpartition(".")[2]
            if name == "SimulatedPrecision":
                simulated = dict(plugin.get("init_args") or {}) if isinstance(plugin, dict) else {}
            elif not name.endswith(("Precision", "Precision8bit")):
                kept.append(plugin)
    return kept, simulated


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def run_config(run: Run, folder: Path, configs: Sequence[str], metric: str) -> dict[str, Any]:
    """Return the config of one run, which comes after the user's.

    Args:
        run: The run.
        folder: Its folder.
        configs: The user's configs, as ``fit`` takes them.
        metric: The logged value that is recorded.
    """
    place = folder.resolve()
    logger = {"save_dir": str(place), "name": "logs", "version": ""}
    record = {"path": str(place / RECORD_NAME), "metric": metric}
    return {
        "trainer": {
            **precision_settings(run.precision, configs),
            # Runs side by side must not share a folder.
            "default_root_dir": str(place),
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}],
            "callbacks+": [{"class_path": _RECORD, "init_args": record}],
            "enable_progress_bar": False,
        }
    }


def command_of(run: Run, folder: Path, configs: Sequence[str], lr_key: str, overrides: Sequence[str]) -> list[str]:
    """Return the command line of a run; what the sweep varies comes last."""
    files = [part for config in (*configs, str(folder / "run.yaml")) for part in ("--config", config)]
    varied = [f"--{lr_key}", repr(run.lr), "--seed_everything", str(run.seed)]
    return [sys.executable, "-m", "lightning_stable.cli.main", "fit", *files, *overrides, *varied]


# ---------------------------------------------------------------------------- files


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a file holds, ``None`` if it does not exist or was not finished."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
