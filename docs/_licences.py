"""Write ``licences.md``: the licence of everything that this library needs, from the metadata of what is installed.

    python docs/_licences.py

Run it with all extras installed, as in the folder that ``make test`` makes, when a dependency is added. It ends with 1
and writes nothing if a licence is not known to go with Apache-2.0. Versions are left out: they change more often than
licences do.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
OURS = "lightning-stable"

# Ask for the copyright notice and the text of the licence to be kept, and no more.
PERMISSIVE = {
    *(
        "0BSD",
        "Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "BSD",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSL-1.0",
        "CNRI-Python",
    ),
    *("CC0-1.0", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
}
# Ask, besides, for changes of their own files to be given away (MPL) or marked (Artistic).
BY_FILE = {"Artistic", "MPL-2.0"}

# How metadata say it in other words, without "License" and what is around it.
_WORDS = (
    (r"apache.*2|^apache( software)?$", "Apache-2.0"),
    (r"bsd.*3|3-clause bsd|new bsd|modified bsd", "BSD-3-Clause"),
    (r"bsd.*2|2-clause bsd|simplified bsd", "BSD-2-Clause"),
    (r"^bsd$", "BSD"),
    (r"mozilla.*2\.0|mpl.*2", "MPL-2.0"),
    (r"python software foundation|^psf", "PSF-2.0"),
    (r"^isc", "ISC"),
    (r"^artistic", "Artistic"),
    (r"historical permission|hpnd", "HPND"),
    (r"unlicense", "Unlicense"),
    (r"^(the )?mit\b", "MIT"),
)
# What the text of a licence says, for packages that name it nowhere else.
_TEXTS = (
    ("Apache License", "Apache-2.0"),
    ("Neither the name of", "BSD-3-Clause"),
    ("Redistributions in binary form must", "BSD-2-Clause"),
    ("Permission is hereby granted, free of charge", "MIT"),
    ("Mozilla Public License Version 2.0", "MPL-2.0"),
)

_HEAD = """\
# Licences

lightning-stable is under the [Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0). It is installed beside
the packages below and contains none of their code. Each has a licence that goes with ours: permissive ones ask for
their notices to be kept, and those "by file" ask, besides, for changes of their own files to be given away or marked,
which nothing here makes. Who ships them together, as in a container image, keeps the notices of all. Of a package that
offers a choice of licences the one that goes with ours is named.

The lists are made by `python docs/_licences.py` from what the packages say of themselves, in the versions that
continuous integration installs, with torch for the CPU. torch for NVIDIA GPUs brings CUDA's libraries, which are under
NVIDIA's own terms and are no free software. The lists are no legal advice.

"""


def declared() -> dict[str, list[Requirement]]:
    """Return what ``pyproject.toml`` declares: under ``""`` what is always needed, and each extra."""
    core = ProjectMetadata(str(ROOT), PluginManager()).core
    groups = {"": core.dependencies, **core.optional_dependencies}
    parsed = {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}
    return {extra: [item for item in items if item.name != OURS] for extra, items in parsed.items()}


def find(name: str) -> Distribution | None:
    """Return an installed distribution, ``None`` without one."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def licence(package: Distribution) -> str:
    """Return the licence of a package as an SPDX expression where it can be told, else ``"unknown"``."""
    expression = package.metadata.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = [line for line in package.metadata.get_all("Classifier") or [] if "OSI Approved" in line]
    said = [line.rpartition("::")[2] for line in classifiers]
    field = str(package.metadata.get("License") or "").strip()
    if field in PERMISSIVE | BY_FILE:
        return field
    # The longest list is the most exact one: a classifier "BSD License" leaves open which.
    texts = ([field] if field and "\n" not in field else []) + said
    found = [name for text in texts for name in [_word(text)] if name]
    exact = [name for name in found if name != "BSD"]
    return (exact or [_by_text(package)] if "BSD" in found or not found else exact)[0] or "BSD"


def _word(text: str) -> str:
    plain = re.sub(r"\blicen[sc]ed?\b|\bclause license\b|[()]", "", text, flags=re.IGNORECASE).strip().lower()
    return next((name for pattern, name in _WORDS if re.search(pattern, plain)), "")


def _by_text(package: Distribution) -> str:
    """Return the licence whose words are in a file that the package carries."""
    for file in package.files or []:
        if re.search(r"dist-info/(licenses/)?(licen[sc]e|copying)[^/]*$", str(file), flags=re.IGNORECASE):
            text = " ".join(file.read_text(encoding="utf-8").split())
            return next((name for words, name in _TEXTS if words in text), "unknown")
    return "unknown"


def judge(expression: str) -> str:
    """Return ``"permissive"``, ``"by file"``, or ``""`` for what is not known to go with Apache-2.0."""
    worst = "permissive"
    for part in re.split(r"\s+AND\s+", expression.replace("(", "").replace(")", "")):
        choices = {choice.strip() for choice in re.split(r"\s+OR\s+", part)}
        if choices & PERMISSIVE:
            continue
        if not choices & BY_FILE:
            return ""
        worst = "by file"
    return worst


def needed_by(requirements: Iterable[Requirement]) -> Iterator[str]:
    """Yield the names of everything that comes along with these requirements, and of what comes with that."""
    seen: set[tuple[str, str]] = set()
    todo = [(item.name, extra) for item in requirements for extra in ("", *item.extras)]
    while todo:
        name, extra = todo.pop()
        key = (canonicalize_name(name), extra)
        package = find(name)
        if key in seen or package is None:
            continue
        seen.add(key)
        yield key[0]
        for line in package.requires or []:
            item = Requirement(line)
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                todo += [(item.name, inner) for inner in ("", *item.extras)]


def rows() -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return name, purpose and licence of what is declared, and of what else comes along with that for users."""
    groups = declared()
    purposes: dict[str, list[str]] = {}
    for extra, items in groups.items():
        for item in items:
            purposes.setdefault(canonicalize_name(item.name), []).append(f"`[{extra}]`" if extra else "always")
    users = [item for extra, items in groups.items() if extra not in ("dev", "docs") for item in items]
    along = sorted(set(needed_by(users)) - set(purposes) - {OURS})
    direct = [(name, ", ".join(purposes[name]), _licence_of(name)) for name in sorted(purposes)]
    return direct, [(name, "", _licence_of(name)) for name in along]


def _licence_of(name: str) -> str:
    package = find(name)
    return "not installed" if package is None else licence(package)


def page(direct: list[tuple[str, str, str]], along: list[tuple[str, str, str]]) -> str:
    """Return the page."""
    lines = ["## Declared", "", "| Package | Needed | Licence | Kind |", "|---|---|---|---|"]
    lines += [f"| {name} | {purpose} | {text} | {judge(text)} |" for name, purpose, text in direct]
    lines += ["", "## What comes along", "", "With what users install: the packages above need them."]
    lines += ["", "| Package | Licence | Kind |", "|---|---|---|"]
    lines += [f"| {name} | {text} | {judge(text)} |" for name, _, text in along]
    return _HEAD + "\n".join([*lines, ""])


def main() -> int:
    """Write the page."""
    direct, along = rows()
    wrong = [f"{name}: {text}" for name, _, text in (*direct, *along) if not judge(text)]
    if wrong:
        sys.stderr.write("Not known to go with Apache-2.0:\n" + "\n".join(wrong) + "\n")
        return 1
    PAGE.write_text(page(direct, along), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
