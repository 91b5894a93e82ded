"""The runs of a sweep: which there are, where each has its files, and the config that each adds to the user's.

A run is one subprocess of ``lightning-stable fit``. Its folder has ``run.yaml``, which sets the precision, the logger
and the callback that records it, ``log.txt`` with what it printed, and at its end ``result.json``.
"""

import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stable.cli._configs import read_configs
from lightning_stable.cli._sweep_precision import (
    check_precision,
    left_out,
    precision_settings,
    trainer_parts,
)
from lightning_stable.cli._variables import used_variables
from lightning_stable.cli.locate import CommandError, find_template, list_templates, resolve_config

__all__ = [
    "LOG_NAME",
    "RECORD_NAME",
    "RESULT_NAME",
    "Run",
    "check_rate_key",
    "command_of",
    "config_paths",
    "make_grid",
    "parse_seeds",
    "rate_keys",
    "read_json",
    "run_config",
    "write_json",
]

LOG_NAME, RECORD_NAME, RESULT_NAME = "log.txt", "record.json", "result.json"

_RECORD = "lightning_stable.cli._sweep_record.SweepRecord"
# What a learning rate is called, as the last word of a key.
_RATE = re.compile(r"(.*_)?(lr|learning_rate)", re.ASCII)


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
        check_precision(precision)
    return [Run(precision, rate, seed) for seed in seeds for precision in precisions for rate in rates]


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
    return sorted(found, key=lambda value: value.startswith("addon:"))  # as a run reads them


def check_rate_key(key: str, configs: Sequence[str], overrides: Sequence[str]) -> None:
    """Raise ``CommandError`` if the key of the learning rate is a variable that nothing refers to.

    ``fit`` refuses it, too; here it is told before a run starts, and with the keys that there are.
    """
    room, _, name = key.partition(".")
    texts = [part.text for config in configs for part in read_configs(config)]
    texts += [option for option in overrides if "${" in option]
    if room == "vars" and name.partition(".")[0] not in used_variables("\n".join(texts)):
        raise CommandError(
            f"--lr-key {key}: no config refers to ${{{key}}}, so the learning rate would change nothing. "
            f"{rate_keys(configs)}"
        )


def rate_keys(configs: Sequence[str]) -> str:
    """Return a sentence on the keys that set a learning rate in the user's configs."""
    found: list[str] = []
    for config in itertools.chain.from_iterable(map(read_configs, configs)):
        content, used = config.content, used_variables(config.text)
        found += [f"vars.{name}" for name in sorted(used) if _RATE.fullmatch(name)]
        for room in ("model", "optimizer"):
            part = content.get(room)
            settings = part.get("init_args", part) if isinstance(part, dict) else None
            names = settings if isinstance(settings, dict) else {}
            found += [f"{room}.{name}" for name in names if _RATE.fullmatch(name)]
    if not found:
        return "Name the option that sets it, as in --lr-key model.lr or --lr-key optimizer.lr."
    return f"In these configs there is {' and '.join(f'--lr-key {key}' for key in dict.fromkeys(found))}."


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
    record = {"class_path": _RECORD, "init_args": {"path": str(place / RECORD_NAME), "metric": metric}}
    given = trainer_parts("callbacks", configs)
    without = left_out(run.precision, given)
    kept = [callback for callback in given if callback not in without]
    return {
        "trainer": {
            **precision_settings(run.precision, configs),
            # Runs side by side must not share a folder.
            "default_root_dir": str(place),
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger}],
            **({"callbacks": [*kept, record]} if without else {"callbacks+": [record]}),
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
