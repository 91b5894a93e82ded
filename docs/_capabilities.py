"""The table of capabilities: what the contract suite found for each method, and what its card says of its cost.

``docs/capabilities.json`` is what ``pytest --capabilities docs/capabilities.json`` writes over the whole suite; the
docstring of ``lightning_stable.testing.capabilities`` says what is in it.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from _pages import CARDS, first_sentence, section

from lightning_stable.registry import METHODS

CAPABILITIES = Path(__file__).resolve().parent / "capabilities.json"

# The heading of a column, and the cases that it is about: of a contract those whose name has this in it.
COLUMNS = {
    "Two processes": ("two processes", ""),
    "bf16-mixed": ("precision", "bf16-mixed"),
    "bf16-true": ("precision", "bf16-true"),
    "Accumulation": ("oracle", "accumulation"),
    "Clipping": ("oracle", "clipping"),
    "Resume": ("resume", ""),
}
COUNTED = {"Modules": "any module", "Company": "company"}

# From best to worst: a cell over several cases says the worst of them.
_WORDS = {
    "passed": "yes",
    "skipped": "not run",
    "refused": "refused",
    "expected failure": "no",
    "failed": "**fails**",
}
_COUNTED_AS = {
    "passed": "work",
    "refused": "refused",
    "expected failure": "do not",
    "skipped": "not run",
    "failed": "**fail**",
}

_LEGEND = """\
- **Two processes**, under gloo: the ranks end bit-equal, and equal to one process that sees the same samples, or to
  what the card says.
- **bf16-mixed**, **bf16-true**, **Resume**: a run that is resumed equals the uninterrupted one bit by bit.
- **Accumulation**, **Clipping**: at each step the plugin did what an independent computation says.
- **Modules**: of the kinds of module and data of the suite, how many it works with, and how many it refuses.
- **Company**: the same, of the pairs with other methods.
- **refused** is a clear error that says why and what to do; **no** is a failure that is expected, whose reason is in
  the card; **–** means that the suite has no such case for it.
"""


def capabilities_page(path: Path = CAPABILITIES) -> str:
    """Return a row for each method with what the suite found, and one with what it costs."""
    written = _read(path)
    versions = ", ".join(f"{name} {number}" for name, number in written.get("versions", {}).items())
    run = f"Run on {written.get('date')} with {versions}." if written else "The suite has written nothing yet."
    heads = ["Method", *COLUMNS, *COUNTED]
    works = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    costs = ["| Method | What it costs, in short |", "|---|---|"]
    for method in METHODS:
        contracts = _cases(written, method.name)
        cells = [_worst(contracts.get(contract, {}), part) for contract, part in COLUMNS.values()]
        cells += [_counts(contracts.get(contract, {})) for contract in COUNTED.values()]
        works.append(f"| [{method.name}](methods/{method.name}.md#works-with) | {' | '.join(cells)} |")
        costs.append(f"| [{method.name}](methods/{method.name}.md#cost) | {_cost(method.name)} |")
    return "\n".join([run, "", *works, "", _LEGEND, "## Cost", "", *costs, ""])


def _read(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return written


def _cases(written: dict[str, Any], method: str) -> dict[str, dict[str, str]]:
    """Return the findings of a method by contract and case, none where it was not under contract."""
    contracts = written.get("methods", {}).get(method, {}).get("contracts", {})
    return {contract: found.get("cases", {}) for contract, found in contracts.items()}


def _worst(cases: dict[str, str], part: str) -> str:
    """Return one word for the cases whose name has a part in it."""
    findings = {finding for case, finding in cases.items() if part in case}
    return next((word for finding, word in reversed(_WORDS.items()) if finding in findings), "–")


def _counts(cases: dict[str, str]) -> str:
    """Return how many cases had which finding."""
    counts = Counter(cases.values())
    said = [f"{counts[finding]} {word}" for finding, word in _COUNTED_AS.items() if counts[finding]]
    return ", ".join(said) or "–"


def _cost(method: str) -> str:
    """Return the beginning of what the card says of the cost."""
    return first_sentence(section(CARDS / f"{method}.md", "Cost")).split(";")[0].rstrip(".").replace("|", "\\|")
