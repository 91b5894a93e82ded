"""Which methods can run here, and why the others cannot: each class is imported, and asked where it can be asked."""

from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

from lightning_stable._extensions import GROUP, extensions
from lightning_stable.cli._doctor_findings import Finding, Machine, MethodCheck, Package, first_line, quietly
from lightning_stable.cli._doctor_packages import is_harmful
from lightning_stable.registry import METHODS, Method, load_class

__all__ = ["DRAWS", "check_methods"]

# What every plugin is made from.
_HOST = ("packaging", "torch", "lightning")
# What all methods of a kind use, also where they import it only when they run.
_OF_KIND = {"metric": ("torchmetrics",), "peft": ("peft", "transformers")}

DRAWS = {
    "numerics_monitor": "no picture without matplotlib, only the tables",
    "stability_gap": "no picture without matplotlib, only the table and the file",
    "stability_report": "no pictures on the page without matplotlib, only the tables",
}
"""What methods do without matplotlib: those that draw."""


def check_methods(
    packages: Iterable[Package], machine: Machine, known: Iterable[Finding] = ()
) -> tuple[list[MethodCheck], list[Finding]]:
    """Return for each method whether it runs here, and what there is to say of those that should and do not.

    Args:
        packages: The packages, those that do not import marked.
        machine: What there is to compute with.
        known: What has been found of the packages, and need not be said again.
    """
    packages = list(packages)
    missing = {
        package.name: f"{package.name} is {'compromised' if package.status == 'bad' else package.status}"
        for package in packages
        if package.status in ("missing", "broken") or is_harmful(package)
    }
    told = {package.name for package in packages if package.status != "ok"} | {finding.subject for finding in known}
    rows = [(method, "") for method in METHODS]
    rows += [(method, extension.distribution) for extension in extensions() for method in extension.methods]
    found: list[MethodCheck] = []
    findings = _silent_extensions()
    for method, source in rows:
        check, finding = _check(method, machine, missing, told)
        found.append(check._replace(source=source))
        if finding is not None:
            # What a stranger's package does not keep is no fault of this installation.
            foreign = bool(source) and finding.level == "error"
            findings.append(finding._replace(level="warning") if foreign else finding)
    return found, findings


def _silent_extensions() -> list[Finding]:
    """Return a finding for each distribution that says it adds methods, of which none could be taken."""
    heard = {extension.distribution.partition(" ")[0] for extension in extensions()}
    named = {point.dist.name for point in entry_points(group=GROUP) if point.dist is not None}
    text = "says that it adds methods, and none of them can be taken. The reason is on the standard error output"
    return [Finding("warning", name, text, f"pip install --upgrade '{name}'") for name in sorted(named - heard)]


def _check(
    method: Method, machine: Machine, missing: Mapping[str, str], told: Collection[str]
) -> tuple[MethodCheck, Finding | None]:
    """Return whether one method runs, and a finding if it should and does not.

    Args:
        method: Its row.
        machine: What there is to compute with.
        missing: What is the matter with packages that cannot be used, by their names.
        told: The packages that have a finding of their own.
    """
    needed = (*_HOST, *_OF_KIND.get(method.kind, ()))
    lacking = [missing[name] for name in needed if name in missing]
    if lacking:
        return MethodCheck(method.name, method.kind, "no", ", ".join(lacking)), None
    try:
        with quietly():
            cls = load_class(method)
    except (Exception, SystemExit) as error:  # any fault of an installation shows here
        why = f"{method.class_path} does not load: {first_line(error)}"
        cure = "install lightning-stable again, or the package that is named"
        return MethodCheck(method.name, method.kind, "no", why), Finding("error", method.name, why, cure)
    check = MethodCheck(method.name, method.kind, "yes")
    if method.kind == "strategy":
        check = _check_strategy(check, machine)
    elif method.kind == "precision":
        return _check_precision(check, cls, machine, told)
    elif method.name in DRAWS and "matplotlib" in missing:
        check = check._replace(runs="limited", why=DRAWS[method.name])
    return check, Finding("warning", method.name, f"cannot run here: {check.why}") if check.runs == "no" else None


def _check_strategy(check: MethodCheck, machine: Machine) -> MethodCheck:
    """A strategy needs processes that can talk to each other."""
    works = [name for name, there in machine.backends.items() if there]
    if not works:
        return check._replace(runs="no", why="torch.distributed has no back end that works")
    if machine.gpus and "nccl" not in works:
        return check._replace(runs="limited", why="on CPUs only, over gloo: this torch has no nccl for the GPUs")
    if max(machine.processes.values()) == 1:
        return check._replace(runs="limited", why="one core here, which several processes would share")
    return check._replace(why=" and ".join(_over(name, machine) for name in works))


def _over(backend: str, machine: Machine) -> str:
    """Return which devices exchange over a back end."""
    if backend == "nccl":
        return "GPUs over nccl" + (" (there is one here)" if len(machine.gpus) == 1 else "")
    return f"CPUs over {backend}"


def _check_precision(
    check: MethodCheck, cls: Any, machine: Machine, told: Collection[str]
) -> tuple[MethodCheck, Finding | None]:
    """Ask the plugins on torchao: they know which version and which device they need."""
    import torch

    from lightning_stable.precision._torchao import TorchaoPrecision

    if not (isinstance(cls, type) and issubclass(cls, TorchaoPrecision)):
        return check, None
    try:
        plugin = cls()
    except ImportError as error:
        check = check._replace(runs="no", why=first_line(error))
        return check, None if {"torch", "torchao"} & set(told) else _of_the_extra(check)
    formats, refusals = [], []
    for device in _devices(machine):
        try:
            plugin._check_device(torch.device(device))
        except ValueError as error:
            refusals.append(first_line(error))
        else:
            formats.append(f"{plugin._format(torch.device(device))} on {device}")
    if not formats:
        return check._replace(runs="no", why="; ".join(refusals)), _of_the_devices(check.name, refusals)
    if _devices(machine) == ["cpu"]:
        formats.append("to be tried, not for speed")
    whole = not refusals and _devices(machine) != ["cpu"]
    return check._replace(runs="yes" if whole else "limited", why="; ".join([*formats, *refusals])), None


def _of_the_devices(name: str, refusals: Iterable[str]) -> Finding:
    """Return the finding of a method that no device here can compute. A refusal's second sentence is what to do."""
    reasons, _, cures = zip(*(refusal.rstrip(".").partition(". ") for refusal in refusals), strict=True)
    return Finding("warning", name, f"cannot run here: {'; '.join(reasons)}", cures[0])


def _of_the_extra(check: MethodCheck) -> Finding:
    """Return the finding of a method that lacks an optional package only; its message ends with the line to type."""
    why, _, cure = check.why.partition(": ")
    return Finding("note", check.name, f"cannot run here: {why}", cure)


def _devices(machine: Machine) -> list[str]:
    """Return the devices that a Trainer would take by itself."""
    if machine.gpus:
        return [f"cuda:{index}" for index in range(len(machine.gpus))]
    return ["mps"] if machine.mps else ["cpu"]
