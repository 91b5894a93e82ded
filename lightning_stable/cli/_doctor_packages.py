"""The packages that the installed distribution declares: there, in range, not known to be bad, and importable."""

import importlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import lightning_stable
from lightning_stable.cli._doctor_findings import Finding, Package, first_line, quietly

__all__ = ["KNOWN_BAD", "KnownBad", "check_packages", "import_problems", "is_harmful"]

DISTRIBUTION = "lightning-stable"
# For people who work on the library itself.
_DEVELOPERS = ("dev", "docs")
# Packages that a command can use and that no extra brings: what for.
_BESIDE = {"ray": "sweep --ray"}
# What is looked for where no declaration can be read.
_WITHOUT_DECLARATION = (
    *(
        "lightning",
        "torch",
        "torchmetrics",
        "peft",
        "transformers",
        "omegaconf",
        "jsonargparse",
        "rich",
        "scikit-learn",
    ),
)
# What an optional package is for.
_PURPOSES = {
    "bitsandbytes": "adapters in a base of 4 bits",
    "matplotlib": "pictures and reports",
    "pytorch-optimizer": "configs that name one of its optimizers",
    "tensorboard": "TensorBoardLogger",
    "torchao": "Float8Precision and Int8Precision",
}
# What cannot be imported without torch: not tried then, for it would only say the same again.
_ON_TORCH = ("lightning", "peft", "torchmetrics", "transformers")
# What the import of a package is called, where it is not its name.
_MODULES = {
    "lightning": "lightning.pytorch",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


class KnownBad(NamedTuple):
    """Versions that must not be used.

    Attributes:
        name: The package.
        versions: A range, as pip writes it.
        text: What is wrong with them.
        cure: What to do.
        harmful: Whether importing them does harm: they are not even tried.
    """

    name: str
    versions: str
    text: str
    cure: str
    harmful: bool = False


KNOWN_BAD = (
    *(
        KnownBad(
            "lightning",
            f"=={version}",
            f"{version} is a compromised release: it steals credentials when it is imported",
            "do not import it; pip install 'lightning>=2.6.6', and replace every key and password on this machine",
            harmful=True,
        )
        for version in ("2.6.2", "2.6.3")
    ),
    KnownBad(
        "lightning",
        "<2.6.6",
        "runs code that a checkpoint holds while loading it (CVE-2026-58659)",
        "pip install 'lightning>=2.6.6'",
    ),
)
"""What the documents state of versions. The first row that holds is told."""


def check_packages() -> tuple[list[Package], list[Finding]]:
    """Return the declared packages with their state, and what there is to say of them. Nothing is imported."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        text = "is missing, so no version can be compared, and nothing else is looked at"
        return [Package("packaging", None, "", "", "missing")], [
            Finding("error", "packaging", text, "pip install packaging")
        ]
    findings: list[Finding] = []
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        lines, extras = list(_WITHOUT_DECLARATION), []
        text = "is not installed but run from its folder, so the versions that it needs are not known"
        findings.append(Finding("warning", DISTRIBUTION, text, "pip install . in that folder"))
    else:
        lines, extras = distribution.requires or [], distribution.metadata.get_all("Provides-Extra") or []
        findings += _installation(distribution.version)
    declared = [Requirement(line) for line in lines]
    packages = [_look(*entry) for entry in _entries(declared, extras)]
    findings += [*_beside(), *(finding for package in packages for finding in _judge(package))]
    return packages, [*findings, *_beneath(packages, declared)]


def is_harmful(package: Package) -> bool:
    """Whether a package does harm when it is imported."""
    row = _known_bad(package.name, package.installed) if package.status == "bad" and package.installed else None
    return row is not None and row.harmful


def import_problems(packages: Iterable[Package]) -> tuple[list[Package], list[Finding]]:
    """Import what is installed and always needed; return the packages again, and a finding for each that fails.

    What is known to do harm is left alone. Optional packages are imported by what uses them.
    """
    packages, findings = list(packages), []
    states = {package.name: package.status for package in packages}
    no_torch = states.get("torch") == "missing"
    for package in sorted(packages, key=lambda package: package.name != "torch"):
        tried = package.installed is not None and not package.extra and not is_harmful(package)
        tried = tried and not (no_torch and package.name in _ON_TORCH)
        problem = _import_problem(package.name) if tried else None
        if problem is not None:
            no_torch = no_torch or package.name == "torch"
            cure = f"pip install --force-reinstall '{package.name}{package.needed}'"
            findings.append(Finding("error", package.name, f"{package.installed} does not import: {problem}", cure))
            states[package.name] = "broken"
    return [package._replace(status=states[package.name]) for package in packages], findings


def _entries(declared: list[Any], extras: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield name, range and extra of what a user's installation can have, without what is for other machines."""
    always = [item for item in declared if item.marker is None or item.marker.evaluate({"extra": ""})]
    yield from ((item.name, _range(item.specifier), "") for item in always)
    names = {item.name for item in always}
    for extra in (extra for extra in extras if extra not in _DEVELOPERS):
        for item in declared:
            if item.name not in names and item.marker.evaluate({"extra": extra}):
                yield item.name, _range(item.specifier), extra


def _range(specifier: Any) -> str:
    """Return a range as people write it, its lower bound first."""
    return ",".join(sorted((str(part) for part in specifier), reverse=True))


def _look(name: str, needed: str, extra: str) -> Package:
    from packaging.specifiers import SpecifierSet

    installed = installed_version(name)
    if installed is None:
        return Package(name, None, needed, extra, "missing")
    if _known_bad(name, installed) is not None:
        return Package(name, installed, needed, extra, "bad")
    inside = SpecifierSet(needed).contains(installed, prereleases=True)
    return Package(name, installed, needed, extra, "ok" if inside else "outside")


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, ``None`` without one; also where its metadata is damaged."""
    try:
        return importlib.metadata.version(name) or None
    except (importlib.metadata.PackageNotFoundError, KeyError, OSError):
        return None


def _known_bad(name: str, installed: str) -> KnownBad | None:
    from packaging.specifiers import SpecifierSet

    for row in KNOWN_BAD:
        if row.name == name and SpecifierSet(row.versions).contains(installed, prereleases=True):
            return row
    return None


def _judge(package: Package) -> Iterator[Finding]:
    """Yield what there is to say of a package."""
    name, needed = package.name, package.needed
    if package.status == "bad":
        row = _known_bad(name, package.installed or "")
        if row is not None:
            yield Finding("error", name, row.text if row.harmful else f"{package.installed} {row.text}", row.cure)
    elif package.status == "missing" and package.extra:
        cure = f"pip install '{DISTRIBUTION}[{package.extra}]'"
        text = f"is not installed. It is for {_PURPOSES.get(name, 'those who use its extra')}"
        yield Finding("note", name, text, cure)
    elif package.status == "missing":
        yield Finding(
            "error", name, f"is missing, and {needed or 'any version'} is needed", f"pip install '{name}{needed}'"
        )
    elif package.status == "outside":
        text = f"{package.installed} is installed, and {needed} is needed"
        yield Finding("warning" if package.extra else "error", name, text, f"pip install '{name}{needed}'")


def _beneath(packages: list[Package], declared: list[Any]) -> Iterator[Finding]:
    """Yield what is too old for an extra that is installed, though not for the rest."""
    states = {package.name: package for package in packages}
    for package in (package for package in packages if package.extra and package.installed):
        for item in declared:
            below = states.get(item.name)
            wanted = item.marker is not None and item.marker.evaluate({"extra": package.extra})
            if not wanted or below is None or below.extra or below.status != "ok":
                continue
            if not item.specifier.contains(below.installed, prereleases=True):
                needed = _range(item.specifier)
                text = f"{below.installed} is installed, and {package.name}, which is too, needs {needed}"
                yield Finding("warning", item.name, text, f"pip install '{item.name}{needed}'")


def _installation(installed: str) -> Iterator[Finding]:
    """Yield whether the code that runs is that of another version than the one that is installed."""
    if installed != lightning_stable.__version__:
        text = f"runs {lightning_stable.__version__} from {lightning_stable.__path__[0]}, and {installed} is installed"
        yield Finding("warning", DISTRIBUTION, text, "install it again, or leave the folder")


def _beside() -> Iterator[Finding]:
    """Yield what there is to say of packages that are not declared."""
    old, host = installed_version("pytorch-lightning"), installed_version("lightning")
    # Of a host that is to be replaced the other package is none to follow.
    if old is not None and host is not None and old != host and _known_bad("lightning", host) is None:
        text = (
            f"{old} is beside lightning {host}. Its classes are others: modules and callbacks made from them do not "
            "work with these plugins"
        )
        cure = f"import lightning.pytorch only; pip install 'pytorch-lightning=={host}'"
        yield Finding("warning", "pytorch-lightning", text, cure)
    for name, purpose in _BESIDE.items():
        if installed_version(name) is None:
            yield Finding("note", name, f"is not installed. It is for '{purpose}'", f"pip install {name}")


def _import_problem(name: str) -> str | None:
    """Return why a package does not import; ``None`` if it does."""
    module = _MODULES.get(name.lower(), name.replace("-", "_"))
    try:
        with quietly():
            importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a broken installation raises is what is asked for
        return first_line(error)
    return None
