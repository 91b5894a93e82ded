"""``doctor``: what it finds with made-up metadata and broken imports, what it prints, and its exit code."""

import importlib.metadata
import json
import re
import sys
import time
from email.message import Message
from types import SimpleNamespace

import pytest
from doctor_fixtures import CPU, named
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import lightning_stable
from lightning_stable.cli import _doctor_packages, doctor
from lightning_stable.cli._doctor_findings import Diagnosis, Finding, Gpu, MethodCheck, Package, quietly
from lightning_stable.cli._doctor_methods import check_methods
from lightning_stable.cli._doctor_packages import KNOWN_BAD, check_packages, import_problems, is_harmful
from lightning_stable.cli.main import main
from lightning_stable.registry import METHODS

REQUIRES = [
    "lightning<3,>=2.6.6",
    "torch>=2.6",
    "peft>=0.20",
    "windows-only>=1; platform_system == 'Nowhere'",
    "torchao>=0.18; extra == 'torchao'",
    "torch>=2.11; extra == 'torchao'",
    "matplotlib>=3.8; extra == 'plots'",
    "ruff>=0.9; extra == 'dev'",
    "lightning-stable[plots]; extra == 'dev'",
]
VERSIONS = {
    "lightning": "2.6.6",
    "pytorch-lightning": "2.6.6",
    "torch": "2.13.0+cpu",
    "peft": "0.21.2",
    "torchao": "0.18.0",
    "matplotlib": "3.11.2",
    "ray": "3.0",
}


@pytest.fixture
def installed(monkeypatch):
    """Makes up what is installed: REQUIRES is declared, and there are VERSIONS, with changes."""

    def install(**changes):
        versions = {**VERSIONS, **{name.replace("_", "-"): version for name, version in changes.items()}}

        def version(name):
            if versions.get(name) is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        metadata = Message()
        for extra in ("torchao", "plots", "dev"):
            metadata["Provides-Extra"] = extra
        ours = SimpleNamespace(requires=REQUIRES, version=lightning_stable.__version__, metadata=metadata)
        monkeypatch.setattr(_doctor_packages.importlib.metadata, "version", version)
        monkeypatch.setattr(_doctor_packages.importlib.metadata, "distribution", lambda name: ours)
        return ours

    return install


# ----------------------------------------------------------------------------- packages


def test_packages_in_range_say_nothing(installed):
    installed()
    packages, findings = check_packages()
    assert findings == []
    assert [(p.name, p.extra) for p in packages] == [
        ("lightning", ""),
        ("torch", ""),
        ("peft", ""),
        ("torchao", "torchao"),
        ("matplotlib", "plots"),
    ], "what is for other systems or for developers is left out"
    assert named(packages, "lightning") == Package("lightning", "2.6.6", ">=2.6.6,<3", "", "ok")


@pytest.mark.parametrize(
    ("changes", "name", "status", "level", "parts"),
    [
        ({"torch": None}, "torch", "missing", "error", ["missing", ">=2.6", "pip install 'torch>=2.6'"]),
        ({"torch": "2.5.1"}, "torch", "outside", "error", ["2.5.1", ">=2.6", "pip install 'torch>=2.6'"]),
        ({"lightning": "3.0.0"}, "lightning", "outside", "error", ["3.0.0", ">=2.6.6,<3"]),
        ({"lightning": "2.6.5"}, "lightning", "bad", "error", ["2.6.5", "CVE-2026-58659", "'lightning>=2.6.6'"]),
        ({"lightning": "2.6.6.dev1"}, "lightning", "outside", "error", ["2.6.6.dev1", ">=2.6.6"]),
        ({"lightning": "2.6.2"}, "lightning", "bad", "error", ["compromised", "credentials", "replace every key"]),
        ({"lightning": "2.6.3"}, "lightning", "bad", "error", ["2.6.3", "compromised"]),
        ({"torchao": None}, "torchao", "missing", "note", ["Float8Precision", "'lightning-stable[torchao]'"]),
        ({"matplotlib": None}, "matplotlib", "missing", "note", ["pictures", "'lightning-stable[plots]'"]),
        ({"matplotlib": "3.5"}, "matplotlib", "outside", "warning", ["3.5", ">=3.8"]),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_package_is_a_finding(installed, changes, name, status, level, parts):
    installed(**{"pytorch_lightning": None, **changes})
    packages, findings = check_packages()
    assert named(packages, name).status == status
    (finding,) = findings
    assert (finding.level, finding.subject) == (level, name)
    for part in parts:
        assert part in f"{finding.text} {finding.cure}"


@pytest.mark.parametrize("torchao", ["0.18.0", None])
def test_a_torch_that_is_too_old_for_an_extra_is_a_warning_where_the_extra_is_installed(installed, torchao):
    installed(torch="2.6.0", torchao=torchao)
    packages, findings = check_packages()
    assert named(packages, "torch") == Package("torch", "2.6.0", ">=2.6", "", "ok"), "listed once, as always needed"
    told = [finding for finding in findings if finding.subject == "torch"]
    text = "2.6.0 is installed, and torchao, which is too, needs >=2.11"
    assert told == ([Finding("warning", "torch", text, "pip install 'torch>=2.11'")] if torchao else [])
    assert [finding.subject for finding in findings] == (["torch"] if torchao else ["torchao"])


def test_only_compromised_releases_are_not_imported(installed, monkeypatch):
    tried = []
    monkeypatch.setattr(_doctor_packages, "_import_problem", lambda name: tried.append(name))
    for version, harmful in (("2.6.2", True), ("2.6.3", True), ("2.6.1", False), ("2.6.6", False)):
        installed(lightning=version)
        packages, _ = check_packages()
        tried.clear()
        import_problems(packages)
        assert is_harmful(named(packages, "lightning")) is harmful
        assert ("lightning" in tried) is not harmful
        assert "torchao" not in tried
    assert {row.name for row in KNOWN_BAD} == {"lightning"}


def test_the_known_bad_versions_are_those_that_the_project_excludes():
    declared = {Requirement(line).name: Requirement(line) for line in importlib.metadata.requires("lightning-stable")}
    for row in KNOWN_BAD:
        (lowest,) = [part.version for part in declared[row.name].specifier if part.operator == ">="]
        assert SpecifierSet(row.versions).contains(lowest) is False
    for version in ("2.6.1", "2.6.2", "2.6.3", "2.6.5"):
        assert not declared["lightning"].specifier.contains(version)
        assert any(SpecifierSet(row.versions).contains(version) for row in KNOWN_BAD)


def test_another_pytorch_lightning_beside_it_is_a_warning(installed):
    installed(pytorch_lightning="2.5.0")
    (finding,) = check_packages()[1]
    assert finding.level == "warning"
    assert "2.5.0" in finding.text
    assert "lightning.pytorch only" in finding.cure
    installed(lightning="2.6.2")
    (finding,) = check_packages()[1]
    assert finding.subject == "lightning", "nobody is told to install another 2.6.2"


def test_a_package_that_no_extra_brings_is_a_note(installed):
    installed(ray=None)
    (finding,) = check_packages()[1]
    assert finding == Finding("note", "ray", "is not installed. It is for 'sweep --ray'", "pip install ray")


def test_another_version_than_the_installed_one_is_a_warning(installed):
    installed().version = "0.0.1"
    (finding,) = check_packages()[1]
    assert finding.level == "warning"
    assert "0.0.1 is installed" in finding.text


def test_without_a_declaration_the_packages_are_looked_for_all_the_same(monkeypatch):
    real = importlib.metadata.distribution

    def distribution(name):
        if name == "lightning-stable":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(_doctor_packages.importlib.metadata, "distribution", distribution)
    packages, findings = check_packages()
    assert {"torch", "lightning", "peft"} <= {package.name for package in packages if package.status == "ok"}
    assert named(findings, "lightning-stable").level == "warning"


def test_without_packaging_nothing_else_is_looked_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    packages, findings = check_packages()
    assert [(finding.level, finding.subject) for finding in findings] == [("error", "packaging")]
    methods, _ = check_methods(packages, CPU)
    assert {method.runs for method in methods} == {"no"}


@pytest.mark.parametrize("error", [OSError("libcudart.so.13: not found"), ImportError("no symbol"), SystemExit(3)])
def test_a_package_that_does_not_import_is_an_error(installed, monkeypatch, error):
    installed()

    def import_module(name):
        if name == "peft":
            sys.stdout.write("noise")
            raise error

    monkeypatch.setattr(_doctor_packages.importlib, "import_module", import_module)
    packages, findings = import_problems(check_packages()[0])
    assert named(packages, "peft").status == "broken"
    assert named(packages, "torch").status == "ok"
    (finding,) = findings
    assert finding.level == "error"
    assert str(error) in finding.text
    assert "--force-reinstall 'peft>=0.20'" in finding.cure


def test_what_is_made_on_torch_is_not_blamed_for_it(installed, monkeypatch):
    tried = []

    def import_module(name):
        tried.append(name)
        if name == "torch":
            raise OSError("libtorch_cpu.so: not found")

    monkeypatch.setattr(_doctor_packages.importlib, "import_module", import_module)
    installed()
    packages, findings = import_problems(check_packages()[0])
    assert [finding.subject for finding in findings] == ["torch"]
    assert [package.status for package in packages] == ["ok", "broken", "ok", "ok", "ok"]
    installed(torch=None)
    assert import_problems(check_packages()[0])[1] == []
    assert tried == ["torch"]


# ----------------------------------------------------------------------------- the command


GOOD = Diagnosis(
    (Package("torch", "2.13.0", ">=2.6", "", "ok"), Package("matplotlib", None, ">=3.8", "plots", "missing")),
    CPU._replace(gpus=(Gpu("Big [1]", "9.0", 80.0),), mps=True, cuda="13.0"),
    (MethodCheck("ema", "callback", "yes"), MethodCheck("co2", "strategy", "yes", "CPUs over gloo")),
    (Finding("note", "matplotlib", "is not installed", "pip install 'lightning-stable[plots]'"),),
)
WARNED = GOOD._replace(findings=(Finding("warning", "float8", "cannot run here: no torchao"), *GOOD.findings))
BAD = GOOD._replace(findings=(Finding("error", "torch", "is missing", "pip install torch"), *WARNED.findings))


@pytest.mark.parametrize(
    ("diagnosis", "code", "strict", "last"),
    [
        (GOOD, 0, 0, "all well: 2 of 2 methods run here"),
        (WARNED, 0, 1, "1 warning: 2 of 2 methods run here"),
        (BAD, 1, 1, "1 error, 1 warning: 2 of 2 methods run here"),
    ],
    ids=["good", "warned", "bad"],
)
def test_the_exit_code_counts_errors_and_if_asked_warnings(monkeypatch, capsys, diagnosis, code, strict, last):
    monkeypatch.setattr(doctor, "diagnose", lambda: diagnosis)
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert main(["doctor", "--strict"]) == strict
    assert main(["doctor", "--json", "--strict"]) == strict
    found = json.loads(capsys.readouterr().out.partition(last)[2])
    assert found["exit_code"] == strict
    assert found["packages"][1]["installed"] is None
    assert found["machine"]["gpus"] == [{"name": "Big [1]", "capability": "9.0", "memory_gib": 80.0}]
    assert [entry["name"] for entry in found["methods"]] == ["ema", "co2"]
    assert found["findings"][-1]["cure"] == "pip install 'lightning-stable[plots]'"


def test_off_a_terminal_each_thing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda: BAD)
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert "package  torch       ok       2.13.0, needs >=2.6" in lines
    assert "package  matplotlib  missing  needs >=3.8, optional [plots]" in lines
    assert "error: torch is missing. To do: pip install torch" in lines
    assert [line for line in lines if line.split()[:3] == ["method", "co2", "yes"]]
    assert any("cuda:0" in line and "compute capability 9.0, 80.0 GiB" in line for line in lines)


def test_on_a_terminal_there_are_tables_also_without_rich(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda: BAD)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Packages" in out
    assert "Big [1]" in out, "text in brackets is no markup"
    assert "This runs here without a condition: ema." in out
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert main(["doctor"]) == 1
    assert "method   ema" in capsys.readouterr().out


@pytest.mark.parametrize("without", [None, "rich.console"])
def test_a_terminal_shows_that_it_takes_a_while_and_nothing_else_does(monkeypatch, capsys, without):
    monkeypatch.setenv("TERM", "xterm")  # Rich moves nothing on a dumb one
    seen = []

    def diagnose():
        with quietly():  # sends the errors of what is looked at elsewhere, and not the status
            time.sleep(0.3)
        seen.append(capsys.readouterr().err)
        return GOOD

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert main(["doctor", "--json"]) == 0
    assert seen.pop() + capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    if without:
        monkeypatch.setitem(sys.modules, without, None)
    assert main(["doctor", "--json"]) == 0
    assert (seen[0].count("Importing torch") > 1) is (without is None), "Rich shows that it goes on"
    assert "Importing torch" in seen[0]
    out, err = capsys.readouterr()
    assert err.endswith("\033[K") or err.endswith("\033[2K"), "it is wiped out"
    assert json.loads(out)["exit_code"] == 0


@pytest.mark.parametrize(
    ("cores", "runs", "parts"),
    [
        (1, ("yes",), ["1 core, 1 thread of torch", "1 of 1 method runs here"]),
        (4, ("yes", "no"), ["4 cores, 4 threads of torch", "1 of 2 methods runs here"]),
        (2, ("no",), ["2 cores, 2 threads of torch", "0 of 1 method run here"]),
    ],
)
def test_numbers_have_the_right_plural(monkeypatch, capsys, cores, runs, parts):
    methods = tuple(MethodCheck(f"m{index}", "callback", each) for index, each in enumerate(runs))
    found = Diagnosis((), CPU._replace(cores=cores, threads=cores), methods, ())
    monkeypatch.setattr(doctor, "diagnose", lambda: found)
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        assert main(["doctor"]) == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
        for part in parts:
            assert [line for line in lines if line.rstrip().endswith(part)], part


def test_doctor_looks_at_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == lightning_stable.__version__
    assert {"torch", "lightning", "peft"} <= {package["name"] for package in found["packages"]}
    assert {method["name"] for method in found["methods"]} >= {method.name for method in METHODS}
    assert found["machine"]["processes"]["cpu"] >= 1


def test_a_machine_without_the_extras_passes_the_strict_gate_and_is_told_once_of_each(installed, monkeypatch, capsys):
    installed(pytorch_lightning=None, torchao=None, matplotlib=None)
    monkeypatch.setattr("lightning_stable.precision._torchao.version", importlib.metadata.version)
    monkeypatch.setattr(_doctor_packages, "_import_problem", lambda name: None)
    monkeypatch.setattr("lightning_stable.cli._doctor_machine.check_machine", lambda torch_works: (CPU, []))
    assert main(["doctor", "--strict", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["level"], each["subject"], each["cure"]) for each in found["findings"]] == [
        ("note", "torchao", "pip install 'lightning-stable[torchao]'"),
        ("note", "matplotlib", "pip install 'lightning-stable[plots]'"),
    ]
    assert {method["name"] for method in found["methods"] if method["runs"] == "no"} == {"float8", "int8"}


def test_methods_on_torchao_say_that_torch_is_too_old_and_the_warning_is_told_once(installed, monkeypatch, capsys):
    installed(pytorch_lightning=None, torch="2.6.0")
    monkeypatch.setattr("lightning_stable.precision._torchao.version", importlib.metadata.version)
    monkeypatch.setattr(_doctor_packages, "_import_problem", lambda name: None)
    monkeypatch.setattr("lightning_stable.cli._doctor_machine.check_machine", lambda torch_works: (CPU, []))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["level"], each["subject"]) for each in found["findings"]] == [("warning", "torch")]
    refused = {method["name"]: method["why"] for method in found["methods"] if method["runs"] == "no"}
    assert set(refused) == {"float8", "int8"}
    for why in refused.values():
        assert "needs torch 2.11 or newer, for torchao 0.18.0, and 2.6.0 is installed" in why
    _, notes = check_methods([], CPU)
    assert {note.subject for note in notes} == {"float8", "int8"}, "where no declaration told it, they do"
    assert {(note.level, note.cure.partition(",")[0]) for note in notes} == {("note", 'pip install "torch>=2.11"')}


def test_a_missing_torch_is_a_finding_and_no_traceback(installed, monkeypatch, capsys):
    installed(torch=None)
    monkeypatch.setattr(_doctor_packages, "_import_problem", lambda name: None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "error: torch is missing, and >=2.6 is needed. To do: pip install 'torch>=2.6'" in out
    assert f"0 of {len(METHODS)} methods run here" in out
