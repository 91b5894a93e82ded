"""What is released: both distributions, what they declare and promise, and the tools that watch it."""

import ast
import functools
import importlib.metadata
import runpy
import subprocess
import sys
import tarfile
import types
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from lightning_stable.precision import _torchao

ROOT = Path(__file__).resolve().parents[1]
METADATA = ProjectMetadata(str(ROOT), PluginManager())
CORE = METADATA.core
# What an import is called, where it is not the name of its distribution.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}


@functools.cache
def sources():
    """The modules of the package, parsed as the oldest Python does it."""
    oldest = tuple(int(part) for part in nox()["PYTHONS"][0].split("."))
    files = [path for path in sorted((ROOT / "lightning_stable").rglob("*.py")) if "templates" not in path.parts]
    return {path: ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=oldest) for path in files}


# ----------------------------------------------------------------------------- distributions


def build(folder, out, *targets):
    words = [word for target in targets for word in ("-t", target)]
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel of the checkout, the folder of the unpacked source distribution, and the wheel that is made from it."""
    out = tmp_path_factory.mktemp("distributions")
    build(ROOT, out, "sdist", "wheel")
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(out, filter="data")
    folder = out / archive.name.removesuffix(".tar.gz")
    build(folder, out / "again", "wheel")
    (wheel,), (again,) = out.glob("*.whl"), (out / "again").glob("*.whl")
    return wheel, folder, again


def test_the_source_distribution_builds_the_same_wheel(distributions):
    wheel, _, again = distributions
    assert wheel.name == again.name

    def content(path):
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    first, second = content(wheel), content(again)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_the_source_distribution_has_what_a_packager_needs_and_no_litter(distributions):
    _, folder, _ = distributions
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "LICENSE",
        "SECURITY.md",
        "Makefile",
        "noxfile.py",
        "tests",
        "docs",
    ):
        assert (folder / name).exists(), name
    litter = ("__pycache__", ".venv", "runs", "checkpoints", "lightning_logs", "_build", ".git", "dist")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    # A project that the scaffold starts has files of such names; here they are templates.
    own = [path for path in files if "scaffold" not in path.parts and "plugin" not in path.parts]
    assert [path for path in own if set(path.parts) & set(litter) or path.suffix in (".ckpt", ".pyc")] == []


def test_the_metadata_say_what_is_promised(distributions):
    wheel, _, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        assert "lightning_stable/py.typed" in names
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = [line.rpartition(":: ")[2] for line in metadata.get_all("Classifier") if "Python :: 3." in line]
    assert classifiers == nox()["PYTHONS"]
    assert SpecifierSet(metadata["Requires-Python"]).contains(classifiers[0])
    assert not SpecifierSet(metadata["Requires-Python"]).contains("3.9")
    # Nothing but requirements of the package index: a wheel with a URL cannot be uploaded.
    assert [line for line in metadata.get_all("Requires-Dist") if Requirement(line).url] == []


def test_every_source_parses_on_the_oldest_python():
    assert nox()["PYTHONS"][0] == "3.10"
    assert len(sources()) > 200


def test_everything_that_is_imported_is_declared():
    always = {canonicalize_name(Requirement(line).name) for line in CORE.dependencies}
    extras = {
        canonicalize_name(Requirement(line).name)
        for extra, lines in CORE.optional_dependencies.items()
        for line in lines
        if extra not in ("dev", "docs")
    }
    missing = {}
    for path, tree in sources().items():
        for name in imported(tree):
            distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
            # The contract suite runs inside pytest, which is there then.
            inside_pytest = path.is_relative_to(ROOT / "lightning_stable" / "testing") and name == "pytest"
            if distribution not in always | extras and not inside_pytest:
                missing.setdefault(distribution, []).append(path.name)
    assert missing == {}


def imported(tree):
    """The third-party packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"lightning_stable"}


# ----------------------------------------------------------------------------- the matrix


class Session:
    """Takes down what a session of nox would do."""

    def __init__(self, *posargs):
        self.posargs = posargs
        self.installed = []
        self.commands = []

    def install(self, *words):
        self.installed += words

    def run(self, *words, **_):
        self.commands.append(words)


def nox():
    """The names of the noxfile; nox itself need not be installed for them."""

    def passing(*given, **_):
        return given[0] if given and callable(given[0]) else lambda function: function

    # As it is written: an extra names others there.
    project = {**METADATA.config["project"], "dependencies": CORE.dependencies}
    names = {
        "session": passing,
        "parametrize": passing,
        "options": types.SimpleNamespace(),
        "Session": Session,
        "project": types.SimpleNamespace(load_toml=lambda file: {"project": project}),
    }
    before = sys.modules.get("nox")
    sys.modules["nox"] = types.ModuleType("nox")
    vars(sys.modules["nox"]).update(names)
    try:
        return runpy.run_path(str(ROOT / "noxfile.py"))
    finally:
        del sys.modules["nox"]
        if before is not None:
            sys.modules["nox"] = before


def test_the_matrix_takes_the_lowest_versions_from_the_declaration():
    noxfile = nox()
    session = Session()
    noxfile["matrix"](session, bound="minimum", package="all")
    pins = [Requirement(word) for word in session.installed if "==" in word]
    declared = {Requirement(line).name: Requirement(line) for line in CORE.dependencies}
    assert {pin.name for pin in pins} == set(declared), "each has a lower bound"
    for pin in pins:
        (version,) = [Version(part.version) for part in pin.specifier]
        assert declared[pin.name].specifier.contains(version)
        assert any(part.operator == ">=" and Version(part.version) == version for part in declared[pin.name].specifier)
    session = Session()
    noxfile["matrix"](session, bound="newest", package="peft")
    assert session.installed[-2:] == ["--upgrade", "peft"]


def test_the_oldest_torch_is_installed_without_the_extra_that_wants_a_newer_one():
    noxfile = nox()
    written = list(map(Requirement, METADATA.config["project"]["optional-dependencies"]["dev"]))
    (own,) = [line for line in written if line.name == CORE.raw_name]
    for package in noxfile["PARTS"]:
        session = Session()
        noxfile["matrix"](session, bound="minimum", package=package)
        option, checkout, *rest = session.installed
        assert option == "--editable"
        extras = Requirement(f"it{checkout.removeprefix('.')}").extras
        assert own.extras - extras == ({"torchao"} if package in ("torch", "all") else set())
        words = list(map(Requirement, rest))
        assert {line.name for line in written} - {own.name} <= {word.name for word in words}
        # What is asked for together can be installed together.
        lines = [*CORE.dependencies, *(line for extra in extras for line in CORE.optional_dependencies[extra])]
        pinned = {word.name: part.version for word in words for part in word.specifier if part.operator == "=="}
        assert pinned
        for line in map(Requirement, lines):
            assert line.name not in pinned or line.specifier.contains(pinned[line.name]), line


@pytest.mark.parametrize("posargs", [(), ("tests/functional",)], ids=str)
def test_sessions_run_tests_that_exist(posargs):
    noxfile = nox()
    assert {"lightning", "torch", "peft", "transformers"} <= set(noxfile["PARTS"])
    for package, parts in noxfile["PARTS"].items():
        assert all((ROOT / part).exists() for part in parts)
        session = Session(*posargs)
        noxfile["matrix"](session, bound="newest", package=package)
        assert list(session.commands[-1][-len(posargs or parts) :]) == list(posargs or parts)
    session = Session(*posargs)
    noxfile["tests"](session)
    assert "constraints.txt" in session.installed
    assert session.commands[-1][:3] == ("python", "-m", "pytest")


# ----------------------------------------------------------------------------- licences


@pytest.fixture(scope="module")
def licences():
    return runpy.run_path(str(ROOT / "docs" / "_licences.py"))


def test_every_declared_dependency_is_on_the_page_with_a_licence_that_goes_with_ours(licences):
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    table = page.partition("## Declared")[2].partition("## What comes along")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    found = {name: licence for name, _, licence, _ in rows}
    lines = [*CORE.dependencies, *(line for extra in CORE.optional_dependencies.values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in lines} - {"lightning-stable"}
    assert declared == set(found) - {"Package"}, "python docs/_licences.py"
    for name in declared:
        assert licences["judge"](found[name]), name


def described(**fields):
    """A distribution that says this of itself."""
    message = Message()
    for name, value in fields.items():
        message[name.replace("_", "-")] = value
    return types.SimpleNamespace(metadata=message, files=None)


@pytest.mark.parametrize(
    ("fields", "licence", "kind"),
    [
        ({"License_Expression": "BSD-3-Clause AND MIT"}, "BSD-3-Clause AND MIT", "permissive"),
        ({"License": "Apache 2.0 License"}, "Apache-2.0", "permissive"),
        ({"License": "Apache"}, "Apache-2.0", "permissive"),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, "MIT", "permissive"),
        ({"License": "3-Clause BSD License"}, "BSD-3-Clause", "permissive"),
        ({"Classifier": "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"}, "MPL-2.0", "by file"),
        ({"License_Expression": "GPL-3.0-only OR MIT"}, "GPL-3.0-only OR MIT", "permissive"),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, "MIT AND GPL-3.0-only", ""),
        ({"License": "Artistic License"}, "Artistic", "by file"),
        ({"License": "GNU General Public License"}, "unknown", ""),
        ({}, "unknown", ""),
    ],
    ids=str,
)
def test_licences_are_read_and_judged(licences, fields, licence, kind):
    assert licences["licence"](described(**fields)) == licence
    assert licences["judge"](licence) == kind


def test_the_licence_of_the_host_is_read_from_its_files(licences):
    assert licences["licence"](importlib.metadata.distribution("torchao")) == "BSD-3-Clause"


def test_the_generator_writes_nothing_that_does_not_fit(licences, tmp_path, monkeypatch, capsys):
    scope = licences["main"].__globals__
    monkeypatch.setitem(scope, "PAGE", tmp_path / "licences.md")
    monkeypatch.setitem(scope, "rows", lambda: ([("theirs", "always", "GPL-3.0-only")], []))
    assert licences["main"]() == 1
    assert "theirs: GPL-3.0-only" in capsys.readouterr().err
    assert not (tmp_path / "licences.md").exists()
    monkeypatch.setitem(scope, "rows", lambda: ([("theirs", "always", "MIT")], [("more", "", "MPL-2.0")]))
    assert licences["main"]() == 0
    assert "| more | MPL-2.0 | by file |" in (tmp_path / "licences.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------- what SECURITY.md says


def calls():
    """Every call in the package, as its file, the dotted name, and its keywords as text.

    The processes of the contract suite give results to each other by pickled files of their own.
    """
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and "testing" not in path.parts:
                yield path.name, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_what_is_loaded_is_loaded_as_the_security_page_says():
    found = list(calls())
    loads = [(file, words) for file, name, words in found if name == "torch.load"]
    assert loads
    # What is not fixed is an argument of a public function, which the user turns off.
    assert {words.get("weights_only") for _, words in loads} <= {"True", "weights_only"}
    assert not [call for call in found if call[1] in ("pickle.load", "pickle.loads", "eval", "exec", "os.system")]
    assert not [call for call in found if "trust_remote_code" in call[2] or call[2].get("shell") == "True"]
    assert not [call for call in found if call[1] in ("yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp")]


def test_the_plugins_on_torchao_ask_for_what_their_extra_declares():
    extra = map(Requirement, CORE.optional_dependencies["torchao"])
    lowest = {item.name: part.version for item in extra for part in item.specifier}
    assert Version(lowest["torchao"]) == Version(_torchao._OLDEST)
    assert Version(lowest["torch"]) == Version(_torchao._OLDEST_TORCH)
