"""``lightning-stable new``: what it asks, what it refuses, and what it writes for every answer to every question."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from new_fixtures import files, new

from lightning_stable.cli._new_template import questions
from lightning_stable.cli.locate import find_project_template
from lightning_stable.cli.main import main

PROJECT, PLUGIN = questions("scaffold"), questions("plugin")
CHOICES = {question: choices for question, choices in PROJECT.items() if isinstance(choices, list)}
# A task that goes with a choice, where the default does not.
TASK_OF = {"float8": "tabular", "int8": "tabular"} | dict.fromkeys(CHOICES["peft"][1:], "causal_lm")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


# ----------------------------------------------------------------------------- options


def test_the_questions_are_frozen():
    assert PROJECT == {
        "project_name": "my-project",
        "package_name": "{{ cookiecutter.project_name | slugify(separator='_') }}",
        "task": ["vision", "causal_lm", "tabular"],
        "schedule": ["wsd", "wsd_s", "none"],
        "averaging": ["ema", "balanced_ema", "none"],
        "sharpness": ["none", "sam", "saf", "mesa"],
        "precision": ["none", "bf16", "simulated", "float8", "int8"],
        "peft": ["none", "pissa", "lora_ga", "eva", "loldu", "svfit"],
        "strategy": ["none", "ddp", "co2", "local_sgd", "slowmo", "diloco", "compressed_ddp", "one_bit_adam"],
    }
    assert list(PLUGIN) == ["project_name", "package_name", "method_name", "class_name"]


def test_the_help_names_every_choice(capsys):
    assert main(["new", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for question, choices in CHOICES.items():
        assert f"--{question} CHOICE {', '.join(choices)}" in text
    for option in ("--plugin", "--no-input", "--output-dir", "--force", "--set"):
        assert option in text


@pytest.mark.parametrize("template", ["scaffold", "plugin"])
def test_every_question_and_choice_is_put_in_words(template):
    settings = json.loads((find_project_template(template) / "cookiecutter.json").read_text())
    asked, prompts = questions(template), settings["__prompts__"]
    assert prompts.keys() == asked.keys()
    for question, choices in asked.items():
        if isinstance(choices, list):
            assert prompts[question].keys() == {"__prompt__", *choices}
    for conflict in settings.get("_conflicts", []):
        for question, values in conflict["given"].items():
            assert set(values) <= set(asked[question])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--task", "visoin"], ["task", "'visoin'", "'vision'"]),
        (["demo", "--precision", "e4m3"], ["precision", "'e4m3'", "simulated"]),
        (["demo", "--set", "taks=vision"], ["'taks'", "'task'"]),
        (["demo", "--set", "task"], ["--set task", "QUESTION=ANSWER"]),
        (["demo", "--task", "tabular", "--set", "task=vision"], ["given twice", "'tabular'", "'vision'"]),
        (["demo", "--set", "project_name=other"], ["first argument", "'demo'"]),
        (["demo", "--set", "package_name=3d"], ["package_name '3d'", "no digit first"]),
        (["demo", "--set", "package_name=torch"], ["package_name 'torch'", "hide"]),
        (["demo", "--set", "package_name=Numpy"], ["package_name 'Numpy'", "hide"]),
        (["demo", "--set", "package_name=tests"], ["package_name 'tests'", "hide"]),
        (["torch"], ["project_name 'torch'", "hide or replace"]),
        (["sklearn"], ["project_name 'sklearn'", "hide or replace"]),
        (["Scikit.Learn"], ["project_name 'Scikit.Learn'", "hide or replace"]),
        (["lightning-stable", "--plugin"], ["project_name 'lightning-stable'", "hide or replace"]),
        (["x" * 300], ["project_name xxxxxxxxxxxx...", "300 letters", "64"]),
        (["demo", "--output-dir", "x" * 300], ["cannot be written", "too long"]),
        (["demo", "--plugin", "--set", "method_name=" + "x" * 65], ["method_name", "65 letters"]),
        (["demo", "--peft", "pissa"], ["task=vision and peft=pissa", "fine-tune"]),
        (["demo", "--task", "tabular", "--peft", "svfit"], ["task=tabular and peft=svfit"]),
        (["demo", "--task", "causal_lm", "--sharpness", "saf"], ["task=causal_lm and sharpness=saf", "epochs"]),
        (["demo", "--precision", "int8"], ["task=vision and precision=int8", "convolutional"]),
        (["demo", "--averaging", "balanced_ema", "--strategy", "one_bit_adam"], ["balanced_ema", "one_bit_adam"]),
        (["sub/demo"], ["'sub/demo'", "--output-dir"]),
        (["!!!"], ["'!!!'", "my-project"]),
        (["demo", "--plugin", "--task", "vision"], ["--task", "--plugin"]),
        (["demo", "--plugin", "--set", "task=vision"], ["'task'", "method_name"]),
        (["demo", "--plugin", "--set", "method_name=ema"], ["'ema'", "lightning_stable.callbacks.ema.EMA"]),
        (["demo", "--plugin", "--set", "method_name=wsd_s"], ["'wsd_s'", "WarmupStableDecay"]),
        (["demo", "--plugin", "--set", "class_name=SAM"], ["'SAM'", "of sam"]),
        (["demo", "--plugin", "--set", "method_name=Noise"], ["'Noise'", "lower case"]),
        (["demo", "--plugin", "--set", "method_name=class"], ["method_name 'class'"]),
        (["demo", "--plugin", "--set", "method_name=methods"], ["method_name 'methods'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "method_name=contracts"], ["method_name 'contracts'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "method_name=rows"], ["method_name 'rows'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "method_name=__init__"], ["method_name '__init__'", "lower case"]),
        (["demo", "--plugin", "--set", "method_name=a__b"], ["method_name 'a__b'", "single underscores"]),
        (["demo", "--plugin", "--set", "method_name=_noise"], ["method_name '_noise'", "lower case"]),
        (["demo", "--plugin", "--set", "class_name=Callback"], ["class_name 'Callback'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "class_name=Tensor"], ["class_name 'Tensor'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "class_name=ValueError"], ["class_name 'ValueError'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "class_name=noise"], ["class_name 'noise'", "capital"]),
        (["demo", "--plugin", "--set", "class_name=TestNoise"], ["class_name 'TestNoise'", "Test"]),
        (["demo", "--plugin", "--set", "class_name=XLAStrategy"], ["class 'XLAStrategy'", "of lightning"]),
        (["demo", "--plugin", "--set", "method_name=doctor"], ["guide or recipe 'doctor'", "method_name"]),
        (["demo", "--plugin", "--set", "method_name=quickstart"], ["guide or recipe 'quickstart'", "method_name"]),
        (["demo", "--plugin", "--set", "method_name=conftest"], ["method_name 'conftest'", "files of a plugin"]),
        (["demo", "--plugin", "--set", "method_name=aux"], ["method_name 'aux'", "Windows"]),
        (["demo", "--set", "package_name=build"], ["package_name 'build'", "another file or folder"]),
        (["demo", "--set", "package_name=conftest"], ["package_name 'conftest'", "another file or folder"]),
        (["test-gradient-noise", "--plugin"], ["package_name 'test_gradient_noise'", "another file or folder"]),
        (["con"], ["project_name 'con'", "Windows"]),
        (["CON.x"], ["project_name 'CON.x'", "Windows"]),
        ([], ["NAME", "new --help"]),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_and_writes_nothing(arguments, parts, capsys):
    assert main(["new", *arguments, "--no-input"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert not list(Path.cwd().iterdir())


def test_a_folder_that_exists_is_left_alone_without_force(capsys):
    Path("demo", "configs").mkdir(parents=True)
    Path("demo", "configs", "train.yaml").write_text("mine")
    Path("demo", "notes.txt").write_text("mine")
    assert main(["new", "demo", "--no-input"]) == 2
    assert "demo exists" in capsys.readouterr().err
    assert files("demo") == {"configs/train.yaml": "mine", "notes.txt": "mine"}
    new("demo", "--no-input", "--force")
    assert files("demo")["notes.txt"] == "mine"
    assert files("demo")["configs/train.yaml"].startswith("# Handwritten digits")


def test_a_file_in_the_way_is_an_error_even_with_force(capsys):
    Path("demo").write_text("mine")
    assert main(["new", "demo", "--no-input", "--force"]) == 2
    assert "demo exists" in capsys.readouterr().err
    assert Path("demo").read_text() == "mine"


def test_it_goes_where_it_is_told_and_says_what_comes_next(capsys):
    new("demo", "--no-input", "--output-dir", "deep/down")
    out = capsys.readouterr().out
    assert out.startswith("Written: deep/down/demo (package demo)\n")
    assert "  cd deep/down/demo\n  make test" in out
    assert Path("deep/down/demo/Makefile").is_file()
    new("other", "--plugin", "--no-input")
    assert "make install" in capsys.readouterr().out


def test_the_output_says_what_adapters_sit_on(capsys):
    for peft in CHOICES["peft"]:
        new(f"with-{peft}".replace("_", "-"), "--no-input", "--task", "causal_lm", "--peft", peft)
        told = [line for line in capsys.readouterr().out.splitlines() if "random weights" in line]
        assert len(told) == (peft != "none")
        assert all("model.init_args.pretrained in configs/train.yaml" in line for line in told)
    config = yaml.safe_load(Path("with-pissa/configs/train.yaml").read_text())
    assert config["model"]["init_args"]["pretrained"] is None, "the place that is named is there"


def test_the_output_names_what_the_name_became(capsys):
    new("1 bad name!", "--no-input")
    assert capsys.readouterr().out.startswith("Written: 1-bad-name (package project_1_bad_name)\n")


def test_the_commands_that_come_next_work_where_paths_have_blanks(tmp_path, monkeypatch, capsys):
    python = tmp_path / "my $HOME (x)" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "ran $*"\n')
    python.chmod(0o755)
    monkeypatch.setattr("lightning_stable.cli.new.sys.executable", str(python))
    new("demo", "--no-input", "--output-dir", "down here")
    cd, test = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")][:2]
    assert shlex.split(cd) == ["cd", "down here/demo"]
    done = subprocess.run(["/bin/sh", "-c", f"{cd} && {test}"], capture_output=True, text=True, check=False)
    assert "ran -m pytest" in done.stdout, done.stderr


def test_the_makefile_of_a_plugin_says_what_is_missing(tmp_path):
    new("demo", "--plugin", "--no-input")
    fake = tmp_path / "modules"
    fake.mkdir()
    (fake / "setuptools.py").write_text("__version__ = '65.5.0'")
    (fake / "lightning_stable.py").write_text("")  # no package: its commands cannot be imported
    for target, part in (("install", "pip install -U 'setuptools>=70.1'"), ("list", "lightning_stable")):
        command = ["make", target, f"PYTHON=PIP_NO_INDEX=1 PIP_FIND_LINKS= PYTHONPATH={fake} {sys.executable}"]
        done = subprocess.run(command, cwd="demo", capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert part in done.stderr
        assert "Nothing yet" not in done.stdout + done.stderr
        assert "Successfully" not in done.stdout


def test_nothing_is_written_into_the_home_folder(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    new("demo", "--no-input")
    assert not list(home.iterdir())


# ----------------------------------------------------------------------------- questions


def answers(monkeypatch, *typed):
    """Let these be typed at the questions; return the questions that were asked."""
    asked, left = [], list(typed)

    def read(console, prompt="", **kwargs):
        if not left:
            raise EOFError
        asked.append(str(prompt))
        return left.pop(0)

    monkeypatch.setattr("rich.console.Console.input", read)
    return asked


def test_what_is_not_given_is_asked(monkeypatch):
    asked = answers(monkeypatch, "mine", "2", "", "2", "1", "1")
    new("demo", "--schedule", "none", "--strategy", "co2")
    assert len(asked) == 6
    assert "[1/6]" in asked[0]
    assert "(demo)" in asked[0]  # the default
    config = yaml.safe_load(Path("demo/configs/train.yaml").read_text())
    assert config["model"]["class_path"] == "mine.model.LanguageModule"
    kinds = {callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]}
    assert kinds == {"EMA", "SAM", "LearningRateMonitor", "ModelCheckpoint"}
    assert config["trainer"]["strategy"]["class_path"].endswith(".CO2Strategy")


def test_what_does_not_go_with_earlier_answers_is_not_offered(monkeypatch):
    asked = answers(monkeypatch, "mine", "1", "1", "1", "1", "3", "1")  # the third of precisions; no adapters
    new("demo")
    assert len(asked) == 7
    assert "simulated:" in "".join(asked)
    assert "int8:" not in "".join(asked)
    assert "pissa" not in "".join(asked)
    assert "SimulatedPrecision" in Path("demo/configs/train.yaml").read_text()
    asked = answers(monkeypatch, "mine", "1", "1", "1", "1", "1")
    new("fine-tune", "--peft", "pissa", "--strategy", "none")  # then it can be nothing but a language model
    assert len(asked) == 5
    assert "LanguageModule" in Path("fine-tune/configs/train.yaml").read_text()


def test_an_input_that_ends_is_one_error(monkeypatch, capsys):
    answers(monkeypatch, "mine", "1")
    assert main(["new", "demo"]) == 2
    err = capsys.readouterr().err
    assert "'schedule'" in err
    assert "--no-input" in err
    assert not list(Path.cwd().iterdir())


def test_a_plugin_asks_for_its_names(monkeypatch):
    asked = answers(monkeypatch, "", "label_noise", "")
    new("my-plugin", "--plugin")
    assert "LabelNoise" in asked[2]
    assert Path("my-plugin/my_plugin/label_noise.py").is_file()


# ----------------------------------------------------------------------------- what is written

WRITTEN = {
    ".github/workflows/ci.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
    "Makefile",
    "README.md",
    "configs/train.yaml",
    "demo/__init__.py",
    "demo/data.py",
    "demo/model.py",
    "pyproject.toml",
    "tests/test_parts.py",
    "tests/test_train.py",
}
CASES = [(question, choice) for question, choices in CHOICES.items() for choice in choices]


def check_texts(texts):
    for name, text in texts.items():
        assert not any(mark in text for mark in ("{{", "}}", "{%", "%}", "cookiecutter")), f"{name} has marks left"
        assert text == "" or text.endswith("\n"), f"{name} ends in the middle of a line"
        assert not text.endswith("\n\n"), f"{name} ends in an empty line"
        assert "\n\n\n\n" not in text, f"{name} has many empty lines"
        assert all(line == line.rstrip() for line in text.splitlines()), f"{name} has blanks at the end of a line"
        if name.endswith(".py"):
            compile(text, name, "exec")
        if name.endswith((".yaml", ".yml")):
            assert yaml.safe_load(text)


@pytest.mark.parametrize(("question", "choice"), CASES, ids=lambda value: value)
def test_every_choice_gives_whole_files(question, choice):
    given = {question: choice} if choice not in TASK_OF else {"task": TASK_OF[choice], question: choice}
    new("demo", "--no-input", *(part for name, value in given.items() for part in (f"--{name}", value)))
    texts = files("demo")
    assert texts.keys() == WRITTEN
    check_texts(texts)
    config = yaml.safe_load(texts["configs/train.yaml"])
    assert set(config) == {"seed_everything", "vars", "trainer", "model", "data"}
    for variable in config["vars"]:
        assert f"${{vars.{variable}}}" in texts["configs/train.yaml"], f"{variable} is set and used nowhere"
    assert ("torchao" in texts["pyproject.toml"]) == (choice in ("float8", "int8"))
    if choice not in ("none", "bf16", *CHOICES["task"]):
        assert f"`{choice}`" in texts["README.md"]


def test_the_files_of_a_plugin_are_whole():
    new("demo-plugin", "--plugin", "--no-input", "--set", "method_name=label_noise", "--set", "package_name=mine")
    texts = files("demo-plugin")
    assert texts.keys() == {
        *(".gitignore", "Makefile", "README.md", "pyproject.toml"),
        *("mine/__init__.py", "mine/methods.py", "mine/label_noise.py", "mine/py.typed"),
        *("mine/cards/label_noise.md", "mine/templates/addons/label_noise.yaml"),
        *("tests/conftest.py", "tests/test_contracts.py", "tests/test_label_noise.py", "tests/test_rows.py"),
    }
    check_texts(texts)
    assert '[project.entry-points."lightning_stable.methods"]\nmine = "mine.methods:METHODS"' in texts["pyproject.toml"]
    assert "class LabelNoise(Callback)" in texts["mine/label_noise.py"]


def test_what_is_written_is_clean_for_ruff():
    for task in CHOICES["task"]:
        new(task.replace("_", "-"), "--no-input", "--task", task)
    new("a-plugin", "--plugin", "--no-input")
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
