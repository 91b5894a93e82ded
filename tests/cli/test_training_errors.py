"""What is wrong with a config or an option: one message that names it, and the exit code."""

import sys
from importlib.metadata import PackageNotFoundError

import pytest

from lightning_stable.cli.main import main
from lightning_stable.cli.values import explain_value
from lightning_stable.precision import _torchao


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainer: {max_stepz: 3}", ["'trainer.max_stepz'", "'trainer.max_steps'"]),
        ("trainr: {max_steps: 3}", ["'trainr.max_steps'", "Did you mean"]),
        ("model: {class_path: cli_fixtures.CliModule, init_args: {lrr: 1}}", ["model", "'lrr'", "'lr'"]),
        ("trainer: {callbacks+: [{class_path: EMA, init_args: {deccay: 1}}]}", ["callbacks", "'deccay'", "'decay'"]),
        ("trainer: {callbacks: [{class_path: cli_fixtures.Gone}]}", ["callbacks", "Gone"]),
        ("model: {class_path: Gone}", ["model", "'Gone'", "package.module.Class"]),
        ("model: {class_path: cli_fixtures.CliModul}", ["Did you mean 'cli_fixtures.CliModule'"]),
        ("model: {class_path: lightning_stable.recipe.X}", ["Did you mean 'lightning_stable.recipes'?"]),
        (
            "trainer: {callbacks: [{class_path: lightning_stable.callbacks.wsd.WarmupStableDecy}]}",
            ["Did you mean 'lightning_stable.callbacks.wsd.WarmupStableDecay'?"],
        ),
        ("trainer: {callbacks: [{class_path: EMAA}]}", ["there is no class 'EMAA'. Did you mean 'EMA'"]),
        ("trainer: {strategy: lightning_stable.CO2Strateg}", ["Did you mean 'lightning_stable.CO2Strategy'"]),
        ("trainer: {max_steps: '${vars.stepz}'}", ["trainer.max_steps", "${vars.stepz}", "--vars.stepz"]),
        ("trainer: {max_steps: many}", ["trainer.max_steps", "many"]),
        ("trainer: [", ["--config wrong.yaml is no YAML", "parsing", "in line 1, column"]),
        (
            "trainer:\n\tmax_steps: 3",
            ["--config wrong.yaml is no YAML", "'\\t' that cannot start", "in line 2, column 1"],
        ),
        ("- a\n- b", ["--config wrong.yaml is no mapping of settings but a list"]),
        ("max_steps", ["--config wrong.yaml is no mapping of settings but a text"]),
        ("vars: {tag: \udce9}", ["--config wrong.yaml is no text in UTF-8", "Save it anew"]),
        (
            "model: {class_path: clifixtures.CliModule}",
            [
                "clifixtures has to be importable from where you start: as clifixtures.py in the current folder",
                "Did you mean 'cli_fixtures.CliModule'?",
            ],
        ),
        ("model: {class_path: nowhere_at_all.Net}", ["nowhere_at_all.py in the current folder, or installed.\n"]),
        ("trainer: 3", ["wrong.yaml", "trainer is 3. Give it settings"]),
        ("trainer:\nmodel: {class_path: cli_fixtures.CliModule}", ["wrong.yaml", "trainer is empty. Give it settings"]),
    ],
)
def test_a_wrong_config_names_the_key_and_is_exit_code_2(text, parts, base, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text, errors="surrogateescape")
    (tmp_path / "cli_fixtures.py").touch()
    assert main(["fit", "--config", base, "--config", "wrong.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lightning-stable: error: ")
    assert len(err.splitlines()) <= 3
    assert "Traceback" not in err
    for part in parts:
        assert part in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["fit"], ["model is not set", "--config"]),
        (["fit", "--config", "gone.yaml"], ["gone.yaml", "not exist"]),
        (["fit", "--config", "base.yaml", "--config", "addon:emaa"], ["addon 'emaa'", "'ema'"]),
        (["fit", "--config", "recipe:quikstart"], ["recipe 'quikstart'", "'quickstart'"]),
        (["fit", "--config", "base.yaml", "--trainer.max_stepz", "3"], ["'trainer.max_stepz'", "'trainer.max_steps'"]),
        (["fit", "--config", "base.yaml", "--trainer.max_step=3"], ["'trainer.max_step'", "mean 'trainer.max_steps'"]),
        (["fit", "--conf", "base.yaml"], ["'conf'", "Did you mean 'config'"]),
        (["plot", "--outp", "gap.png", "here"], ["Unrecognized arguments: --outp"]),
        (["run", "quickstart", "--config", "addon:ema"], ["recipe:quickstart and addon:ema both bring EMA"]),
        (["run", "quickstart", "--vars.ema_deacy", "0.5"], ["vars.ema_deacy", "nothing refers to it", "'ema_decay'"]),
        (
            ["fit", "--config", "base.yaml", "--vars.ema_decay", "0.9"],
            ["vars.ema_decay", "addon:ema uses it: add --config addon:ema."],
        ),
        (["run", "quickstart", "--vars.loldu_rank", "9"], ["addon:loldu uses it: add --config addon:loldu."]),
        (["run", "quickstart", "--vars.rank", "9"], ["Known names: batch_size", "recipe:lm_finetune_pissa", "extends"]),
        (["run", "quickstart", "--vars.shape=linear"], ["vars.shape", "nothing refers to it", "batch_size"]),
    ],
    ids=[
        "nothing",
        "no file",
        "no addon",
        "no recipe",
        "no option",
        "shortened",
        "config shortened",
        "shortened elsewhere",
        "twice",
        "no variable",
        "variable of an addon",
        "another",
        "variable of recipes",
        "unused variable",
    ],
)
def test_wrong_options_are_exit_code_2(arguments, parts, base, tmp_path, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "abc"],
            "optimizer: SGD: lr: expected a number or a Tensor, got abc.",
        ),
        (
            ["-c", "addon:stability_gap", "--vars.gap_task_steps", "100"],
            "trainer.callbacks: StabilityGap: task_steps: expected a list of whole numbers or null, got 100. "
            "Write a list, as in [100].",
        ),
        (
            ["-c", "addon:ewc", "--vars.ewc_task_steps", "[a, 2]"],
            "trainer.callbacks: EWC: task_steps: expected a list of whole numbers or null, got ['a', 2].",
        ),
        (
            ["-c", "addon:ewc", "--vars.ewc_parameters", "*body.*"],
            "trainer.callbacks: EWC: parameters: expected a list of texts or null, got *body.*. "
            "Write a list, as in ['*body.*'].",
        ),
        (["--trainer.max_steps", "many"], "trainer.max_steps: expected a whole number, got many."),
        (
            ["-c", "addon:local_sgd", "--vars.local_sgd_workers", "machine"],
            "trainer.strategy: LocalSGDStrategy: workers: expected one of 'process', 'node', got machine.",
        ),
        (
            ["--trainer.precision", "e4m3"],
            "trainer.precision: e4m3 is no precision of the Trainer, but it can be simulated: --config addon:simulated "
            "--vars.simulated_weights e4m3 --vars.simulated_activations e4m3 --vars.simulated_gradients e4m3",
        ),
    ],
    ids=["optimizer", "list", "in a list", "texts", "plain", "choice", "format"],
)
def test_a_wrong_value_is_named_with_what_is_expected(options, message, base, capsys):
    assert main(["fit", "--config", base, *options]) == 2
    assert capsys.readouterr().err == f"lightning-stable: error: {message}\n"
    assert main(["fit", "--config", base, *options, "--debug"]) == 2
    first, second, *rest = capsys.readouterr().err.splitlines()
    assert first == f"lightning-stable: error: {message}"
    assert second == "The parser's own message:"
    assert any("Parser key" in line for line in rest)


@pytest.mark.parametrize(
    ("message", "explained"),
    [
        ("no value is meant", None),
        ('Parser key "a":\n  something else', None),
        ('Parser key "a":\n  Expected a typing.Literal[1, 2]. Got value: 3', "a: expected one of 1, 2, got 3."),
        ('Parser key "a":\n  Expected a dict[str, int]. Got value: 3', "a: expected a mapping, got 3."),
        (
            'Parser key "a":\n  Expected a list[list[float]]. Got value: 3',
            "a: expected a list of lists of numbers, got 3.",
        ),
        ('Parser key "a":\n  Expected a tuple[str, ...]. Got value: ', "a: expected a list of texts, got nothing."),
        ('Parser key "a":\n  Expected a list[my.Own]. Got value: 3', "a: expected a list of objects of Own, got 3."),
    ],
)
def test_types_are_put_into_words(message, explained):
    assert explain_value(message) == explained


def test_an_installation_without_torch_says_so(base, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lightning_stable.cli.training", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["fit", "--config", base]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-stable: error: the package torch is missing, and 'lightning-stable fit' needs it")
    assert "'lightning-stable doctor'" in line
    with pytest.raises(ModuleNotFoundError):
        main(["fit", "--config", base, "--debug"])


# The bad one is neither the first of its list nor of the first type that may stand there.
PLUGINS = """
trainer:
  plugins:
    - class_path: lightning.pytorch.plugins.io.TorchCheckpointIO
    - {class_path: lightning_stable.precision.simulated.SimulatedPrecision, init_args: {rounding: up}}
"""
CALLBACKS = """
trainer:
  callbacks:
    - class_path: cli_fixtures.CliProbe
    - {class_path: lightning_stable.callbacks.NumericsMonitor, init_args: {format: int4, scaling: rows}}
"""


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["-c", "addon:ema", "--vars.ema_decay", "4"], "decay=4.0 is not in [0, 1)"),
        (["-c", "addon:wsd", "--vars.wsd_decay", "40"], "decay=40"),
        (["-c", "addon:wsd_s", "--vars.budgets", "[50]"], "budgets=[50]"),
        (["-c", "addon:simulated", "--vars.simulated_weights", "e9m9"], "format='e9m9' is unknown. Choose a float"),
        (["-c", "addon:numerics_monitor", "--vars.numerics_format", "e9m9"], "format='e9m9' is unknown"),
        (["-c", "plugins.yaml"], "rounding='up' is unknown. Choose one of 'nearest'"),
        (["-c", "callbacks.yaml"], "NumericsMonitor: Quantizer: scaling='rows' is unknown"),
        (["--vars.lr", "-1"], "learning rate"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--ckpt_path", "gone.ckpt"], "gone.ckpt"),
    ],
)
def test_a_bad_value_is_one_message_and_exit_code_1(options, part, base, tmp_path, capsys):
    (tmp_path / "plugins.yaml").write_text(PLUGINS)
    (tmp_path / "callbacks.yaml").write_text(CALLBACKS)
    assert main(["fit", "--config", base, *options]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("lightning-stable: error:")]
    assert part in line
    assert "valid subclass" not in line


def test_a_bug_in_the_constructor_of_a_plugin_within_a_list_keeps_its_traceback(base, tmp_path):
    (tmp_path / "own_plugin_of_the_test.py").write_text(
        "from lightning.pytorch.plugins import Precision\n"
        "class OwnPrecision(Precision):\n"
        "    def __init__(self, size: int = 1):\n"
        "        raise ValueError('a bug of the user')\n"
    )
    (tmp_path / "plugins.yaml").write_text("trainer: {plugins: [{class_path: own_plugin_of_the_test.OwnPrecision}]}")
    with pytest.raises(ValueError, match=r"a.bug.of.the.user"):
        main(["fit", "--config", base, "--config", "plugins.yaml"])


def test_a_missing_package_is_one_message_that_says_what_to_install(base, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_torchao, "version", missing)
    command = ["fit", "--config", base, "-c", "addon:float8"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("lightning-stable: error:")]
    assert "Float8Precision needs torchao" in line
    assert "pip install" in line
    with pytest.raises(ValueError, match="Float8Precision needs torchao"):  # the parser's, with all that it tried
        main([*command, "--debug"])


@pytest.mark.parametrize("code", ["raise ModuleNotFoundError('a bug of the user')", "import a_bug_of_the_user"])
def test_a_missing_module_of_the_user_keeps_its_traceback(code, base, tmp_path):
    (tmp_path / "own_missing_of_the_test.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class OwnCallback(Callback):\n"
        "    def __init__(self):\n"
        f"        {code}\n"
    )
    with pytest.raises(ModuleNotFoundError, match=r"a.bug.of.the.user"):
        main(["fit", "--config", base, "--trainer.callbacks+=own_missing_of_the_test.OwnCallback"])
