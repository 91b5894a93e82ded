"""``lightning-stable doctor``: what is installed, what there is to compute with, and which methods can run here.

It works where torch or lightning is missing or broken: what fails is a finding, and never a traceback.

Exit code: 0 if all is well, 1 if something that is needed is missing, broken, out of range or known to be bad; with
``--strict`` 1 also for warnings, such as a method that this machine cannot run. Notes never count: they tell of what an
optional package would bring.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from lightning_stable.cli._doctor_findings import Diagnosis

__all__ = ["add_options", "diagnose", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    parser.description = (
        "Tell which versions are installed and which are needed, what there is to compute with, which methods can run "
        "here and why the others cannot, and what is known to be bad. More: 'lightning-stable show doctor'."
    )
    parser.epilog = (
        "Exit code: 0 all well; 1 something that is needed is missing, broken, out of range or known to be bad. "
        "Optional packages that are missing do not count."
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 for warnings, too, such as a method that this machine cannot run",
    )


def run(options: argparse.Namespace) -> int:
    """Look, and print what was found.

    Args:
        options: With ``json`` and ``strict``.

    Returns:
        1 if there is an error, with ``strict`` also if there is a warning, else 0.
    """
    from lightning_stable.cli._doctor_page import as_json, plain_lines

    with _patience():
        diagnosis = diagnose()
    if options.json:
        sys.stdout.write(as_json(diagnosis, strict=options.strict) + "\n")
    elif not (sys.stdout.isatty() and _print_tables(diagnosis)):
        sys.stdout.write("\n".join([*plain_lines(diagnosis), ""]))
    return diagnosis.exit_code(strict=options.strict)


def diagnose() -> Diagnosis:
    """Look at everything; what cannot be looked at is a finding."""
    from lightning_stable.cli._doctor_machine import check_machine
    from lightning_stable.cli._doctor_methods import check_methods
    from lightning_stable.cli._doctor_packages import check_packages, import_problems

    declared, findings = check_packages()
    packages, problems = import_problems(declared)
    torch_works = any(package.name == "torch" and package.status not in ("missing", "broken") for package in packages)
    machine, limits = check_machine(torch_works=torch_works)
    methods, faults = check_methods(packages, machine, findings)
    rank = {"error": 0, "warning": 1, "note": 2}
    found = sorted([*findings, *problems, *limits, *faults], key=lambda finding: rank[finding.level])
    return Diagnosis(tuple(packages), machine, tuple(methods), tuple(found))


def _print_tables(diagnosis: Diagnosis) -> bool:
    """Print tables; return whether Rich is there to do it."""
    try:
        import rich.table  # noqa: F401  it may be missing or broken, which is then among the findings
    except Exception:
        return False
    from lightning_stable.cli._doctor_page import print_tables

    print_tables(diagnosis)
    return True


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Show on a terminal that it takes some seconds, and wipe it out; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield
        return
    text = "Importing torch, lightning and the plugins, which takes some seconds"
    try:
        from rich.console import Console

        # The stream itself: what is looked at has its errors sent elsewhere, and the status would follow them.
        status: contextlib.AbstractContextManager[object] = Console(file=sys.stderr).status(text)
    except Exception:  # Rich may be missing or broken, which is then among the findings
        status = _plain_status(text)
    with status:
        yield


@contextlib.contextmanager
def _plain_status(text: str) -> Iterator[None]:
    """Show a line that does not move."""
    sys.stderr.write(f"{text} ...")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r\033[K")
