"""What has to hold on other machines than one's own, in parts that continuous integration can run side by side.

    pip install nox
    nox --list
    nox -s lint docs
    nox -s tests-3.12 -- tests/functional
    nox -s "matrix(bound='minimum', package='peft')"
    nox -s wheel-3.10 wheel-3.13

``make test`` remains the suite, on the exact versions of ``constraints.txt``. Here it runs on every Python, and with
the oldest and the newest versions that ``pyproject.toml`` allows. The oldest are read from there and said nowhere else.
A session of the matrix takes whatever torch the package index gives: on Linux that is the one for NVIDIA GPUs, and each
session downloads and unpacks gigabytes. An extra that wants a newer package than the oldest one is left out beside it,
and the tests that need it are skipped.
"""

import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# The one that constraints.txt is for.
PYTHON = "3.11"

# What each package can break: the part of the suite that a session of the matrix runs by default.
PARTS = {
    "lightning": ["tests/test_registry.py", "tests/cli", "tests/callbacks", "tests/contract"],
    "torch": ["tests/functional", "tests/strategies", "tests/precision"],
    "peft": ["tests/peft"],
    "transformers": ["tests/recipes", "tests/peft"],
    # Everything that is always needed, at once.
    "all": ["tests/test_registry.py", "tests/cli", "tests/metrics", "tests/data", "tests/recipes"],
}

nox.options.sessions = ["lint", "docs", f"tests-{PYTHON}"]
nox.options.error_on_missing_interpreters = True


def minimum(project: dict) -> dict[str, str]:
    """Return the lowest version of each package that is always needed, as ``pyproject.toml`` declares it."""
    found = {}
    for requirement in map(Requirement, project["project"]["dependencies"]):
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        found[requirement.name] = lowest[0]
    return found


def developers(project: dict, pinned: dict[str, str]) -> list[str]:
    """Return what ``.[dev]`` asks for, without the extras that do not allow a version of ``pinned``."""
    groups = {name: [*map(Requirement, lines)] for name, lines in project["project"]["optional-dependencies"].items()}

    def allowed(extra: str) -> bool:
        return all(item.specifier.contains(pinned[item.name]) for item in groups[extra] if item.name in pinned)

    own = project["project"]["name"]
    extras = sorted(extra for item in groups["dev"] if item.name == own for extra in item.extras if allowed(extra))
    return [f".[{','.join(extras)}]", *(str(item) for item in groups["dev"] if item.name != own)]


def needs(project: dict, bound: str, package: str) -> list[str]:
    """Return what pip has to install, the checkout first, for one session of the matrix."""
    lowest = minimum(project)
    names = list(lowest) if package == "all" else [package]
    if bound == "newest":
        return [".[dev]", "--upgrade", *names]
    pinned = {name: lowest[name] for name in names}
    return [*developers(project, pinned), *(f"{name}=={version}" for name, version in pinned.items())]


def run_tests(session: nox.Session, *options: str) -> None:
    """Run the part of the suite that is asked for."""
    session.run("python", "-m", "pytest", "--numprocesses", "auto", *options, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite on one version of Python; what follows ``--`` is pytest's."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    run_tests(session, *session.posargs)


@nox.session(python=PYTHON)
@nox.parametrize("package", list(PARTS))
@nox.parametrize("bound", ["minimum", "newest"])
def matrix(session: nox.Session, bound: str, package: str) -> None:
    """Run a part of the suite with the oldest, or with the newest version of a package."""
    session.install("--editable", *needs(nox.project.load_toml("pyproject.toml"), bound, package))
    session.run("python", "-m", "pip", "list")
    # Other versions warn of other things than those that the settings of pytest know.
    run_tests(session, "-W", "default", *(session.posargs or PARTS[package]))


@nox.session(python=PYTHON)
def lint(session: nox.Session) -> None:
    """Run ruff, mypy and import-linter."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]):
        session.run(*command)


@nox.session(python=PYTHON)
def docs(session: nox.Session) -> None:
    """Build the documentation, warnings as errors."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session(python=PYTHON)
def linkcheck(session: nox.Session) -> None:
    """Look whether the links out of the documentation are still good; needs a network, so not part of .ci/run."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    session.run("python", "-m", "sphinx", "-q", "-b", "linkcheck", "docs", "docs/_build/linkcheck")


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Build the distributions, install the wheel, and run what needs no torch. Takes seconds, so for every Python."""
    folder = Path(session.create_tmp()) / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    session.install("build", "hatchling")
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder))
    (file,) = folder.glob("*.whl")
    session.install("--no-deps", "--force-reinstall", str(file))
    session.install("typing-extensions", "packaging", "rich")
    root = Path.cwd()
    session.chdir(session.create_tmp())
    code = "import lightning_stable; print(lightning_stable.__path__[0])"
    place = str(session.run("python", "-c", code, silent=True)).strip()
    if Path(place).is_relative_to(root / "lightning_stable"):
        session.error(f"lightning_stable is imported from {place}, not from the wheel.")
    # Templates of projects are no Python before they are filled in.
    session.run("python", "-W", "error", "-m", "compileall", "-q", "-f", "-x", "/templates/", place)
    for command in (["--version"], ["list"], ["show", "wsd"], ["--help"]):
        session.run("lightning-stable", *command)
    # Without torch it has something to find.
    session.run("lightning-stable", "doctor", success_codes=[1])
