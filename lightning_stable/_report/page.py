"""Writes the page: one HTML file with everything in it, of one run or of several beside each other."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lightning_stable
from lightning_stable._report.charts import (
    gradient_charts,
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
    facts_of,
    loss_names,
    rule_of,
    training_loss,
    validation_names,
)
from lightning_stable._report.instruments import gap_charts, gap_table, numerics_maps, numerics_table, round_facts
from lightning_stable._report.read_json import FILE_NAME
from lightning_stable._report.run import MANY, Run, finite
from lightning_stable._report.settings import adapter_facts, environment
from lightning_stable._report.spikes import rule_in_words
from lightning_stable._report.tables import (
    Table,
    count_table,
    differing_settings,
    event_table,
    final_figures,
    per_run,
    spike_tables,
    sweep_table,
    table_of,
    tiles,
    verdict,
)
from lightning_stable._report.write import write_atomically

__all__ = ["Written", "write_page", "write_pictures"]

_HERE = Path(__file__).parent
# Of a picture's file: with four bytes each it leaves room for an end within the 255 that a file system takes.
_MOST_LETTERS = 60
# A word of a table beyond this may break, before a part of it that begins with a letter.
_LONG, _PART = 14, re.compile(r"(?<=\w[/._\[-])(?=[^\W\d_])")

_WITHOUT = "The callback StabilityReport records them: lightning-stable fit ... --config addon:stability_report"
_WAITING = f"They are in {FILE_NAME}, which is missing: StabilityReport writes it every half a minute of a run."

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
    if why:  # a heading with nothing below it says nothing
        sections = [section for section in (each._replace(charts=[]) for each in sections) if section.filled]
    jinja = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["parts"] = _parts
    text = jinja.get_template("page.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        runs=[(run.name, COLORS[place % len(COLORS)]) for place, run in enumerate(runs)] if len(runs) > 1 else [],
        tiles=tiles(runs[0], facts_of(runs[0])) if len(runs) == 1 else [],
        verdict=verdict(facts_of(runs[0])) if len(runs) == 1 else "",
        figures=final_figures(runs) if len(runs) > 1 else None,
        sections=sections,
        pictures=pictures,
        chart_id=id,
        missing=[*([f"This page has no pictures. {why}"] if why else []), *failed, *_not_recorded(runs)],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        version=lightning_stable.__version__,
    )
    write_atomically(path, text)
    return Written(path, why, tuple(failed))


def _parts(text: str) -> list[str]:
    """Divide text where a line may end within long names and paths; words and numbers stay whole."""
    return " ".join(_PART.sub("\0", word) if len(word) > _LONG else word for word in text.split(" ")).split("\0")


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
            path = _free_file(folder, chart.name, written)
            with _drawing(chart) as failed:
                save_png(chart, path)
            if not failed:
                written.append(path)
    return written


def _free_file(folder: Path, name: str, taken: Sequence[Path]) -> Path:
    """Return a file for a picture that no other one has: names of values may differ in what is not part of it."""
    short = name[:_MOST_LETTERS].rstrip("_") or "picture"
    ends = chain([""], (f"_{number}" for number in count(2)))
    return next(path for end in ends if (path := folder / f"{short}{end}.png") not in taken)


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
    differing, without_settings = differing_settings(runs)
    alone = runs[0] if len(runs) == 1 else None
    sections = [
        Section("loss", "Loss", _some(loss), tables=spike_tables(runs)),
        Section("validation", "Validation", [*validation_charts(runs)]),
        Section("rate", "Learning rate and speed", [*_some(rate), *_some(speed)]),
        Section(
            "gradients",
            "Gradients and what acted on them",
            [*gradient_charts(runs), *stabiliser_charts(runs)],
            tables=_some(count_table(runs)),
        ),
        Section("gap", "Stability gap", [*gap_charts(runs)], tables=_some(alone and table_of(gap_table(alone)))),
        Section(
            "numerics",
            "Numerics",
            _numerics_charts(runs),
            tables=_some(alone and table_of(numerics_table(alone), "The worst layers at the last report.")),
        ),
        Section("rounds", "Local steps and exchanges", [], **per_run(runs, round_facts)),
        Section("adapters", "Adapters", [], **per_run(runs, adapter_facts)),
        Section("sweep", "Sweep", [], tables=[table for run in runs for table in _some(sweep_table(run))]),
        Section("others", "Everything else that was logged", [*others], texts=_left_out(left_out)),
        Section("events", "Events", [], tables=_some(alone and event_table(alone))),
        Section("settings", "Settings", [], tables=differing, texts=without_settings, code=_config(alone)),
        Section("environment", "Versions and hardware", [], **per_run(runs, environment)),
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
    labels = [line.label for panel in chart.panels for line in panel.lines]
    have = [run.name for run in runs if any(label == run.name or label.startswith(f"{run.name} (") for label in labels)]
    if len(have) == len(runs):
        return ""
    return f"Only {' and '.join(have)} {'has' if len(have) == 1 else 'have'} these values."


def _not_recorded(runs: Sequence[Run]) -> list[str]:
    """Say what no logger writes, of the runs without the callback that does."""
    said: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.series and not run.record:
            what = "versions, hardware and the speed over the run"
            if run.seconds is None:  # event files of TensorBoard have times
                what = "versions, hardware, time and speed"
            waiting = any(name.startswith("stability_report/") for name in run.series)
            said.setdefault((what, _WAITING if waiting else _WITHOUT), []).append(run.name)
    return [
        f"Not recorded for {', '.join(names) if len(runs) > 1 else 'this run'}: {what}. {why}"
        for (what, why), names in said.items()
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
        if any(len(finite(loss.points)) >= MANY for loss in losses):
            texts.append(
                "A running median is, at each step, the median of the values within a fortieth of the run before and "
                f"after it. A loss with fewer than {MANY} values has none."
            )
        texts.append(
            "A run counts as diverged if its loss is not finite at the end, or if it has lost more than "
            f"{DIVERGED_AT:.0%} of what it had learnt. What it had learnt is how far the loss fell from the first 5% "
            "of the run to the lowest 5%, by their medians; what it lost is how far the last 5% lie above the lowest."
        )
    texts.append("Steps are finished optimizer steps. A logger counts from 0: its step 0 is step 1 here.")
    for run in runs:
        texts.append(f"{run.name}: read from {_listed(run.sources)}.")
        texts += [f"{run.name}: {note}" for note in run.notes]
    return texts


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
