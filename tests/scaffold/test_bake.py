"""Projects and a plugin as ``lightning-stable new`` writes them: they install, and their own tests pass.

Every choice of every question is in one of the projects at least, and each trains 2 steps in its tests. Several of them
share a process: what takes long is importing the host.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_stable.cli._new_template import questions
from lightning_stable.cli.main import main

CHOICES = {question: choices for question, choices in questions("scaffold").items() if isinstance(choices, list)}
PROJECTS = [
    # task, schedule, averaging, sharpness, precision, peft, strategy
    "vision      wsd    ema           none  none       none     none",
    "vision      wsd_s  balanced_ema  sam   simulated  none     ddp",
    "vision      none   none          saf   bf16       none     co2",
    "tabular     wsd    ema           mesa  float8     none     local_sgd",
    "tabular     none   balanced_ema  none  int8       none     slowmo",
    "causal_lm   wsd    ema           none  none       pissa    diloco",
    "causal_lm   wsd    none          sam   bf16       lora_ga  compressed_ddp",
    "causal_lm   wsd_s  none          none  simulated  eva      one_bit_adam",
    "causal_lm   none   ema           none  none       loldu    none",
    "causal_lm   wsd    balanced_ema  none  float8     svfit    none",
]
# Of an equal length each.
GROUPS = [PROJECTS[::2], PROJECTS[1::2]]


def run_module(*arguments, cwd, path):
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def install(folders, site):
    """Install projects into a folder of their own, as wheels: what a wheel lacks, the tests lack."""
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--quiet", "--target", site]
    run_module("pip", "--disable-pip-version-check", "install", *options, *folders, cwd=site.parent, path="")
    for folder in folders:
        (package,) = [file.parent for file in folder.glob("*/__init__.py")]
        assert (site / package.name / "__init__.py").is_file()
        shutil.rmtree(package)


def run_tests(*arguments, cwd, site):
    out = run_module("pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments, cwd=cwd, path=site)
    assert "skipped" not in out
    return out


def test_every_choice_is_in_a_project():
    found = list(zip(*(project.split() for project in PROJECTS), strict=True))
    assert {question: set(choices) for question, choices in CHOICES.items()} == {
        question: set(column) for question, column in zip(CHOICES, found, strict=True)
    }


@pytest.mark.parametrize("group", GROUPS, ids=["even", "odd"])
def test_projects_install_and_their_tests_pass_and_they_train(group, tmp_path):
    folders = []
    for number, project in enumerate(group):
        options = [part for name, value in zip(CHOICES, project.split(), strict=True) for part in (f"--{name}", value)]
        assert main(["new", f"demo-{number}", "--no-input", "--output-dir", str(tmp_path), *options]) == 0
        folders.append(tmp_path / f"demo-{number}")
    site = tmp_path / "site"
    install(folders, site)
    settings = ["-c", folders[0] / "pyproject.toml", "--rootdir", tmp_path, "--import-mode", "importlib"]
    tests = [folder / "tests" for folder in folders]
    out = run_tests(*settings, *tests, cwd=tmp_path, site=site)
    passed = sum(text.count("\ndef test_") for folder in tests for text in read_tests(folder))
    assert f"{passed} passed" in out
    # Each trained in a folder of its own, so nothing is left in the project.
    assert not list(tmp_path.glob("demo-*/runs"))


def read_tests(folder: Path):
    return [file.read_text() for file in folder.glob("test_*.py")]


def test_a_plugin_installs_and_its_tests_pass_with_all_contracts(tmp_path):
    assert main(["new", "demo-plugin", "--plugin", "--no-input", "--output-dir", str(tmp_path)]) == 0
    folder, site = tmp_path / "demo-plugin", tmp_path / "site"
    package = folder / "demo_plugin"
    kept = sorted(path.relative_to(folder) for path in package.rglob("*") if path.is_file())
    install([folder], site)
    assert all((site / path).is_file() for path in kept)
    out = run_tests("-vv", cwd=folder, site=site)
    for contract in ("resume", "yaml", "inert", "oracle", "reuse", "safe_load", "card", "company", "two_processes"):
        assert f"_{contract}[gradient_noise" in out
