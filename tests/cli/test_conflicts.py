"""What a run takes once and is given twice: an error that names both, unless the user has chosen since."""

import pytest
import yaml

from lightning_stable.cli import training
from lightning_stable.cli._configs import addons_last
from lightning_stable.cli.main import main
from lightning_stable.cli.training import StableCLI

OWN = {
    "ddp": "trainer: {strategy: ddp}",
    "unused": "trainer: {strategy: ddp_find_unused_parameters_true}",
    "class": "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy}}",
    "co2": "trainer: {strategy: {class_path: CO2Strategy, init_args: {local_steps: 4}}}",
    "diloco": "trainer: {strategy: {class_path: DiLoCoStrategy, init_args: {local_steps: 4}}}",
    "plugin": "trainer: {plugins: [{class_path: lightning.pytorch.plugins.io.TorchCheckpointIO}]}",
    "int8": "trainer: {plugins: [Int8Precision]}",
    "twice": "trainer: {callbacks+: [{class_path: EMA}, {class_path: EMA}]}",
    "ema": "trainer: {callbacks+: [{class_path: lightning_stable.callbacks.ema.EMA}]}",
    "step": "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}",
    "bf16": "trainer: {precision: bf16-mixed}",
    "sgd": "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}",
}


@pytest.fixture
def fit(base, tmp_path, capsys):
    """Run ``fit`` far enough to build all, and return its exit code and what it said."""
    for name, text in OWN.items():
        (tmp_path / f"{name}.yaml").write_text(text)

    def run(*options):
        short = ["--trainer.fast_dev_run", "1", "--trainer.limit_val_batches", "0"]
        code = main(["fit", "--config", base, *options, *short])
        return code, capsys.readouterr().err

    return run


def addons(*names):
    return [part for name in names for part in ("-c", f"addon:{name}")]


CO2 = "{class_path: CO2Strategy, init_args: {local_steps: 4}}"
ONE_STRATEGY = "both set trainer.strategy (CO2Strategy and DiLoCoStrategy)"
MIXED = "trainer.precision is bf16-mixed"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (addons("co2", "diloco"), ["addon:co2 and addon:diloco", ONE_STRATEGY, "--trainer.strategy DiLoCoStrategy"]),
        (["-c", "co2.yaml", *addons("diloco")], ["co2.yaml and addon:diloco", ONE_STRATEGY]),
        (["--trainer.strategy", "CO2Strategy", *addons("diloco")], ["--trainer.strategy CO2Strategy and addon:diloco"]),
        (["--trainer.strategy=CO2Strategy", *addons("diloco")], ["--trainer.strategy CO2Strategy and addon:diloco"]),
        (addons("co2", "co2"), ["addon:co2 and addon:co2 both set trainer.strategy"]),
        (addons("simulated", "float8"), ["addon:simulated and addon:float8 both bring", "Leave out addon:float8"]),
        (["-c", "int8.yaml", *addons("simulated")], ["int8.yaml and addon:simulated", "Int8Precision and Simulated"]),
        (["-c", "bf16.yaml", *addons("float8")], [f"{MIXED} (bf16.yaml)", "--vars.float8_compute bf16-mixed"]),
        (["--trainer.precision", "bf16-mixed", *addons("int8")], [MIXED, "addon:int8", "Int8Precision"]),
        (["-c", "bf16.yaml", "-c", "int8.yaml"], [MIXED, "int8.yaml brings", "compute: bf16-mixed"]),
        (addons("wsd", "wsd_s"), ["addon:wsd and addon:wsd_s both bring WarmupStableDecay", "Leave out addon:wsd_s"]),
        (["-c", "step.yaml", *addons("wsd")], ["lr_scheduler is StepLR", "addon:wsd brings WarmupStableDecay"]),
        (
            addons("ema", "balanced_ema"),
            ["addon:ema and addon:balanced_ema both bring EMA and BalancedEMA"],
        ),
        (
            [*addons("ema"), "--trainer.callbacks+=EMAWeightAveraging"],
            ["addon:ema and --trainer.callbacks+ EMAWeightAveraging", "one average"],
        ),
        (["-c", "twice.yaml"], ["twice.yaml brings EMA (2 times in trainer.callbacks)", "Leave one of them out"]),
        (addons("pissa", "eva"), ["addon:pissa and addon:eva both bring Adapters"]),
        (["-c", "recipe:quickstart", *addons("wsd")], ["recipe:quickstart and addon:wsd"]),
        (["-c", "ema.yaml", *addons("ema")], ["ema.yaml and addon:ema both bring EMA (2 times"]),
        ([*addons("co2"), "-c", "diloco.yaml"], ["diloco.yaml and addon:co2", "(DiLoCoStrategy and CO2Strategy)"]),
        ([*addons("co2"), "-c", "ddp.yaml", *addons("diloco")], ["addon:co2 and addon:diloco", ONE_STRATEGY]),
        ([*addons("simulated"), "-c", "bf16.yaml"], [f"{MIXED} (bf16.yaml)", "addon:simulated brings"]),
        ([*addons("ema"), "-c", "ema.yaml"], ["ema.yaml and addon:ema both bring EMA (2 times"]),
        (["--trainer.strategy", CO2, *addons("diloco")], [f"--trainer.strategy {CO2} and addon:diloco", ONE_STRATEGY]),
    ],
    ids=lambda value: " ".join(part for part in value if ":" in part or "." in part)[:60] if value else "",
)
def test_two_of_a_kind_are_an_error_that_names_both(options, parts, fit):
    code, err = fit(*options)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("lightning-stable: error:")]
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "options",
    [
        ["-c", "ddp.yaml", *addons("co2")],
        ["-c", "unused.yaml", *addons("co2")],
        ["-c", "class.yaml", *addons("co2")],
        [*addons("co2", "diloco"), "--trainer.strategy", "auto"],
        [*addons("co2", "diloco"), "--trainer.strategy", "auto", "-c", "ddp.yaml"],
        [*addons("co2"), "-c", "ddp.yaml"],
        [*addons("simulated"), "--trainer.plugins", "null", "--trainer.precision", "bf16-mixed"],
        ["-c", "bf16.yaml", *addons("simulated"), "--trainer.precision", "null"],
        [*addons("ema"), "--trainer.callbacks", "BalancedEMA"],
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_comes_later_and_is_no_addon_has_chosen(options, fit):
    code, err = fit(*options)
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["-c", "recipe:lowbit_digits", "--trainer.precision", "32-true"],
            "--trainer.precision 32-true comes last and takes the place of SimulatedPrecision (recipe:lowbit_digits), "
            "and of NumericsMonitor with it.",
        ),
        (
            ["-c", "int8.yaml", "-c", "bf16.yaml"],
            "trainer.precision bf16-mixed (bf16.yaml) comes last and takes the place of Int8Precision (int8.yaml).",
        ),
        (
            ["-c", "plugin.yaml", *addons("simulated"), "--trainer.precision", "bf16-mixed"],
            "--trainer.precision bf16-mixed comes last and takes the place of SimulatedPrecision (addon:simulated). "
            "To have both: --trainer.precision null --vars.simulated_compute bf16-mixed",
        ),
    ],
    ids=["an option over a recipe", "a file over a file", "an option over an addon"],
)
def test_a_precision_that_comes_last_takes_the_place_of_a_plugin_and_says_so(options, sentence, fit, monkeypatch):
    built: list[StableCLI] = []
    told: list[str] = []
    monkeypatch.setattr(StableCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    monkeypatch.setattr(training, "rank_zero_info", told.append)
    code, err = fit(*options)
    assert code == 0, err
    (line,) = [line for line in told if "takes the place" in line]
    assert line.startswith(f"lightning-stable: {sentence}")
    trainer = built[0].trainer
    assert type(trainer.precision_plugin).__name__ in ("Precision", "MixedPrecision")
    assert "NumericsMonitor" not in {type(callback).__name__ for callback in trainer.callbacks}
    kept = built[0].config["fit"].trainer.plugins
    assert [plugin.class_path.rpartition(".")[2] for plugin in kept or []] == ["TorchCheckpointIO"] * (
        "plugin.yaml" in options
    )


NAMESAKES = """
from lightning.pytorch import Callback

class Replay(Callback):
    def __init__(self, key: str = "a"):
        self.key = key

    @property
    def state_key(self):
        return self.key

class WeightAveraging(Callback):
    pass
"""
NAMED = """
trainer:
  callbacks+:
    - {class_path: namesakes_of_the_test.Replay}
    - {class_path: namesakes_of_the_test.Replay, init_args: {key: b}}
    - {class_path: namesakes_of_the_test.WeightAveraging}
"""


def test_classes_of_the_user_may_have_the_names_of_ours(fit, tmp_path):
    (tmp_path / "namesakes_of_the_test.py").write_text(NAMESAKES)
    (tmp_path / "namesakes.yaml").write_text(NAMED)
    code, err = fit(*addons("ema"), "-c", "namesakes.yaml")
    assert code == 0, err


def test_an_addon_of_precision_leaves_other_plugins_alone(base, fit, capsys):
    options = ["--config", base, "-c", "plugin.yaml", *addons("simulated"), "--print_config"]
    capsys.readouterr()
    assert main(["fit", *options]) == 0
    plugins = yaml.safe_load(capsys.readouterr().out)["trainer"]["plugins"]
    assert [plugin["class_path"].rpartition(".")[2] for plugin in plugins] == [
        "TorchCheckpointIO",
        "SimulatedPrecision",
    ]


BETAS = ["--optimizer", "AdamW", "--optimizer.betas", "[0.9,0.95]"]
LOCAL = ["--trainer.strategy=CO2Strategy", "--trainer.strategy.local_steps", "8"]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([*addons("ema"), *BETAS, "-c", "sgd.yaml"], [*BETAS, "-c", "sgd.yaml", *addons("ema")]),
        ([*BETAS[:2], *addons("ema"), *BETAS[2:], "-c", "sgd.yaml"], [*BETAS, "-c", "sgd.yaml", *addons("ema")]),
        ([*addons("ema"), *LOCAL, "-c", "ddp.yaml"], [*LOCAL, "-c", "ddp.yaml", *addons("ema")]),
        (
            [*addons("ema"), *BETAS[:2], "-c", "sgd.yaml", "--optimizer.momentum", "0.5"],
            [*BETAS[:2], "-c", "sgd.yaml", *addons("ema"), "--optimizer.momentum", "0.5"],
        ),
    ],
    ids=["a class", "a class before the addon", "a strategy", "an option behind the file is for its class"],
)
def test_an_option_and_its_sub_options_stay_on_one_side_of_a_file(given, read, fit):
    assert addons_last(["fit", *given]) == ["fit", *read]
    code, err = fit(*given)
    assert code == 0, err
