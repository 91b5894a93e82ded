"""The headline and the tables of the page: figures of one run, or of several beside each other."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_stable._report.facts import Facts, facts_of, gradient_spikes, span, training_loss
from lightning_stable._report.run import LIVE, Run, finite
from lightning_stable._report.settings import differences
from lightning_stable._report.weights import AVERAGED, validated_weights, weights_that_differ

__all__ = [
    "Table",
    "count_table",
    "differing_settings",
    "event_table",
    "final_figures",
    "per_run",
    "spike_tables",
    "sweep_table",
    "table_of",
    "tiles",
    "verdict",
]

_MOST_SPIKES = 12


class Table(NamedTuple):
    """A table of a section."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""


def tiles(run: Run, facts: Facts) -> list[tuple[str, str, str]]:
    """Return the headline: what, its value, and what that is, which may take lines."""
    found = []
    if facts.steps is not None:
        epochs = f"{facts.epochs} epoch{'s' if facts.epochs != 1 else ''}" if facts.epochs else ""
        found.append(("Optimizer steps", f"{facts.steps:,}", epochs))
    if facts.seconds is not None:
        found.append(("Time", span(facts.seconds), _pace(run, facts)))
    if facts.loss is not None and facts.lowest_loss is not None:
        lowest = f"lowest {facts.lowest_loss:.4g}"
        end = _number(facts.last_loss)
        if facts.many:
            found.append(("Training loss", _number(facts.loss), f"median of the last 5%\nlast value {end}\n{lowest}"))
        else:
            found.append(("Training loss", end, f"last value\n{lowest}"))
    for name, last, remark in [each for each in facts.validated if not each.name.endswith(LIVE)][:2]:
        averaged = validated_weights(run, name) == AVERAGED
        what = f"last value{', averaged weights' if averaged else ''}\n{remark}" if remark else "never finite"
        found.append((name, _number(last), what))
    if facts.spikes is not None:
        norms = len(gradient_spikes(run))
        found.append(("Loss spikes", str(facts.spikes), f"{norms} of the gradient norm" if run.record else ""))
    return found


def _pace(run: Run, facts: Facts) -> str:
    """Return the speed, and what the time is from where no callback has measured it."""
    if run.record:
        return f"{facts.steps / facts.seconds:.3g} steps a second" if facts.steps and facts.seconds else ""
    logged = [points[place][0] for points in run.series.values() if points for place in (0, -1)]
    done = max(logged) - min(logged) if logged else 0
    speed = [f"{done / facts.seconds:.3g} steps a second"] if done and facts.seconds else []
    return "\n".join(["from the first to the last log", *speed])


def verdict(facts: Facts) -> str:
    if facts.spikes is None:
        return ""
    return f"Diverged: {facts.diverged}." if facts.diverged else "Did not diverge."


def final_figures(runs: Sequence[Run]) -> Table:
    """Return the final figures of several runs."""
    all_facts = [facts_of(run) for run in runs]
    validated = dict.fromkeys(each.name for facts in all_facts for each in facts.validated)
    names = [name for name in validated if not name.endswith(LIVE)][:5]
    losses = ["training loss, median of the last 5%", "lowest training loss"]
    head = ["run", "steps", "epochs", "time", *losses, *(f"last {name}" for name in names), "loss spikes", "diverged"]
    weights = {name: weights_that_differ(runs, name) for name in names}
    rows = []
    for run, facts in zip(runs, all_facts, strict=True):
        ends = {each.name: each.last for each in facts.validated}
        cells = [_number(facts.loss), _number(facts.lowest_loss)]
        for name in names:
            last, of = ends.get(name), weights[name].get(run.name, "").removesuffix(" weights")
            is_number = last is not None and math.isfinite(last)
            cells.append(f"{_number(last)} ({of})" if of and is_number else _number(last))
        counts = ["-" if count is None else f"{count:,}" for count in (facts.steps, facts.epochs)]
        spikes = "-" if facts.spikes is None else str(facts.spikes)
        took = span(facts.seconds).replace(" ", "\u00a0")
        rows.append([run.name, *counts, took, *cells, spikes, "yes" if facts.diverged else "no"])
    kept = [column for column in range(len(head)) if any(row[column] not in ("-", "not\u00a0known") for row in rows)]
    caption = "In brackets: which weights were validated." if any(weights.values()) else ""
    return Table([head[column] for column in kept], [[row[column] for column in kept] for row in rows], caption)


def spike_tables(runs: Sequence[Run]) -> list[Table]:
    """Return the highest spikes of each run's loss, and how often it was not finite."""
    rows = []
    for run in runs:
        loss = training_loss(run)
        if loss is None:
            continue
        name = [run.name] if len(runs) > 1 else []
        highest = sorted(loss.spikes, key=lambda spike: spike.limit - spike.value)[:_MOST_SPIKES]
        for step, value, limit in sorted(highest):
            rows.append([*name, f"{step:,}", f"{value:.4g}", f"{limit:.4g}"])
        if loss.not_finite:
            rows.append([*name, f"{loss.first_not_finite:,}", f"not finite, {loss.not_finite} times", "-"])
    head = [*(["run"] if len(runs) > 1 else []), "step", "loss", "limit"]
    return [Table(head, rows, "Spikes of the loss, the highest ones.")] if rows else []


def count_table(runs: Sequence[Run]) -> Table | None:
    """Return the last counts of what callbacks did to updates."""
    names = ("spike_guard/skipped", "spike_guard/clipped", "spike_guard/rewinds", "precision_fallback/count")
    known = [name for name in names if any(finite(run.of(name)) for run in runs)]
    if not known:
        return None
    rows = []
    for name in known:
        ends = [finite(run.of(name)) for run in runs]
        rows.append([name, *(f"{points[-1][1]:.0f}" if points else "-" for points in ends)])
    return Table(["count at the end", *(run.name if len(runs) > 1 else "" for run in runs)], rows)


def sweep_table(run: Run) -> Table | None:
    if not run.sweep:
        return None
    rows = []
    for cell in run.sweep["cells"]:
        share = "no run" if cell["share"] is None else f"{cell['share']:.0%} of {cell['ended']}"
        middle = "-" if cell["median"] is None else f"{cell['median']:.4g}"
        rows.append([str(cell["precision"]), str(cell["lr"]), share, middle, str(cell["failed"] or 0)])
    head = ["precision", "learning rate", "diverged", "median at the end of the others", "failed"]
    return Table(head, rows, f"{len(run.sweep['runs'])} runs.")


def event_table(run: Run) -> Table | None:
    rows = [[f"{event['step']:,}", str(event["what"])] for event in run.record.get("events", [])]
    return Table(["step", "what"], rows) if rows else None


def differing_settings(runs: Sequence[Run]) -> tuple[list[Table], list[str]]:
    """Return tables of the settings in which several runs differ, and which runs have none to compare.

    Configs are compared with configs. A run from Python has hyperparameters at most: they are compared with those of
    the others, which a logger writes besides the config.
    """
    if len(runs) < 2:
        return [], []
    with_config = [run for run in runs if run.config]
    bare = [run for run in runs if not run.config and run.hparams]
    neither = [run for run in runs if not run.settings]
    tables = [_differences(with_config, [run.config for run in with_config], "Settings in which the runs differ.")]
    if bare:
        having = [run for run in runs if run.hparams]
        plain = [{name: value for name, value in run.hparams.items() if name[:1] != "_"} for run in having]
        tables.append(_differences(having, plain, "Hyperparameters of the module in which the runs differ."))
    texts = [f"No settings are recorded for {_names(neither)}."] if neither else []
    if bare and with_config:
        texts.append(f"No config.yaml is recorded for {_names(bare)}: only the module's hyperparameters are compared.")
    return [table for table in tables if table is not None], texts


def _differences(runs: Sequence[Run], settings: list[dict[str, Any]], caption: str) -> Table | None:
    rows = [[name, *values] for name, values in differences(settings)]
    return Table(["setting", *(run.name for run in runs)], rows, caption) if rows else None


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(run.name for run in runs)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def per_run(runs: Sequence[Run], facts: Any) -> dict[str, Any]:
    """Return facts of a single run as facts, those of several as a table with a column for each that has some."""
    if len(runs) == 1:
        return {"facts": facts(runs[0])}
    found = [(run, dict(facts(run))) for run in runs]
    having = [(run, each) for run, each in found if each]
    names = list(dict.fromkeys(name for _, each in having for name in each))
    if not names:
        return {}
    rows = [[name, *(each.get(name, "-") for _, each in having)] for name in names]
    others = [run for run, each in found if not each]
    texts = [f"Nothing of this is recorded for {_names(others)}."] if others else []
    return {"tables": [Table(["", *(run.name for run, _ in having)], rows)], "texts": texts}


def table_of(found: tuple[list[str], list[list[str]]] | None, caption: str = "") -> Table | None:
    return None if found is None else Table(*found, caption)
