"""What ``lightning-stable doctor`` prints: tables on a terminal, plain lines elsewhere, JSON for scripts."""

import json
from collections.abc import Iterator

import lightning_stable
from lightning_stable.cli._doctor_findings import Diagnosis, Finding, Machine, MethodCheck, Package

__all__ = ["as_json", "plain_lines", "print_tables", "verdict"]

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan", "no": "yellow", "limited": "cyan", "yes": "green"}
_STATES = {"ok": "green", "missing": "yellow", "outside": "bold red", "bad": "bold red", "broken": "bold red"}


def as_json(diagnosis: Diagnosis, *, strict: bool) -> str:
    """Return everything, for scripts."""
    content = {
        "version": lightning_stable.__version__,
        "exit_code": diagnosis.exit_code(strict=strict),
        "packages": [package._asdict() for package in diagnosis.packages],
        "machine": {**diagnosis.machine._asdict(), "gpus": [gpu._asdict() for gpu in diagnosis.machine.gpus]},
        "methods": [method._asdict() for method in diagnosis.methods],
        "findings": [finding._asdict() for finding in diagnosis.findings],
    }
    return json.dumps(content, indent=2)


def verdict(diagnosis: Diagnosis) -> str:
    """Return one line that sums up."""
    count = {level: sum(finding.level == level for finding in diagnosis.findings) for level in ("error", "warning")}
    able = sum(method.runs != "no" for method in diagnosis.methods)
    methods = f"{able} of {_counted(len(diagnosis.methods), 'method')} {'runs' if able == 1 else 'run'} here"
    parts = [_counted(number, level) for level, number in count.items() if number]
    return f"{', '.join(parts) or 'all well'}: {methods}"


def plain_lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yield one line for each thing, its kind first, and the findings and a verdict last."""
    rows: list[tuple[str, str, str, str]] = [
        *(("package", p.name, p.status, _version(p)) for p in diagnosis.packages),
        *(("machine", name, "", value) for name, value in _machine(diagnosis.machine)),
        *(("method", m.name, m.runs, _how(m)) for m in diagnosis.methods),
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for row in rows:
        yield "  ".join((*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3])).rstrip()
    yield from (_sentence(finding) for finding in diagnosis.findings)
    yield verdict(diagnosis)


def print_tables(diagnosis: Diagnosis) -> None:
    """Print the tables of a terminal. Of the methods that simply run there are the names only."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()

    def table(title: str, *columns: str) -> Table:
        return Table(*columns, title=title, title_justify="left", box=box.SIMPLE)

    packages = table("Packages", "name", "state", "version")
    for package in diagnosis.packages:
        colour = _STATES[package.status] if package.status != "missing" or package.extra else "bold red"
        packages.add_row(f"[bold]{package.name}[/]", f"[{colour}]{package.status}[/]", escape(_version(package)))
    machine = table("Machine", "what", "which")
    for name, value in _machine(diagnosis.machine):
        machine.add_row(f"[bold]{name}[/]", escape(value))
    methods = table("Methods", "name", "runs here", "how, or why not")
    for method in diagnosis.methods:
        if _how(method):
            colour = _COLOURS[method.runs]
            methods.add_row(f"[bold]{method.name}[/]", f"[{colour}]{method.runs}[/]", escape(_how(method)))
    for part in (packages, machine, methods):
        console.print(part)
    simply = [method.name for method in diagnosis.methods if not _how(method)]
    if simply:
        these = "This runs" if len(simply) == 1 else "These run"
        console.print(f"{these} here without a condition: {', '.join(simply)}.\n")
    for finding in diagnosis.findings:
        level, _, rest = _sentence(finding).partition(":")
        console.print(f"[{_COLOURS[level]}]{level}[/]:{escape(rest)}", highlight=False)
    console.print(f"[bold]{verdict(diagnosis)}[/]", highlight=False)


def _sentence(finding: Finding) -> str:
    return f"{finding.level}: {finding.subject} {finding.text}." + (f" To do: {finding.cure}" if finding.cure else "")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _how(method: MethodCheck) -> str:
    return "; ".join(part for part in (method.why, method.source and f"by {method.source}") if part)


def _version(package: Package) -> str:
    """Return the version of a package, and which one is needed."""
    needed = f"needs {package.needed}" if package.needed else ""
    extra = f"optional [{package.extra}]" if package.extra else ""
    return ", ".join(part for part in (package.installed or "", needed, extra) if part)


def _machine(machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield what there is, as names and texts."""
    yield "system", machine.system
    yield "python", machine.python
    threads = f", {_counted(machine.threads, 'thread')} of torch" if machine.threads is not None else ""
    yield "cpu", f"{_counted(machine.cores, 'core')}{threads}"
    if machine.threads is not None:
        yield "cuda", f"torch is built for {machine.cuda}" if machine.cuda else "torch is built without"
    for index, gpu in enumerate(machine.gpus):
        yield f"cuda:{index}", f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_gib} GiB"
    if machine.mps:
        yield "mps", "an Apple GPU"
    if machine.backends:
        yield "back ends", ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in machine.backends.items())
    yield "processes", ", ".join(f"{count} on {name}" for name, count in machine.processes.items())
    space = f", {machine.free_gib} GiB left" if machine.free_gib is not None else ""
    yield "folder", f"{machine.folder}: {'can' if machine.writable else 'cannot'} be written to{space}"
