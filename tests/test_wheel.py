"""The wheel: what it carries, what it needs, and that the command works from it in an empty directory."""

import importlib.metadata
import os
import site
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lightning_stable.cli.locate import GUIDES

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, programs=None, **kwargs):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if programs is not None:  # as in a shell that has activated the environment
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel; the folder of its programs.

    The dependencies are those of the running environment: its site-packages are on the path of the fresh one, behind
    its own. Path files in there are not read again, so an editable checkout of the package stays invisible.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    dependencies = dict.fromkeys(
        [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    )
    Path(purelib, "dependencies.pth").write_text("\n".join(dependencies))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    # The dependencies are seen but not installed there, and one of them may be the checkout itself.
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=folder)
    return programs


@pytest.fixture
def command(installed, tmp_path):
    """Run the installed command in an empty directory."""
    return lambda *arguments: run(installed / "lightning-stable", *arguments, cwd=tmp_path).stdout


def test_the_wheel_carries_every_template_and_card_and_no_other_top_level_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (path for path in (ROOT / "templates").rglob("*") if path.is_file()):
        assert f"lightning_stable/templates/{file.relative_to(ROOT / 'templates').as_posix()}" in names
    for file in (ROOT / "docs" / "methods").glob("*.md"):
        assert f"lightning_stable/cards/{file.name}" in names
    for guide in GUIDES:
        assert f"lightning_stable/guides/{guide}.md" in names
    for file in (ROOT / "lightning_stable").rglob("*.py"):
        assert file.relative_to(ROOT).as_posix() in names
    assert "lightning_stable/py.typed" in names
    top = {name.partition("/")[0] for name in names}
    assert top == {"lightning_stable", next(name for name in top if name.endswith(".dist-info"))}


def test_the_declared_requirements_are_satisfied_here(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        declared = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")
    assert unmet(declared, extra="") == []
    names = {Requirement(line).name for line in declared}
    assert {"lightning", "torch", "torchmetrics", "peft", "transformers", "omegaconf", "jsonargparse"} <= names


def unmet(lines, extra):
    """Return the requirements that the running environment does not satisfy, extras of requirements included."""
    missing = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if extra and (requirement.marker is None or "extra" not in str(requirement.marker)):
            continue  # of the distribution itself, which was checked when it was installed
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            missing.append(f"{requirement}, found {distribution.version}")
        for name in requirement.extras:
            missing += unmet(distribution.requires or [], name)
    return missing


def test_the_package_is_that_of_the_wheel(installed, tmp_path):
    code = (
        "import lightning_stable, importlib.metadata as m; print(lightning_stable.__file__); print(m.version('torch'))"
    )
    where = run(installed / "python", "-c", code, cwd=tmp_path).stdout.splitlines()[0]
    assert Path(where).is_relative_to(installed.parent)


def test_list_and_show_work_from_the_wheel(command):
    assert {line.split()[1] for line in command("list").splitlines()} >= {"wsd", "ema", "quickstart", "wsd_s"}
    assert command("show", "wsd") == (ROOT / "docs/methods/wsd.md").read_text(encoding="utf-8")
    assert command("show", "guide:continual") == (ROOT / "docs/continual.md").read_text(encoding="utf-8")
    assert command("show", "quickstart") == (ROOT / "templates/recipes/quickstart.yaml").read_text(encoding="utf-8")
    script = ROOT / "templates/launch/several_machines.sh"
    assert command("show", script.name) == script.read_text(encoding="utf-8")


def test_the_quickstart_runs_from_the_wheel_in_an_empty_directory(command, tmp_path):
    out = command("run", "quickstart", "--trainer.max_steps", "4", "--trainer.accelerator", "cpu")
    assert "At each budget" in out
    folder = tmp_path / "runs/quickstart/version_0"
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert {path.name for path in folder.glob("checkpoints/budget-*")} == {f"budget-{b}.ckpt" for b in (1, 2, 4)}


def test_the_language_model_runs_from_the_wheel_in_an_empty_directory(command, tmp_path):
    small = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    out = command("run", "lm_pretrain", *small)
    assert "runs/lm_pretrain/version_0" in out
    assert (tmp_path / "runs/lm_pretrain/version_0/checkpoints/last.ckpt").is_file()


def test_a_new_project_passes_its_tests_and_trains_with_the_wheel_alone(command, installed, tmp_path):
    out = command("new", "demo", "--no-input")
    assert "  cd demo\n" in out
    folder = tmp_path / "demo"
    assert "__pycache__" not in {path.name for path in folder.rglob("*")}
    tested = run("make", "test", cwd=folder, programs=installed).stdout
    assert " passed" in tested
    small = "ARGS=--trainer.max_steps 2 --trainer.limit_val_batches 1 --trainer.accelerator cpu"
    assert "runs/train/version_0" in run("make", "train", small, cwd=folder, programs=installed).stdout
    assert (folder / "runs/train/version_0/checkpoints/last.ckpt").is_file()


def test_a_new_plugin_installs_and_passes_its_tests_with_the_wheel_alone(command, installed, tmp_path):
    command("new", "--plugin", "demo-plugin", "--no-input")
    folder = tmp_path / "demo-plugin"
    run("make", "install", cwd=folder, programs=installed)
    (line,) = [line for line in command("list").splitlines() if line.startswith("method  gradient_noise ")]
    assert line.endswith("(from demo-plugin 0.1.0)")
    assert command("show", "gradient_noise") == (folder / "demo_plugin/cards/gradient_noise.md").read_text()
    assert line in run("make", "list", cwd=folder, programs=installed).stdout
    out = run("make", "test", "ARGS=-v", cwd=folder, programs=installed).stdout
    for contract in ("resume", "yaml", "oracle", "two_processes", "company", "card"):
        assert f"_{contract}[gradient_noise" in out, "the contracts come from the wheel"
