"""What the contracts found for each method, collected from the reports of a run and written as JSON.

The file::

    {"date": ..., "versions": {...}, "methods": {"ema": {"kind": "callback", "contracts": {
        "resume": {"finding": "passed", "counts": {"passed": 3}, "cases": {"batch end": "passed", ...}, "reasons": {}},
        "any module": {"finding": "passed", "counts": {"passed": 4, "refused": 2}, "cases": {...}, "reasons": {...}},
        ...}}}}

A finding is ``"passed"``; ``"refused"``, where the plugin said clearly that it does not work there, as its row said;
``"expected failure"``, where the row gives the reason; ``"failed"``; or ``"skipped"``. That of a contract is the worst
of its cases, and ``"refused"`` only if all are. Cases of ``company`` are the other methods. There is nothing of what
did not run.
"""

import datetime
import json
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from lightning_stable.registry import METHODS
from lightning_stable.testing.terms import CONTRACTS, terms_of

__all__ = ["PROPERTY", "Capabilities", "subject_of"]

PROPERTY = "lightning_stable_contract"
"""The name of the property of a report that says what was tested."""

_FROM_BEST = ("refused", "passed", "skipped", "expected failure", "failed")


def subject_of(item: pytest.Item) -> dict[str, Any] | None:
    """Return what a test of the suite is about, in values that cross processes; of another test, nothing."""
    found = terms_of(getattr(item, "function", None))
    callspec, suite = getattr(item, "callspec", None), getattr(item, "cls", None)
    if found is None or callspec is None or suite is None:
        return None
    row, other = callspec.params["row"], callspec.params.get("other")
    case = str(callspec.params.get(found.argument, found.label))
    if other is None:
        refusal = row.settings.refused_modules.get(case, "") if found.contract == "any module" else ""
        about = [(row.name, row.kind, case)]
    else:
        refusal = row.settings.conflicts.get(other.name) or other.settings.conflicts.get(row.name) or ""
        own = {each.name for each in suite.rows}
        pairs = [(row, other), (other, row)]
        about = [(one.name, one.kind, partner.name) for one, partner in pairs if one.name in own]
    return {"contract": found.contract, "refusal": refusal, "about": about}


class Capabilities:
    """A plugin of the process that reports: collects what reports say, and writes the file at the end.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: dict[str, str] = {}
        self.found: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what a test found, in this process or in one of pytest-xdist."""
        subject = dict(report.user_properties).get(PROPERTY)
        if isinstance(subject, dict) and (report.when == "call" or not report.passed):
            finding = _finding(report, str(subject["refusal"]))
            for method, kind, case in subject["about"]:
                self.kinds[method] = kind
                cases = self.found.setdefault(method, {}).setdefault(subject["contract"], {})
                # A pair is tested in both orders.
                cases[case] = max(cases.get(case, finding), finding, key=lambda each: _FROM_BEST.index(each[0]))

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Write the file; if nothing ran, leave it as it is."""
        if self.found:
            self.path.write_text(self.text(), encoding="utf-8")

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where it is."""
        said = f"capabilities of {len(self.found)} methods are in {self.path}"
        terminalreporter.write_line(said if self.found else f"no contract ran: {self.path} was not written")

    def text(self) -> str:
        """Return the content of the file: a line for each contract of each method."""
        methods = [
            f'  {json.dumps(name)}: {{"kind": {json.dumps(self.kinds[name])}, "contracts": {{\n'
            + ",\n".join(
                f"    {json.dumps(contract)}: {json.dumps(_summary(self.found[name][contract]))}"
                for contract in CONTRACTS
                if contract in self.found[name]
            )
            + "\n  }}"
            for name in sorted(self.found, key=_place)
        ]
        head = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "versions": _versions()}
        return json.dumps(head)[:-1] + ', "methods": {\n' + ",\n".join(methods) + "\n}}\n"


def _finding(report: pytest.TestReport, refusal: str) -> tuple[str, str]:
    """Return what a test found, with the reason if there is one."""
    if hasattr(report, "wasxfail") and report.skipped:
        return "expected failure", str(report.wasxfail).removeprefix("reason: ")
    if report.failed:
        return "failed", ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        return "skipped", str(reason).removeprefix("Skipped: ")
    return ("refused", refusal) if refusal else ("passed", "")


def _summary(cases: dict[str, tuple[str, str]]) -> dict[str, Any]:
    findings = [finding for finding, _ in cases.values()]
    return {
        "finding": max(findings, key=_FROM_BEST.index),
        "counts": dict(sorted(Counter(findings).items())),
        "cases": {case: cases[case][0] for case in sorted(cases)},
        "reasons": {case: cases[case][1] for case in sorted(cases) if cases[case][1]},
    }


def _place(name: str) -> tuple[int, str]:
    """Return what sorts methods: ours first, in the order of the registry."""
    ours = [method.name for method in METHODS]
    return (ours.index(name) if name in ours else len(ours), name)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("lightning-stable", "lightning", "torch", "torchmetrics", "peft", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
