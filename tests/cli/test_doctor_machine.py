"""``doctor``: what it says of machines and methods, with made-up GPUs, back ends and packages."""

import ast
import functools
import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from doctor_fixtures import CPU, fake_torch, named
from precision.torchao_samples import needs_torchao

from lightning_stable.cli import _doctor_machine, _doctor_methods
from lightning_stable.cli._doctor_findings import Gpu, MethodCheck, Package
from lightning_stable.cli._doctor_machine import check_machine
from lightning_stable.cli._doctor_methods import DRAWS, check_methods
from lightning_stable.registry import METHODS, Method

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """Room on the disk and no driver of GPUs, whatever runs the tests."""
    monkeypatch.setattr(_doctor_machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 2**30))
    monkeypatch.setattr(_doctor_machine.shutil, "which", lambda name: None)


# ----------------------------------------------------------------------------- the machine


def test_the_machine_is_this_one():
    machine, findings = check_machine(torch_works=True)
    assert findings == []
    assert machine.threads == torch.get_num_threads()
    assert machine.backends["gloo"], "the suite's own processes talk over it"
    assert 1 <= machine.cores == machine.processes["cpu"]
    assert machine.folder == str(Path.cwd())
    assert machine.writable
    assert not torch.distributed.is_initialized()


def test_without_torch_there_are_the_processor_and_the_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    machine, findings = check_machine(torch_works=False)
    assert findings == []
    assert machine.threads is None
    assert machine.backends == {}


def test_a_folder_that_cannot_be_used_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(**where):
        raise PermissionError(where)

    monkeypatch.setattr(_doctor_machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    _, (finding,) = check_machine(torch_works=False)
    assert (finding.level, finding.subject) == ("warning", str(tmp_path))
    assert "0.5 GiB" in finding.text.replace("0.50", "0.5")
    monkeypatch.setattr(_doctor_machine.tempfile, "TemporaryFile", refuse)
    machine, (finding,) = check_machine(torch_works=False)
    assert not machine.writable
    assert "cannot be written to" in finding.text


def test_gpus_are_told_with_their_capability_and_memory(monkeypatch):
    fake_torch(monkeypatch, ["sm_80", "sm_90"], ("Big", 9, 0), ("Small", 8, 9))
    machine, findings = check_machine(torch_works=True)
    assert machine.gpus == (Gpu("Big", "9.0", 80.0), Gpu("Small", "8.9", 80.0))
    assert machine.cuda == "13.0"
    assert machine.processes["cuda"] == 2
    assert findings == []


def test_a_gpu_without_kernels_in_this_torch_is_an_error(monkeypatch):
    fake_torch(monkeypatch, ["sm_80", "sm_90"], ("Old", 6, 1))
    _, (finding,) = check_machine(torch_works=True)
    assert finding.level == "error"
    assert "sm_61" in finding.text
    fake_torch(monkeypatch, ["sm_80", "compute_90"], ("Next", 12, 0))
    assert check_machine(torch_works=True)[1] == []


def test_a_driver_that_fails_is_an_error_and_one_without_gpus_a_warning(monkeypatch):
    fake_torch(monkeypatch, [], ("Big", 9, 0))

    def fail(index):
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    machine, (finding,) = check_machine(torch_works=True)
    assert machine.gpus == ()
    assert finding.level == "error"
    assert "the driver is too old" in finding.text
    fake_torch(monkeypatch, [])
    monkeypatch.setattr(_doctor_machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    _, (finding,) = check_machine(torch_works=True)
    assert finding.level == "warning"
    assert "CUDA_VISIBLE_DEVICES" in finding.cure


def test_gloo_is_tried(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("unable to resolve hostname")

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", fail)
    machine, (finding,) = check_machine(torch_works=True)
    assert machine.backends["gloo"] is False
    assert "unable to resolve hostname" in finding.text
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    machine, (finding,) = check_machine(torch_works=True)
    assert machine.backends == {"gloo": False, "nccl": False}
    assert finding.subject == "torch.distributed"


# ----------------------------------------------------------------------------- methods


def packages_with(**states):
    return [Package(name, "1", "", "", state) for name, state in states.items()]


@needs_torchao
def test_every_method_runs_here():
    methods, findings = check_methods([], CPU)
    assert findings == []
    assert [method.name for method in methods if not method.source] == [method.name for method in METHODS]
    assert {method.name for method in methods if method.runs == "limited"} == {"float8", "int8"}
    assert "emulated" in named(methods, "float8").why
    assert "gloo" in named(methods, "co2").why


@pytest.mark.parametrize(
    ("package", "state", "kinds"),
    [
        ("torch", "missing", {"callback", "strategy", "precision", "metric", "peft"}),
        ("lightning", "broken", {"callback", "strategy", "precision", "metric", "peft"}),
        ("peft", "missing", {"peft"}),
        ("torchmetrics", "broken", {"metric"}),
    ],
)
def test_what_a_kind_needs_is_not_imported_without_it(monkeypatch, package, state, kinds):
    loaded = []
    monkeypatch.setattr(_doctor_methods, "load_class", lambda method: loaded.append(method.kind) or dict)
    methods, findings = check_methods(packages_with(**{package: state}), CPU)
    assert {method.kind for method in methods if method.runs == "no"} == kinds
    assert kinds.isdisjoint(loaded)
    assert all(method.why == f"{package} is {state}" for method in methods if method.runs == "no")
    assert findings == [], "the package itself is the finding"


def test_a_compromised_lightning_stops_all_methods_and_a_vulnerable_one_none(monkeypatch):
    monkeypatch.setattr(_doctor_methods, "load_class", lambda method: dict)
    for version, runs in (("2.6.2", {"no"}), ("2.6.1", {"yes"})):
        methods, _ = check_methods([Package("lightning", version, "", "", "bad")], CPU)
        assert {method.runs for method in methods} == runs


def test_without_torchao_its_methods_say_how_to_get_it(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "torchao":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("lightning_stable.precision._torchao.version", version)
    methods, findings = check_methods([], CPU)
    for name in ("float8", "int8"):
        assert named(methods, name).runs == "no"
        assert 'pip install "lightning-stable[torchao]"' in named(methods, name).why
        finding = named(findings, name)
        assert (finding.level, finding.cure) == ("note", 'pip install "lightning-stable[torchao]"')
        assert "pip install" not in finding.text
    assert len(findings) == 2
    without = Package("torchao", None, ">=0.18", "torchao", "missing")
    assert check_methods([without], CPU)[1] == [], "the package itself is the finding"


@needs_torchao
@pytest.mark.parametrize(
    ("capability", "float8", "int8"),
    [((9, 0), "yes", "yes"), ((8, 0), "no", "yes"), ((7, 5), "no", "no")],
    ids=str,
)
def test_precision_plugins_are_asked_for_the_gpu(monkeypatch, capability, float8, int8):
    fake_torch(monkeypatch, [], ("Some GPU", *capability))
    gpu = Gpu("Some GPU", "{}.{}".format(*capability), 80.0)
    methods, findings = check_methods([], CPU._replace(gpus=(gpu,), processes={"cpu": 2, "cuda": 1}))
    assert (named(methods, "float8").runs, named(methods, "int8").runs) == (float8, int8)
    if float8 == "no":
        assert "8.9" in named(methods, "float8").why
        finding = named(findings, "float8")
        assert finding.level == "warning", "no install helps"
        assert finding.text.endswith("cuda:0 (Some GPU) has {}.{}".format(*capability))
        assert finding.cure.startswith("Use SimulatedPrecision")
    assert named(methods, "co2").runs == "limited", "no nccl for the GPU"


@needs_torchao
def test_of_two_different_gpus_the_one_that_cannot_is_named(monkeypatch):
    fake_torch(monkeypatch, [], ("New", 9, 0), ("Old", 8, 0))
    gpus = (Gpu("New", "9.0", 80.0), Gpu("Old", "8.0", 40.0))
    methods, _ = check_methods([], CPU._replace(gpus=gpus, backends={"gloo": True, "nccl": True}))
    check = named(methods, "float8")
    assert check.runs == "limited"
    assert "float8 (tensorwise) on cuda:0" in check.why
    assert "cuda:1 (Old) has 8.0" in check.why
    assert named(methods, "co2").why == "CPUs over gloo and GPUs over nccl"
    methods, _ = check_methods([], CPU._replace(gpus=gpus[:1], backends={"gloo": False, "nccl": True}))
    assert named(methods, "co2").why == "GPUs over nccl (there is one here)"


@needs_torchao
def test_strategies_need_a_back_end_and_more_than_one_process():
    methods, findings = check_methods([], CPU._replace(backends={"gloo": False, "nccl": False}))
    strategies = [method for method in methods if method.kind == "strategy"]
    assert {method.runs for method in strategies} == {"no"}
    assert len(findings) == len(strategies)
    methods, findings = check_methods([], CPU._replace(processes={"cpu": 1}))
    assert {method.runs for method in methods if method.kind == "strategy"} == {"limited"}
    assert findings == []


def test_methods_that_draw_are_limited_without_matplotlib():
    methods, _ = check_methods(packages_with(matplotlib="missing"), CPU)
    for method in methods:
        assert ("matplotlib" in method.why) is (method.name in DRAWS)


def test_the_methods_that_draw_are_those_whose_files_lead_to_the_figures():
    package = ROOT / "lightning_stable"

    @functools.cache
    def named_in(path):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}

    def leads(path, seen):
        """Whether a file imports the one that draws, by way of other private files."""
        for module in named_in(path):
            if module == "lightning_stable._glue.figures":
                return True
            file = package.parent / (module.replace(".", "/") + ".py")
            if "._" in module and file.is_file() and file not in seen:
                seen.add(file)
                if leads(file, seen):
                    return True
        return False

    found = {
        m.name for m in METHODS if leads(ROOT / (m.class_path.rpartition(".")[0].replace(".", "/") + ".py"), set())
    }
    assert found == set(DRAWS)


@needs_torchao
def test_methods_of_other_packages_are_shown_and_their_faults_are_warnings(monkeypatch):
    rows = (
        Method("theirs", "callback", "lightning_stable.callbacks.ema.EMA", "2306.16817", "A method of another package"),
        Method("lost", "callback", "nowhere.to_be.Found", "2306.16817", "One that does not load, of another package"),
    )
    extension = SimpleNamespace(distribution="their-plugin 1.2", methods=rows)
    point = SimpleNamespace(dist=SimpleNamespace(name="silent-plugin", version="1"))
    monkeypatch.setattr(_doctor_methods, "extensions", lambda: (extension,))
    monkeypatch.setattr(_doctor_methods, "entry_points", lambda group: [point])
    methods, findings = check_methods([], CPU)
    assert named(methods, "theirs") == MethodCheck("theirs", "callback", "yes", "", "their-plugin 1.2")
    assert named(methods, "lost").runs == "no"
    assert {(finding.level, finding.subject) for finding in findings} == {
        ("warning", "lost"),
        ("warning", "silent-plugin"),
    }


@needs_torchao
def test_a_method_of_ours_that_does_not_load_is_an_error(monkeypatch):
    real = _doctor_methods.load_class

    def load(method):
        if method.name == "ema":
            raise AttributeError("gone")
        return real(method)

    monkeypatch.setattr(_doctor_methods, "load_class", load)
    methods, (finding,) = check_methods([], CPU)
    assert named(methods, "ema").runs == "no"
    assert finding.level == "error"
    assert "AttributeError: gone" in finding.text
