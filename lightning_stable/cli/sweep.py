"""``lightning-stable sweep``: seeds x learning rates x precisions, one subprocess a run, and the share that diverged.

It needs no torch itself. What a run is, and its files: :mod:`lightning_stable.cli._sweep_grid`. What has diverged:
:func:`lightning_stable.cli._sweep_report.divergence`.
"""

import argparse
import contextlib
import hashlib
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_stable._glue.progress import follow_command
from lightning_stable.cli._sweep_grid import (
    LOG_NAME,
    RECORD_NAME,
    RESULT_NAME,
    Run,
    check_rate_key,
    command_of,
    config_paths,
    make_grid,
    parse_seeds,
    rate_keys,
    read_json,
    run_config,
    write_json,
)
from lightning_stable.cli._sweep_pool import Ended, Job, Terminated, run_here, run_on_ray, terminable
from lightning_stable.cli._sweep_precision import class_name, left_out, trainer_parts
from lightning_stable.cli._sweep_report import (
    all_results,
    divergence,
    draw_map,
    make_cells,
    markdown_table,
)
from lightning_stable.cli.locate import CommandError, resolve_config, short_path

__all__ = ["sweep"]

# Exit code of a run whose command line or config is wrong: the others would end so, too.
_WRONG_USE = 2

# Exit codes of shells for what a signal has ended.
_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

# How the command begins what went wrong, and how much of it is repeated.
_ERROR, _LONGEST = "lightning-stable: error: ", 300


class _Sweep(NamedTuple):
    """A sweep that is asked for.

    Attributes:
        options: Its options.
        configs: The configs, as ``fit`` takes them.
        overrides: What goes on to each run.
        runs: All its runs.
        folder: Where everything is written.
    """

    options: argparse.Namespace
    configs: list[str]
    overrides: list[str]
    runs: list[Run]
    folder: Path

    def place(self, run: Run) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.name


def sweep(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run what is missing of a sweep, and report on all of it.

    Args:
        options: As :func:`lightning_stable.cli._sweep_options.add_sweep_options` has them.
        overrides: Options that every run gets besides.

    Returns:
        The exit code: 0 if all runs ended, those that diverged included, 1 if others failed, 130 or 143 if it was
        interrupted.

    Raises:
        CommandError: If an option is wrong, the folder or that of a run holds another's results, or a run's command
            line is wrong.
    """
    asked = _ask(options, list(overrides))
    results = {run: found for run in asked.runs if (found := _earlier_result(asked, run)) is not None}
    missing = [run for run in asked.runs if run not in results]
    _announce(asked, len(results))
    jobs = [_prepare(asked, run) for run in missing]
    failed: list[Run] = []
    try:
        with terminable():
            ended = run_on_ray(jobs, options.gpus_per_run) if options.ray and jobs else run_here(jobs, options.jobs)
            # At once, whatever comes up: whoever stops taking them ends those that are running.
            with contextlib.closing(ended), follow_command("Sweep", len(asked.runs), len(results)) as advance:
                for one in ended:
                    run = missing[one.place]
                    record = _take_result(asked, run, one)
                    if record is None:
                        failed.append(run)
                    else:
                        results[run] = record
                    _tell(asked, run, one, record, len(results) + len(failed))
                    advance()
    except KeyboardInterrupt as stop:
        sys.stderr.write(
            f"lightning-stable: interrupted; the same command goes on. {len(results)} of {len(asked.runs)} runs have "
            "ended.\n"
        )
        return _TERMINATED if isinstance(stop, Terminated) else _INTERRUPTED
    _report(asked, results, failed)
    return 1 if failed else 0


def _ask(options: argparse.Namespace, overrides: list[str]) -> _Sweep:
    """Check what is asked for, and that the folder is free or holds the same."""
    for name, value, lowest in (("--jobs", options.jobs, 1), ("--gpus-per-run", options.gpus_per_run, 0)):
        if value < lowest:
            raise CommandError(f"{name} {value}: give a number from {lowest} on.")
    if not 0 < options.diverged_at < float("inf"):
        raise CommandError(f"--diverged-at {options.diverged_at}: a share is above 0. 0.25 is usual.")
    configs = config_paths(options.config)
    runs = make_grid(options.precision, options.lr, parse_seeds(options.seeds))
    check_rate_key(options.lr_key, configs, overrides)
    folder = Path(options.out)
    texts = [Path(resolve_config(config)[0]).read_bytes() for config in configs]
    settings = {
        "config": configs,
        "contents": [hashlib.sha256(text).hexdigest() for text in texts],
        "options": overrides,
        "lr-key": options.lr_key,
        "metric": options.metric,
    }
    before = read_json(folder / "settings.json")
    # What was only tried, and gave no result, is in nobody's way.
    if before is not None and before != settings and any(folder.glob(f"runs/*/{RESULT_NAME}")):
        other = ", ".join(name for name in settings if before.get(name) != settings[name])
        raise CommandError(
            f"--out {options.out} holds a sweep that differs in: {other}. Its runs do not go with these: give another "
            "--out, or delete it."
        )
    write_json(folder / "settings.json", settings)
    return _Sweep(options, configs, overrides, runs, folder)


def _announce(asked: _Sweep, before: int) -> None:
    """Say what will run, before the first run ends."""
    options, runs = asked.options, asked.runs
    parts = (("precision", {run.precision for run in runs}), ("rate", {run.lr for run in runs}))
    counts = [*((name, len(values)) for name, values in parts), ("seed", len({run.seed for run in runs}))]
    grid = " x ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts)
    where = "by Ray" if options.ray else f"{min(options.jobs, len(runs))} at a time on this machine"
    _say(f"{len(runs)} run{'s' if len(runs) > 1 else ''} ({grid}), {where}. Results: {short_path(asked.folder)}")
    if before:
        _say(f"{before} of {len(runs)} runs in {short_path(asked.folder)} have ended before.")
    callbacks = trainer_parts("callbacks", asked.configs)
    for precision in dict.fromkeys(run.precision for run in runs):
        if without := left_out(precision, callbacks):
            names = " and ".join(dict.fromkeys(class_name(callback) for callback in without))
            _say(f"Runs in {precision} are without {names}: they have no simulated format.")


def _earlier_result(asked: _Sweep, run: Run) -> dict[str, Any] | None:
    """Return what a run recorded if it has ended before.

    Raises:
        CommandError: If its folder has the result of another run.
    """
    folder = asked.place(run)
    found = read_json(folder / RESULT_NAME)
    if found is None:
        return None
    other = [f"{name} {found.get(name)!r}" for name, value in run._asdict().items() if found.get(name) != value]
    if other:
        raise CommandError(
            f"{folder} is the folder of the run {run}, and the {RESULT_NAME} in it is of another one, with "
            f"{', '.join(other)}. Delete that folder, or give another --out."
        )
    return found


def _prepare(asked: _Sweep, run: Run) -> Job:
    """Write a run's config, and return what starts it."""
    folder = asked.place(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_NAME).unlink(missing_ok=True)
    config = run_config(run, folder, asked.configs, asked.options.metric)
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return Job(command_of(run, folder, asked.configs, asked.options.lr_key, asked.overrides), str(folder), {})


def _take_result(asked: _Sweep, run: Run, ended: Ended) -> dict[str, Any] | None:
    """Return what a run recorded, kept so that it counts as ended; ``None`` if it failed.

    Raises:
        CommandError: If its command line or config was wrong.
    """
    folder = asked.place(run)
    if ended.code == _WRONG_USE:
        said, key = _last_line(folder), asked.options.lr_key
        hint = f" The rate is set by --lr-key {key}. {rate_keys(asked.configs)}" if _names(said, key) else ""
        raise CommandError(f"The run {run} cannot begin: {said}{hint} Its output: {short_path(folder / LOG_NAME)}")
    record = read_json(folder / RECORD_NAME) if ended.code == 0 else None
    if record is None:
        return None
    record = {**run._asdict(), **record, "seconds": round(ended.seconds, 1)}
    write_json(folder / RESULT_NAME, record)
    if not asked.options.keep_checkpoints:
        for checkpoint in folder.rglob("*.ckpt"):
            checkpoint.unlink()
    return record


def _names(said: str, key: str) -> bool:
    """Tell whether an error is about a key."""
    return any(f"'{name}'" in said for name in (key, key.rpartition(".")[2]))


def _last_line(folder: Path) -> str:
    """Return the last error that a run printed, in short, or else its last line."""
    lines = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()] or ["it printed nothing."]
    errors = [line for line in said if line.startswith(_ERROR)] or said
    return textwrap.shorten(errors[-1].removeprefix(_ERROR), _LONGEST)


def _tell(asked: _Sweep, run: Run, ended: Ended, record: dict[str, Any] | None, count: int) -> None:
    """Print a line on a run that is over."""
    if record is None:
        said = f"failed with exit code {ended.code}, see {short_path(asked.place(run) / LOG_NAME)}"
    else:
        why = divergence(record, asked.options.diverged_at)
        said = f"diverged: {why}" if why else f"{record['metric']} {record['final']:.4g}"
    _say(f"[{count}/{len(asked.runs)}] {run}: {said} ({ended.seconds:.0f} s)")


def _report(asked: _Sweep, results: dict[Run, dict[str, Any]], failed: list[Run]) -> None:
    """Print and write the table, and draw the map."""
    share, metric = asked.options.diverged_at, asked.options.metric
    cells = make_cells(asked.runs, results, failed, share)
    table = markdown_table(cells, metric)
    (asked.folder / "table.md").write_text(table, encoding="utf-8")
    write_json(asked.folder / "sweep.json", all_results(asked.runs, results, failed, cells, share))
    _say(f"\n{table}")
    picture = asked.folder / "heatmap.png"
    try:
        draw_map(cells, picture, f"{', '.join(asked.options.config)}: share of runs that diverged", metric)
        _say(f"Heat map: {short_path(picture)}")
    except ModuleNotFoundError as error:
        _say(str(error))
    _say(f"All results: {short_path(asked.folder / 'sweep.json')}")
    if failed:
        place = asked.place(failed[0])
        sys.stderr.write(
            f"{_ERROR}{len(failed)} of {len(asked.runs)} runs failed. The first of them, {failed[0]}, "
            f"ended with: {_last_line(place)} Its output: {short_path(place / LOG_NAME)}. The same command again runs "
            "those that failed.\n"
        )


def _say(text: str) -> None:
    """Print a line at once, so that a long sweep can be followed in a file."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
