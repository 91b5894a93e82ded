"""Writes the page: one HTML file with everything in it, of one run or of several beside each other."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lightning_stable
from lightning_stable._report.charts import (
    gradient_charts,
    is_smoothed,
    loss_chart,
    other_charts,
    rate_chart,
    speed_chart,
    stabiliser_charts,
    validation_charts,
)
from lightning_stable._report.draw import COLORS, Chart, HeatMap, as_svg, save_png
from lightning_stable._report.facts import (
    DIVERGED_AT,
    TRAINING,
    Facts,
    facts_of,
    gradient_spikes,
    loss_names,
    rule_of,
    span,
    training_loss,
    validation_names,
)
from lightning_stable._report.instruments import gap_charts, gap_table, numerics_maps, numerics_table, round_facts
from lightning_stable._report.run import LIVE, Run, finite
from lightning_stable._report.settings import adapter_facts, differences, environment
from lightning_stable._report.spikes import rule_in_words
from lightning_stable._report.write import write_atomically

__all__ = ["Written", "write_page", "write_pictures"]

_HERE = Path(__file__).parent
_MOST_SPIKES = 12

Picture = Chart | HeatMap


class Written(NamedTuple):
    """What was written.

    Attributes:
        page: The file.
        without_pictures: Why the page has no pictures; empty if it has.
        notes: Which pictures could not be drawn.
    """

    page: Path
    without_pictures: str
    notes: tuple[str, ...] = ()


class Table(NamedTuple):
    """A table of a section."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""


class Section(NamedTuple):
    """A section of the page: sections without anything in them are left out."""

    name: str
    title: str
    charts: list[Picture]
    facts: list[tuple[str, str]] = []  # noqa: RUF012  never changed
    tables: list[Table] = []  # noqa: RUF012  never changed
    texts: list[str] = []  # noqa: RUF012  never changed
    code: str = ""

    @property
    def filled(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.charts or self.facts or self.tables or self.texts or self.code)


def write_page(runs: Sequence[Run], path: Path) -> Written:
    """Write the page of some runs.

    Args:
        runs: At least one; of several each picture has a line for each.
        path: The file.
    """
    from jinja2 import Environment, FileSystemLoader

    sections = _sections(runs)
    pictures, why, failed = _pictures(sections)
    jinja = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = jinja.get_template("page.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=[(run.name, COLORS[place % len(COLORS)]) for place, run in enumerate(runs)] if len(runs) > 1 else [],
        tiles=_tiles(runs[0], facts_of(runs[0])) if len(runs) == 1 else [],
        verdict=_verdict(facts_of(runs[0])) if len(runs) == 1 else "",
        figures=_figures(runs) if len(runs) > 1 else None,
        sections=sections,
        pictures=pictures,
        chart_id=id,
        missing=[*([f"This page has no pictures. {why}"] if why else []), *failed, *_not_recorded(runs)],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        version=lightning_stable.__version__,
    )
    write_atomically(path, text)
    return Written(path, why, tuple(failed))


def write_pictures(runs: Sequence[Run], page: Path) -> list[Path]:
    """Write each picture of a page as a PNG of its own into a folder beside it, and return the files.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message says how to get it.
    """
    folder = page.with_name(f"{page.stem}_pictures")
    folder.mkdir(exist_ok=True)
    written: list[Path] = []
    for section in _sections(runs):
        for chart in section.charts:
            path = folder / f"{chart.name}.png"
            # Names of values may differ only in what no file name has.
            path = path if path not in written else folder / f"{chart.name}_{len(written)}.png"
            with _drawing(chart) as failed:
                save_png(chart, path)
            if not failed:
                written.append(path)
    return written


@contextmanager
def _drawing(chart: Picture) -> Iterator[list[str]]:
    """Draw a picture: one that fails, as of numbers that are too large for it, becomes a note."""
    failed: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a value that overflows; the page is made without anybody beside it
            yield failed
    except (ModuleNotFoundError, OSError):
        raise
    except Exception as error:
        failed.append(f"The picture {chart.title!r} could not be drawn: {type(error).__name__}: {error}")


def _pictures(sections: Sequence[Section]) -> tuple[dict[int, dict[str, str]], str, list[str]]:
    """Return the pictures by the chart's identity, the wide ones in two widths; why there are none; and notes."""
    found: dict[int, dict[str, str]] = {}
    notes: list[str] = []
    charts = [chart for section in sections for chart in section.charts]
    try:
        for place, chart in enumerate(charts):
            with _drawing(chart) as failed:
                drawn = {"narrow": as_svg(chart, f"p{place}n", wide=False)}
                if chart.wide:
                    drawn["wide"] = as_svg(chart, f"p{place}w", wide=True)
                found[id(chart)] = drawn
            notes += failed
    except ModuleNotFoundError as error:
        return {}, str(error), []
    return found, "", notes


def _sections(runs: Sequence[Run]) -> list[Section]:
    """Return the sections that have something in them."""
    loss, rate, speed = loss_chart(runs), rate_chart(runs), speed_chart(runs)
    drawn = {name for run in runs for name in [*validation_names(run), *loss_names(run)[:1], *TRAINING]}
    others, left_out = other_charts(runs, drawn)
    alone = runs[0] if len(runs) == 1 else None
    sections = [
        Section("loss", "Loss", _some(loss), tables=_spike_tables(runs)),
        Section("validation", "Validation", [*validation_charts(runs)]),
        Section("rate", "Learning rate and speed", [*_some(rate), *_some(speed)]),
        Section(
            "gradients",
            "Gradients and what acted on them",
            [*gradient_charts(runs), *stabiliser_charts(runs)],
            tables=_some(_counts(runs)),
        ),
        Section("gap", "Stability gap", [*gap_charts(runs)], tables=_some(alone and _table(gap_table(alone)))),
        Section(
            "numerics",
            "Numerics",
            _numerics_charts(runs),
            tables=_some(alone and _table(numerics_table(alone), "The worst layers at the last report.")),
        ),
        Section("rounds", "Local steps and exchanges", [], **_per_run(runs, round_facts)),
        Section("adapters", "Adapters", [], **_per_run(runs, adapter_facts)),
        Section("sweep", "Sweep", [], tables=[table for run in runs for table in _some(_sweep_table(run))]),
        Section("others", "Everything else that was logged", [*others], texts=_left_out(left_out)),
        Section("events", "Events", [], tables=_some(alone and _event_table(alone))),
        Section("settings", "Settings", [], tables=_some(_difference_table(runs)), code=_config(alone)),
        Section("environment", "Versions and hardware", [], **_per_run(runs, environment)),
        Section("reading", "How to read this page", [], texts=_explanations(runs)),
    ]
    for section in sections:
        for chart in section.charts:
            # One picture alone would stand beside an empty half.
            chart.wide = chart.wide or len(section.charts) == 1
            if len(runs) > 1 and isinstance(chart, Chart):
                chart.text = " ".join([*_some(chart.text), *_some(_whose(chart, runs))])
    return [section for section in sections if section.filled]


def _whose(chart: Chart, runs: Sequence[Run]) -> str:
    """Say which of several runs a picture is of, where it is not of all."""
    names = {line.label for panel in chart.panels for line in panel.lines}
    have = [run.name for run in runs if run.name in names]
    if len(have) == len(runs):
        return ""
    return f"Of {', '.join(have)} alone."


def _not_recorded(runs: Sequence[Run]) -> list[str]:
    """Say what no logger writes, of the runs without the callback that does."""
    names = [run.name for run in runs if run.series and not run.record]
    if not names:
        return []
    whose = ", ".join(names) if len(runs) > 1 else "this run"
    return [
        f"Of {whose}, versions, hardware, time and speed are not known: the callback StabilityReport records them "
        "(lightning-stable fit ... --config addon:stability_report)."
    ]


def _numerics_charts(runs: Sequence[Run]) -> list[Picture]:
    """Return the heat maps; of several runs each is called by its run."""
    maps = [(place, run, chart) for place, run in enumerate(runs) for chart in numerics_maps(run)]
    if len(runs) == 1:
        return [chart for _, _, chart in maps]
    named = ((f"{chart.name}_{place}", f"{run.name}: {chart.title}", chart) for place, run, chart in maps)
    return [replace(chart, name=name, title=title) for name, title, chart in named]


def _some(value: Any) -> list[Any]:
    return [value] if value else []


def _table(found: tuple[list[str], list[list[str]]] | None, caption: str = "") -> Table | None:
    return None if found is None else Table(*found, caption)


def _per_run(runs: Sequence[Run], facts: Any) -> dict[str, Any]:
    """Return facts of a single run as facts, those of several as a table with a column each."""
    if len(runs) == 1:
        return {"facts": facts(runs[0])}
    found = [dict(facts(run)) for run in runs]
    names = list(dict.fromkeys(name for each in found for name in each))
    if not names:
        return {}
    # A run of which nothing is known has no callback that would say it.
    rows = [[name, *(each.get(name, "-" if each else "not known") for each in found)] for name in names]
    return {"tables": [Table(["", *(run.name for run in runs)], rows)]}


def _tiles(run: Run, facts: Facts) -> list[tuple[str, str, str]]:
    """Return the headline: what, its value, and a remark."""
    tiles = []
    if facts.steps is not None:
        epochs = f"{facts.epochs} epoch{'s' if facts.epochs != 1 else ''}" if facts.epochs else ""
        tiles.append(("Optimizer steps", f"{facts.steps:,}", epochs))
    if facts.seconds is not None:
        pace = f"{facts.steps / facts.seconds:.3g} steps a second" if facts.steps and facts.seconds else ""
        tiles.append(("Time", span(facts.seconds), pace))
    if facts.loss is not None and facts.best_loss is not None:
        tiles.append(("Training loss", f"{facts.loss:.4g}", f"lowest {facts.best_loss:.4g}"))
    for name, last, best in [each for each in facts.validated if not each[0].endswith(LIVE)][:2]:
        tiles.append((name, f"{last:.4g}", f"best {best:.4g}"))
    if facts.spikes is not None:
        norms = len(gradient_spikes(run))
        tiles.append(("Loss spikes", str(facts.spikes), f"{norms} of the gradient norm" if run.record else ""))
    return tiles


def _verdict(facts: Facts) -> str:
    if facts.spikes is None:
        return ""
    return f"Diverged: {facts.diverged}." if facts.diverged else "Did not diverge."


def _figures(runs: Sequence[Run]) -> Table:
    """Return the final figures of several runs."""
    all_facts = [facts_of(run) for run in runs]
    validated = dict.fromkeys(name for facts in all_facts for name, _, _ in facts.validated)
    names = [name for name in validated if not name.endswith(LIVE)][:5]
    head = ["run", "steps", "epochs", "time", "training loss", "lowest", *names, "loss spikes", "diverged"]
    rows = []
    for run, facts in zip(runs, all_facts, strict=True):
        ends = {name: last for name, last, _ in facts.validated}
        numbers = [facts.loss, facts.best_loss, *(ends.get(name) for name in names)]
        cells = ["-" if number is None else f"{number:.4g}" for number in numbers]
        counts = ["-" if count is None else f"{count:,}" for count in (facts.steps, facts.epochs)]
        spikes = "-" if facts.spikes is None else str(facts.spikes)
        rows.append([run.name, *counts, span(facts.seconds), *cells, spikes, "yes" if facts.diverged else "no"])
    kept = [column for column in range(len(head)) if any(row[column] not in ("-", "not known") for row in rows)]
    return Table([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _spike_tables(runs: Sequence[Run]) -> list[Table]:
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


def _counts(runs: Sequence[Run]) -> Table | None:
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


def _sweep_table(run: Run) -> Table | None:
    if not run.sweep:
        return None
    rows = []
    for cell in run.sweep["cells"]:
        share = "no run" if cell["share"] is None else f"{cell['share']:.0%} of {cell['ended']}"
        middle = "-" if cell["median"] is None else f"{cell['median']:.4g}"
        rows.append([str(cell["precision"]), str(cell["lr"]), share, middle, str(cell["failed"] or 0)])
    head = ["precision", "learning rate", "diverged", "median at the end of the others", "failed"]
    return Table(head, rows, f"{len(run.sweep['runs'])} runs.")


def _event_table(run: Run) -> Table | None:
    rows = [[f"{event['step']:,}", str(event["what"])] for event in run.record.get("events", [])]
    return Table(["step", "what"], rows) if rows else None


def _difference_table(runs: Sequence[Run]) -> Table | None:
    if len(runs) < 2:
        return None
    rows = [[name, *values] for name, values in differences(runs)]
    head = ["setting", *(run.name for run in runs)]
    return Table(head, rows, "Settings in which the runs differ.") if rows else None


def _config(run: Run | None) -> str:
    return yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True) if run and run.settings else ""


def _left_out(names: Sequence[str]) -> list[str]:
    return [f"Not drawn: {', '.join(names)}."] if names else []


def _explanations(runs: Sequence[Run]) -> list[str]:
    """Say what the page's words mean, and what it was made from."""
    texts: list[str] = []
    losses = [loss for loss in map(training_loss, runs) if loss is not None]
    if losses:
        rules = dict.fromkeys(rule_in_words(rule_of(run)) for run in runs)
        texts += rules
        if any(is_smoothed(loss.points) for loss in losses):
            texts.append("The bold line of a loss is its running median over a fortieth of the run to each side.")
        texts.append(
            "A run counts as diverged if its loss ends, by the median of its last twentieth, above the lowest such "
            f"median by more than {DIVERGED_AT:.0%} of what it had learnt until then, or is not finite at its end."
        )
    texts.append("Steps are optimizer steps that are done; a logger counts from 0, which is 1 here.")
    for run in runs:
        texts.append(f"{run.name}: read from {_listed(run.sources)}.")
        texts += [f"{run.name}: {note}" for note in run.notes]
    return texts


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
