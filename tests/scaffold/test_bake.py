"""Projects and a plugin as ``lightning-stable new`` writes them: their own tests pass, 2 steps of training among them.

Every choice of every question is in one of the projects at least. Several of them share a process: what takes long is
importing the host.
"""

import os
import re
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


def run_pytest(*arguments, cwd, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_every_choice_is_in_a_project():
    found = list(zip(*(project.split() for project in PROJECTS), strict=True))
    assert {question: set(choices) for question, choices in CHOICES.items()} == {
        question: set(column) for question, column in zip(CHOICES, found, strict=True)
    }


@pytest.mark.parametrize("group", GROUPS, ids=["even", "odd"])
def test_the_tests_of_projects_pass_and_they_train(group, tmp_path):
    folders = []
    for number, project in enumerate(group):
        options = [part for name, value in zip(CHOICES, project.split(), strict=True) for part in (f"--{name}", value)]
        assert main(["new", f"demo-{number}", "--no-input", "--output-dir", str(tmp_path), *options]) == 0
        folders.append(tmp_path / f"demo-{number}")
    settings = ["-c", folders[0] / "pyproject.toml", "--rootdir", tmp_path, "--import-mode", "importlib"]
    tests = [folder / "tests" for folder in folders]
    out = run_pytest(*settings, *tests, cwd=tmp_path, path=folders)
    passed = sum(text.count("\ndef test_") for folder in tests for text in read_tests(folder))
    assert f"{passed} passed" in out
    # Each trained in a folder of its own, so nothing is left in the project.
    assert not list(tmp_path.glob("demo-*/runs"))


def read_tests(folder: Path):
    return [file.read_text() for file in folder.glob("test_*.py")]


def test_the_tests_of_a_plugin_pass(tmp_path):
    assert main(["new", "demo-plugin", "--plugin", "--no-input", "--output-dir", str(tmp_path)]) == 0
    folder = tmp_path / "demo-plugin"
    # A sample of the contracts: two processes, and what repeats others in company, are left to its own `make test`.
    sample = "not (two_processes or company or exception or any_module or epoch or validation)"
    out = run_pytest("-vv", "-k", sample, cwd=folder, path=[])
    for contract in ("resume", "yaml", "inert", "oracle", "reuse", "safe_load", "card"):
        assert re.search(rf"test_\d+_{contract}\[gradient_noise.* PASSED", out), out
