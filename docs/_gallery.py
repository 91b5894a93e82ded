"""The gallery of benchmark results: the newest of each benchmark on each machine, by topic, with its pictures."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# What a reader looks for, and which benchmarks answer it, in the order of the page.
TOPICS = {
    "Schedules and averages": ("wsd", "ema", "balanced_ema"),
    "Flat minima": ("sharpness_cost", "sharpness_effect"),
    "Spiking gradients": ("gradient_stabilisers", "gradient_overhead"),
    "One task after the other": ("stability_gap", "evaluation_cost"),
    "Slow links and faulty workers": (
        "co2_overlap",
        "time_to_loss",
        "co2_quality",
        "co2_quality_screening",
        "co2_memory",
        "compression",
        "robustness",
    ),
    "Low bits": ("lowbit_stability", "simulation_cost", "float8_gpu"),
    "Adapters": ("peft_convergence", "peft_init_cost"),
    "The package": ("import_time", "stability_report"),
}
OTHER = "Others"

# How reports say it where there is no table of aims: at the end of a line, in brackets, before the next aim.
_VERDICT = re.compile(r"\b(met|missed)\b(?=\s*[).;,|]|\s*\(|\s*$)", re.MULTILINE)
_CLAIM = re.compile(r"^[^|\n]*: (yes|no|undecided)\b", re.MULTILINE)


def newest_results(results: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """Return the newest result of each benchmark on each machine, with its file."""
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(results.glob("*.json")):  # a name begins with the benchmark and the date
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["benchmark"], machine_name(result["hardware"])] = path, result
    return list(found.values())


def benchmarks_page(results: Path = RESULTS) -> str:
    """Return one table over the newest results."""
    newest = newest_results(results)
    if not newest:
        return "This checkout holds no results yet. `make bench-NAME` writes them.\n"
    lines = ["| Topic | Benchmark | Date | Machine | Aims and claims |", "|---|---|---|---|---|"]
    for topic, chosen in _by_topic(newest):
        for number, (_, result) in enumerate(chosen):
            name = f"[{result['benchmark']}](#{_anchor(result)})"
            cells = ["" if number else topic, name, result["date"], machine_name(result["hardware"]), verdicts(result)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def reports_page(results: Path = RESULTS, pictures: str = "generated") -> str:
    """Return the report of each of the newest results, by topic, with its pictures.

    Args:
        results: Where the results lie.
        pictures: The folder that the pictures are copied to, as seen from the page that includes this one.
    """
    lines: list[str] = []
    anchors: set[str] = set()
    for topic, chosen in _by_topic(newest_results(results)):
        lines += [f"### {topic}", ""]
        for path, result in chosen:
            anchor, name = _anchor(result), result["benchmark"]
            # Of two machines the first has the anchor.
            lines += [] if anchor in anchors else [f"({anchor})=", ""]
            anchors.add(anchor)
            lines += [f"#### {name}, {result['date']}", "", _machine(result["hardware"]) + ".", ""]
            for picture in pictures_of(path):
                lines += [f"![The curves of {name}]({pictures}/{picture.name})", ""]
            lines += [*result.get("report", []), ""]
    return "\n".join([*lines, ""])


def pictures_of(result: Path) -> list[Path]:
    """Return the pictures beside a result: of its name, or of its name with something behind it."""
    return sorted(result.parent.glob(f"{result.stem}*.png"))


def copy_pictures(folder: Path, results: Path = RESULTS) -> None:
    """Copy the pictures of the newest results to a folder, those that changed."""
    for path, _ in newest_results(results):
        for picture in pictures_of(path):
            copy = folder / picture.name
            if not copy.exists() or copy.read_bytes() != picture.read_bytes():
                shutil.copyfile(picture, copy)


def verdicts(result: dict[str, Any]) -> str:
    """Say how many aims were met, which were missed, and what became of claims, as the result says it."""
    targets = result.get("targets", {})
    report = "\n".join(result.get("report", []))
    if targets:
        names = [name.replace("_", " ") for name, met in targets.items() if not met]
        said = [_count(len(targets) - len(names), len(targets), names)]
    else:
        words = _VERDICT.findall(report)
        said = [_count(words.count("met"), len(words), [])] if words else []
    if claims := _CLAIM.findall(report):
        counts = ", ".join(f"{claims.count(word)} {word}" for word in dict.fromkeys(claims))
        said.append(f"claims of papers: {counts}")
    return "; ".join(said) or "none set"


def _count(met: int, aims: int, missed: list[str]) -> str:
    if met == aims:
        return f"{aims} of {aims} met"
    return f"{met} of {aims} met, " + (f"**missed**: {', '.join(missed)}" if missed else f"**{aims - met} missed**")


def machine_name(hardware: dict[str, Any]) -> str:
    """Return what computed, and how many of it."""
    if gpu := hardware.get("gpu"):
        return str(gpu)
    return f"{hardware.get('cpu', 'unknown')}, {hardware.get('cores', '?')} cores"


def _by_topic(
    newest: list[tuple[Path, dict[str, Any]]],
) -> list[tuple[str, list[tuple[Path, dict[str, Any]]]]]:
    order = {name: (topic, place) for topic, names in TOPICS.items() for place, name in enumerate(names)}
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {topic: [] for topic in (*TOPICS, OTHER)}
    for path, result in sorted(newest, key=lambda each: order.get(each[1]["benchmark"], (OTHER, 0))[1]):
        groups[order.get(result["benchmark"], (OTHER, 0))[0]].append((path, result))
    return [(topic, chosen) for topic, chosen in groups.items() if chosen]


def _anchor(result: dict[str, Any]) -> str:
    return f"benchmark-{result['benchmark']}"


def _machine(hardware: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in hardware.get("versions", {}).items())
    return f"{machine_name(hardware)}; {versions}"
