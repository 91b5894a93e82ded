"""Names of what ``lightning-stable new`` writes, and that cookiecutter alone writes and refuses the same."""

import ast
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter
from new_fixtures import files, new
from packaging.requirements import Requirement

from lightning_stable._extensions import NAME, host_classes
from lightning_stable.cli import _new_names
from lightning_stable.cli._new_names import package_name, project_name
from lightning_stable.cli._new_template import reserved
from lightning_stable.cli.locate import CommandError, find_project_template


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


# ----------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "project", "package"),
    [
        ("demo", "demo", "demo"),
        ("my-project", "my-project", "my_project"),
        ("My_Project.2", "My_Project.2", "my_project_2"),
        ("My Project!", "My-Project", "my_project"),
        ("Größe é", "Groe-e", "groe_e"),
        ("3d-net", "3d-net", "project_3d_net"),
        ("class", "class", "class_project"),
        ("tests", "tests", "tests_project"),
        ("json", "json", "json_project"),
        ("build", "build", "build_project"),
        ("Dist", "Dist", "dist_project"),
        ("conftest", "conftest", "conftest_project"),
        ("--x--", "x", "x"),
    ],
)
def test_any_name_becomes_a_folder_and_a_package(given, project, package):
    assert project_name(given) == project
    assert package_name(project) == package
    assert package.isidentifier()


@pytest.mark.parametrize("given", ["", "...", "日本", "a/b", "a\\b"])
def test_a_name_that_cannot_be_is_an_error_that_names_it(given):
    with pytest.raises(CommandError, match="name") as caught:
        project_name(given)
    assert repr(given) in str(caught.value)


def test_the_names_of_what_a_project_needs_are_reserved():
    names = set(reserved("scaffold")["packages"])
    assert names == set(reserved("plugin")["packages"])
    extras = re.compile(r"extra == .(docs|dev).")
    needed = [Requirement(text) for text in importlib.metadata.requires("lightning-stable") if not extras.search(text)]
    distributions = {normal(requirement.name) for requirement in needed} | {"lightning_stable"}
    modules = {
        normal(module)
        for module, owners in importlib.metadata.packages_distributions().items()
        if distributions & set(map(normal, owners)) and module[0] != "_" and module not in sys.stdlib_module_names
    }
    assert "torch" in modules
    assert distributions | (modules - {"test"}) <= names


def test_the_classes_of_the_host_and_of_the_template_are_reserved():
    names = set(reserved("plugin")["class_name"])
    for room in ("callbacks", "strategies", "plugins"):
        public = set(importlib.import_module(f"lightning.pytorch.{room}").__all__)
        assert public <= names
        assert public - {"AsyncCheckpointIO", "CheckpointIO", "TorchCheckpointIO", "XLACheckpointIO"} <= host_classes()
    new("demo", "--plugin", "--no-input")
    for name, text in files("demo").items():
        if name.endswith(".py"):
            used = re.findall(r"^from .* import (.*)$|^class (\w+)|^([A-Z]+) = ", text, re.MULTILINE)
            words = {word for each in used for word in ",".join(each).replace(" ", "").split(",")}
            assert {word for word in words if word[:1].isupper()} - {"GradientNoise", "TestContracts"} <= names


def test_the_hooks_know_the_patterns_and_the_names_of_the_command():
    hooks = [(find_project_template(name) / "hooks/pre_gen_project.py").read_text() for name in ("plugin", "scaffold")]
    assert NAME.pattern in hooks[0]
    for hook in hooks:
        assert _new_names._DEVICE.pattern in hook
        (names,) = re.findall(r"^BESIDE = (\(.*?^\))", hook, re.MULTILINE | re.DOTALL)
        assert ast.literal_eval(names) == _new_names._BESIDE


def test_what_lies_beside_a_package_is_reserved():
    beside = set()
    for options in ([], ["--plugin"]):
        new("demo", "--no-input", "--force", *options)
        beside |= {path.name.lower() for path in Path("demo").iterdir() if "." not in path.name}
        beside |= {path.stem for path in Path("demo/tests").glob("*.py")}
        beside |= set(re.findall(r"^(\w+)/$", Path("demo/.gitignore").read_text(), re.MULTILINE))
    # The package, and the test that is called as the method.
    assert beside - {"demo", "test_gradient_noise"} == set(_new_names._BESIDE)


def normal(name):
    return re.sub(r"[-_.]+", "_", name).lower()


# ----------------------------------------------------------------------------- cookiecutter alone


@pytest.mark.parametrize("template", ["scaffold", "plugin"])
def test_cookiecutter_itself_writes_the_same(template, tmp_path, monkeypatch):
    monkeypatch.setenv("COOKIECUTTER_CONFIG", str(own_settings(tmp_path)))
    source = find_project_template(template)
    cookiecutter(str(source), no_input=True, output_dir="plain", extra_context={"project_name": "demo"})
    new("demo", "--no-input", *(["--plugin"] if template == "plugin" else []))
    assert files("plain/demo") == files("demo")


@pytest.mark.parametrize(
    ("template", "given", "part"),
    [
        ("scaffold", {"peft": "eva"}, "peft=eva and task=vision do not go together"),
        ("scaffold", {"project_name": "a b"}, "project_name 'a b'"),
        ("scaffold", {"project_name": "3d"}, "package_name '3d'"),
        ("scaffold", {"project_name": "torch"}, "project_name 'torch'"),
        ("scaffold", {"package_name": "yaml"}, "package_name 'yaml'"),
        ("scaffold", {"package_name": "x" * 65}, "65 letters"),
        ("plugin", {"project_name": "Lightning-Stable"}, "project_name 'Lightning-Stable'"),
        ("plugin", {"class_name": "json"}, "class_name 'json'"),
        ("plugin", {"class_name": "Callback"}, "class_name 'Callback'"),
        ("plugin", {"class_name": "ValueError"}, "class_name 'ValueError'"),
        ("plugin", {"method_name": "methods"}, "method_name 'methods'"),
        ("plugin", {"method_name": "a__b"}, "method_name 'a__b'"),
        ("plugin", {"method_name": "aux"}, "method_name 'aux'"),
        ("plugin", {"project_name": "conftest"}, "package_name 'conftest'"),
        ("plugin", {"package_name": "test_gradient_noise"}, "package_name 'test_gradient_noise'"),
        ("scaffold", {"project_name": "CON.x"}, "project_name 'CON.x'"),
        ("scaffold", {"package_name": "build"}, "package_name 'build'"),
    ],
    ids=str,
)
def test_cookiecutter_itself_refuses_the_same(template, given, part, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COOKIECUTTER_CONFIG", str(own_settings(tmp_path)))
    with pytest.raises(FailedHookException):
        cookiecutter(str(find_project_template(template)), no_input=True, output_dir="plain", extra_context=given)
    assert part in capfd.readouterr().err
    assert not files("plain")


def own_settings(tmp_path):
    """Settings that keep cookiecutter out of the home folder."""
    path = tmp_path / "settings.yaml"
    path.write_text(f"cookiecutters_dir: {tmp_path / 'cache'}\nreplay_dir: {tmp_path / 'replay'}\n")
    return path
