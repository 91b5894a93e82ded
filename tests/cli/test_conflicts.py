"""What a run takes once and is given twice: an error that names both, unless the user has chosen since."""

import pytest
import yaml

from lightning_stable.cli.main import main

OWN = {
    "ddp": "trainer: {strategy: ddp}",
    "co2": "trainer: {strategy: {class_path: CO2Strategy, init_args: {local_steps: 4}}}",
    "plugin": "trainer: {plugins: [{class_path: lightning.pytorch.plugins.io.TorchCheckpointIO}]}",
    "int8": "trainer: {plugins: [Int8Precision]}",
    "twice": "trainer: {callbacks+: [{class_path: EMA}, {class_path: EMA}]}",
    "step": "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 3}}",
    "bf16": "trainer: {precision: bf16-mixed}",
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
        [*addons("co2", "diloco"), "--trainer.strategy", "auto"],
        [*addons("co2"), "-c", "ddp.yaml"],
        [*addons("co2"), "-c", "ddp.yaml", *addons("diloco")],
        [*addons("simulated"), "--trainer.plugins", "null", "--trainer.precision", "bf16-mixed"],
        ["-c", "bf16.yaml", *addons("simulated"), "--trainer.precision", "null"],
        [*addons("ema"), "--trainer.callbacks", "BalancedEMA"],
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_comes_later_and_is_no_addon_has_chosen(options, fit):
    code, err = fit(*options)
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
