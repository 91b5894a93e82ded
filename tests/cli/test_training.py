"""``fit`` and its kin: configs and how they compose, references that follow overrides, exit codes and messages."""

import signal
import sys

import pytest
import torch
import yaml
from cli_fixtures import CliProbe

from lightning_stable.cli.locate import list_templates
from lightning_stable.cli.main import main
from lightning_stable.cli.training import StableCLI, interval, marks, share, shares
from lightning_stable.cli.values import explain_value

BASE = """
vars: {lr: 0.01, steps: 4, tag: base, marks: [1, 2], wsd_decay: 0.5}
trainer:
  max_steps: ${vars.steps}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: runs, name: cli}
  callbacks:
    - class_path: cli_fixtures.CliProbe
      init_args: {tag: "${vars.tag}", steps: "${vars.marks}"}
model: {class_path: cli_fixtures.CliModule, init_args: {lr: "${vars.lr}"}}
data: {class_path: cli_fixtures.CliData}
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A config in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    CliProbe.seen.clear()
    (tmp_path / "base.yaml").write_text(BASE)
    previous = signal.getsignal(signal.SIGINT)  # the host ignores Ctrl-C from the first one on
    yield "base.yaml"
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def printed(base, capsys):
    """Return the merged config of a ``fit`` with the given options."""

    def parse(*options):
        code = main(["fit", "--config", base, *options, "--print_config"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return yaml.safe_load(out)

    return parse


def names(config):
    return [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]


def test_fit_trains_saves_its_config_and_runs_again_from_it(base, tmp_path, capsys):
    for version in range(2):
        assert main(["fit", "--config", base]) == 0
        assert f"runs/cli/version_{version}" in capsys.readouterr().out
    saved = tmp_path / "runs/cli/version_1/config.yaml"
    config = yaml.safe_load(saved.read_text())
    assert config["trainer"]["max_steps"] == 4
    assert config["seed_everything"] == 0
    assert main(["fit", "--config", str(saved)]) == 0
    (first, second, third) = (module.layer.weight for _, module in CliProbe.seen)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert main(["validate", "--config", str(saved)]) == 0


def test_a_second_run_in_the_same_place_works_without_a_logger(base):
    options = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    for _ in range(2):
        assert main(["fit", "--config", base, *options]) == 0


def test_references_follow_later_overrides_and_files(printed, tmp_path):
    (tmp_path / "more.yaml").write_text("vars: {tag: more}\ndata: {init_args: {batch_size: '${vars.steps}'}}")
    config = printed("-c", "more.yaml", "--vars.lr", "0.5", "--vars.steps=7", "--vars.marks=[3, 4]")
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["trainer"]["max_steps"] == 7
    assert config["data"]["init_args"]["batch_size"] == 7
    assert config["trainer"]["callbacks"][0]["init_args"] == {"tag": "more", "steps": [3, 4], "fail": None}
    assert config["vars"]["wsd_decay"] == 0.5, "the vars of several files are merged"


def test_direct_options_win(printed):
    config = printed("--trainer.max_steps", "9", "--model.lr", "0.25")
    assert config["trainer"]["max_steps"] == 9
    assert config["model"]["init_args"]["lr"] == 0.25


@pytest.mark.parametrize("spelling", [["--config", "addon:ema"], ["-c", "addon:ema"], ["--config=addon:ema"]])
def test_an_addon_is_appended_however_it_is_spelt(printed, spelling):
    assert names(printed(*spelling)) == ["CliProbe", "EMA"]


def test_two_addons_and_own_callbacks_are_all_there_in_order(printed):
    config = printed("-c", "addon:ema", "-c", "addon:wsd", "--trainer.callbacks+=CliProbe")
    assert names(config) == ["CliProbe", "EMA", "WarmupStableDecay", "CliProbe"]


def test_an_addon_may_come_first_and_alone(printed, base, capsys):
    code = main(["fit", "-c", "addon:balanced_ema", "--model", "cli_fixtures.CliModule", "--print_config"])
    assert code == 0
    assert names(yaml.safe_load(capsys.readouterr().out)) == ["BalancedEMA"]


def test_vars_of_an_addon_are_defaults(printed):
    config = printed("--vars.ema_decay", "0.5", "-c", "addon:ema", "-c", "addon:wsd", "--vars.wsd_warmup", "2")
    _, ema, wsd = (callback["init_args"] for callback in config["trainer"]["callbacks"])
    assert ema["decay"] == 0.5, "an earlier option stays"
    assert wsd["decay"] == 0.5, "an earlier config stays"
    assert wsd["warmup"] == 2, "a later option wins"
    assert isinstance(wsd["warmup"], int), "optimizer steps, not a share"


def test_bare_names_of_methods_work_on_the_command_line(printed):
    config = printed("--trainer.callbacks+=BalancedEMA", "--trainer.callbacks.fallback_decay=0.5")
    assert names(config)[-1] == "BalancedEMA"
    assert config["trainer"]["callbacks"][-1]["init_args"]["fallback_decay"] == 0.5


@pytest.mark.parametrize(
    ("options", "budgets"),
    [
        ([], [1, 2]),
        (["--trainer.max_steps", "200"], [50, 100]),
        (["--trainer.max_steps", "-1"], None),
        (["--vars.budgets", "[3, 4]"], [3, 4]),
    ],
    ids=["follows the config", "follows an option", "unknown length", "given"],
)
def test_wsd_s_has_budgets_that_fit_any_run(printed, options, budgets):
    config = printed("-c", "addon:wsd_s", *options)
    assert config["trainer"]["callbacks"][-1]["init_args"]["budgets"] == budgets


def test_shares():
    assert share(600, 0.05) == 30
    assert share(3, 0.1) == 1
    assert shares(600, 0.5, 0.25) == [150, 300]
    assert shares(2, 0.25, 0.5, 1.0) == [1]
    assert shares(None, 0.5) is None
    assert shares(-1, 0.5) is None


@pytest.mark.parametrize(
    ("total", "fraction", "expected"),
    [(600, 0.05, 30), (90, 0.05, 5), (1000, 0.2, 200), (2, 0.05, 1), (97, 0.05, 4), (None, 0.05, 1), (-1, 0.05, 1)],
    ids=["exact", "near", "a fifth", "tiny", "prime", "unset", "unlimited"],
)
def test_interval_divides_the_total_where_it_can(total, fraction, expected):
    assert interval(total, fraction) == expected


def test_marks_are_multiples_of_the_interval():
    assert marks(600, 30, 0.25, 0.5) == [150, 300]
    assert marks(90, 5, 0.25, 0.5) == [20, 45]
    assert marks(97, 4, 0.5, 0.25, 1.0) == [24, 48, 96]
    assert marks(2, 1, 0.25, 0.5) == [1]
    assert marks(2, 2, 0.5) is None
    assert marks(-1, 1, 0.5) is None
    assert marks(600, 0.25, 0.5) == [300], "an interval that is a share of an epoch"
    assert marks(600, None, 0.5) == [300]


@pytest.mark.parametrize("steps", [4, 8, 30, 90, 97, 150, 601, 999, 1200])
def test_each_budget_of_the_quickstart_falls_on_a_validation(printed, steps):
    config = printed("-c", "recipe:quickstart", "--vars.steps", str(steps))
    every = config["trainer"]["val_check_interval"]
    (wsd,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("WarmupStableDecay")]
    budgets = wsd["init_args"]["budgets"]
    assert len(budgets) == 2
    assert [budget % every for budget in budgets] == [0, 0]
    assert 10 <= steps / every <= 41 or steps < 10
    assert steps % every == 0 or steps in (97, 601), "only a prime number of steps may end beside a validation"


TEMPLATES = [f"{kind}:{template.name}" for kind in ("recipe", "addon") for template in list_templates(kind)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_parses_and_builds(name, base, monkeypatch):
    monkeypatch.setattr(StableCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    built: list[StableCLI] = []
    configs = ["--config", name] if name.startswith("recipe:") else ["--config", base, "--config", name]
    assert main(["fit", *configs, "--trainer.accelerator", "cpu"]) == 0
    (cli,) = built
    written = yaml.safe_load(cli.parser.dump(cli.config))["fit"]["trainer"]
    plugins = [*(written["callbacks"] or []), *([written["strategy"]] if isinstance(written["strategy"], dict) else [])]
    assert {plugin["class_path"].rpartition(".")[2] for plugin in plugins} <= {
        type(plugin).__name__ for plugin in (*cli.trainer.callbacks, cli.trainer.strategy)
    }


def _adapting_the_layer(addon):
    """Options for the module's one layer, and for a rank that its widths of 4 and 3 allow."""
    told = {"model": "null", "rank": "1", "targets": "[layer]"}
    return [option for name, value in told.items() for option in (f"--vars.{addon}_{name}", value)]


# A few steps are too few for some methods to begin, which they say.
@pytest.mark.filterwarnings("ignore:.* will add nothing")
# The module's inputs are all alike, which EVA refuses to start from: the recipe lm_finetune_eva has it train.
@pytest.mark.parametrize("name", [template.name for template in list_templates("addon") if template.name != "eva"])
def test_every_addon_trains_a_few_steps(name, base):
    needed = {
        "lae": ["--vars.lae_parameters", '["layer.weight"]'],  # the module has no LoRA
        "one_bit_adam": ["--optimizer", "Adam", "--optimizer.lr", "0.01"],
        **{name: [f"--vars.{name}_width_multiple", "1"] for name in ("float8", "int8")},  # its widths are 4 and 3
        "logit_sharpness": ["--vars.sharpness_logits", "layer"],  # its steps do not call the module
        "precision_fallback": ["--config", "addon:simulated"],
        **{start: _adapting_the_layer(start) for start in ("adapters", "pissa", "loldu", "svfit")},
        "lora_ga": [*_adapting_the_layer("lora_ga"), "--vars.lora_ga_init_batches", "4"],  # there are four
        "reorthogonalise_lora": ["--config", "addon:adapters", *_adapting_the_layer("adapters")],
    }
    assert main(["fit", "--config", base, "--config", f"addon:{name}", *needed.get(name, [])]) == 0


def test_the_addon_eva_says_that_inputs_do_not_vary(base, capsys):
    assert main(["fit", "--config", base, "--config", "addon:eva", *_adapting_the_layer("eva")]) == 1
    assert "what goes into the layers does not vary" in capsys.readouterr().err


@pytest.mark.parametrize("name", [template.name for template in list_templates("recipe")])
def test_every_recipe_passes_a_dry_run(name, base):
    options = ["--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    # One process: several would be started as this program, which is the tests. tests/cli/test_strategies.py has two.
    assert main(["run", name, *options, "--trainer.devices", "1", "--trainer.num_nodes", "1"]) == 0


def test_the_low_bit_recipe_runs_without_any_format_and_warns_that_nothing_is_watched(base, tmp_path):
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    formats = [option for name in ("weights", "activations", "gradients") for option in (f"--vars.{name}", "null")]
    with pytest.warns(UserWarning, match="NumericsMonitor watches nothing in this run"):
        assert main(["run", "lowbit_digits", *short, *formats, "--trainer.enable_progress_bar", "false"]) == 0
    assert not list(tmp_path.rglob("numerics.*"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainer: {max_stepz: 3}", ["'trainer.max_stepz'", "'trainer.max_steps'"]),
        ("trainr: {max_steps: 3}", ["'trainr.max_steps'", "Did you mean"]),
        ("model: {class_path: cli_fixtures.CliModule, init_args: {lrr: 1}}", ["model", "'lrr'", "'lr'"]),
        ("trainer: {callbacks+: [{class_path: EMA, init_args: {deccay: 1}}]}", ["callbacks", "'deccay'", "'decay'"]),
        ("trainer: {callbacks: [{class_path: cli_fixtures.Gone}]}", ["callbacks", "Gone"]),
        ("model: {class_path: Gone}", ["model", "'Gone'", "package.module.Class"]),
        ("trainer: {max_steps: '${vars.stepz}'}", ["trainer.max_steps", "${vars.stepz}", "--vars.stepz"]),
        ("trainer: {max_steps: many}", ["trainer.max_steps", "many"]),
        ("trainer: [", ["parsing"]),
    ],
)
def test_a_wrong_config_names_the_key_and_is_exit_code_2(text, parts, base, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
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
        (["run", "quickstart", "--config", "addon:ema"], ["EMA 2 times"]),
        (["run", "quickstart", "--vars.ema_deacy", "0.5"], ["vars.ema_deacy", "nothing refers to it", "'ema_decay'"]),
        (["run", "quickstart", "--vars.shape=linear"], ["vars.shape", "nothing refers to it", "batch_size"]),
    ],
    ids=["nothing", "no file", "no addon", "no recipe", "no option", "twice", "no variable", "unused variable"],
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
            ["--optimizer", "SGD", "--optimizer.lr", "abc"],
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
    with pytest.raises(ValueError, match="a bug of the user"):
        main(["fit", "--config", base, "--config", "plugins.yaml"])


@pytest.mark.parametrize("by", ["option", "environment"])
def test_debug_lets_the_exception_through(by, base, monkeypatch):
    if by == "environment":
        monkeypatch.setenv("LIGHTNING_STABLE_DEBUG", "1")
    with pytest.raises(ValueError, match="decay=4"):
        main(["fit", "--config", base, "-c", "addon:ema", "--vars.ema_decay", "4", *(["--debug"] * (by == "option"))])


def test_a_bug_elsewhere_keeps_its_traceback(base):
    with pytest.raises(ValueError, match="a bug of the user"):
        main(["fit", "--config", base, "--trainer.callbacks.fail", "bug"])


def test_ctrl_c_is_exit_code_130(base):
    assert main(["fit", "--config", base, "--trainer.callbacks.fail", "interrupt"]) == 130


def test_modules_of_the_current_directory_can_be_named(base, tmp_path):
    (tmp_path / "own_module_of_the_test.py").write_text(
        "from cli_fixtures import CliModule\nclass OwnModule(CliModule):\n    pass\n"
    )
    assert main(["fit", "--config", base, "--model", "own_module_of_the_test.OwnModule"]) == 0


def test_the_own_options_are_frozen(base, capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--config CONFIG", "--print_config", "--vars VARS", "--seed_everything", "--ckpt_path"):
        assert option in text
    assert "addon:NAME" in text
