"""What every benchmark shares: the machine in words, tables, and results as dated JSON."""

import argparse
import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["arguments", "hardware", "publish", "table", "verdict"]

_RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("lightning-stable", "lightning", "torch", "transformers")


def arguments(description: str | None, **flags: str) -> argparse.Namespace:
    """Parse the command line: ``--quick``, and the further switches ``flags`` with their help texts.

    Args:
        description: The script's docstring; its first line is shown.
        flags: Help text of each further switch.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, writes no result")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def hardware() -> dict[str, Any]:
    """Return the machine and the versions that the numbers belong to."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, the first one to the left."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(row) for row in cells[1:])])


def verdict(met: bool) -> str:
    """Return the words for a target."""
    return "met" if met else "missed"


def publish(name: str, text: str, result: dict[str, Any], *, quick: bool) -> None:
    """Print the report and, unless it is a smoke test, write ``results/<name>-<date>-<hardware>.json``.

    Args:
        name: Name of the benchmark.
        text: The printed report, also kept in the file.
        result: Settings, numbers and targets.
        quick: Whether this is a smoke test.
    """
    machine = hardware()
    print(
        f"\n{text}\n\n{machine['cpu']}, {machine['cores']} cores, python {machine['python']}, torch "
        f"{machine['versions']['torch']}, lightning {machine['versions']['lightning']}"
    )
    if quick:
        print("Smoke test: no result written.")
        return
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", f"{machine['cpu']} {machine['cores']} cores".lower()))
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"{name}-{today}-{slug.strip('-')}.json"
    content = {"benchmark": name, "date": today, "hardware": machine, **result, "report": text.splitlines()}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"Wrote {path.relative_to(_RESULTS.parent.parent)}")


def _cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
