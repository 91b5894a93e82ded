"""Configs that begin with a packaged recipe, ``extends: NAME``: as if it stood before them."""

import pytest
import yaml
from cli_fixtures import CliProbe

from lightning_stable.cli._configs import Config, addons_last, read_configs, walk_arguments
from lightning_stable.cli._sweep_grid import Run, check_rate_key, rate_keys, run_config
from lightning_stable.cli._sweep_precision import trainer_parts
from lightning_stable.cli.locate import CommandError
from lightning_stable.cli.main import main

MINE = """\
# Mine.
extends: co2_two_processes # all but the rate

vars: {lr: 0.5}
trainer:
  callbacks+: [{class_path: EMA}]
"""


@pytest.fixture
def mine(base, tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    return "mine.yaml"


def test_it_is_the_recipe_with_what_the_file_says(mine, capsys):
    printed = []
    for options in (["-c", mine], ["-c", "recipe:co2_two_processes", "--vars.lr", "0.5", "-c", "addon:ema"]):
        assert main(["fit", *options, "--print_config"]) == 0
        printed.append(yaml.safe_load(capsys.readouterr().out))
    ours, theirs = printed
    names = [[part["class_path"].rpartition(".")[2] for part in each["trainer"]["callbacks"]] for each in printed]
    assert names[0] == names[1]
    for each in printed:
        del each["trainer"]["callbacks"]
        each["vars"].pop("ema_decay", None)
    assert ours == theirs
    assert ours["model"]["init_args"]["lr"] == 0.5
    assert "extends" not in ours


@pytest.mark.parametrize(
    "text",
    ["extends: quickstart", "# Mine.\n\nextends : quickstart # all of it\n", '\ufeff"extends": quickstart\n---\n'],
    ids=["alone", "with comments", "quoted, after a mark"],
)
def test_a_config_may_be_nothing_but_its_recipe(text, base, tmp_path, capsys):
    (tmp_path / "all.yaml").write_text(text, encoding="utf-8")
    assert main(["fit", "-c", "all.yaml", "-c", base, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["vars"]["ema_decay"]
    assert config["model"]["class_path"] == "cli_fixtures.CliModule"


def test_a_file_that_says_nothing_changes_nothing(base, tmp_path, capsys):
    (tmp_path / "nothing.yaml").write_text("# nothing yet\n")
    assert main(["fit", "-c", base, "-c", "nothing.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "cli_fixtures.CliModule"


def test_a_run_saves_a_config_that_stands_by_itself(mine, tmp_path):
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "-c", mine, *alone, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]) == 0
    (saved,) = tmp_path.rglob("version_*/config.yaml")
    assert "extends" not in yaml.safe_load(saved.read_text())
    assert main(["fit", "-c", str(saved), "--trainer.fast_dev_run", "1"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: lm_pretrian", "There is no recipe 'lm_pretrian'. Did you mean 'lm_pretrain'"),
        ("{extends: lm_pretrain}", "extends has to stand once, on a line of its own at the left margin"),
        ("extends:  # nothing", "extends has to name a packaged recipe, as in 'extends: lm_pretrain'"),
    ],
)
def test_a_name_that_is_none_is_one_line(text, message, base, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["fit", "-c", "wrong.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_unknown_keys_and_unused_variables_are_still_found(mine, capsys):
    assert main(["fit", "-c", mine, "--vars.local_stepz", "3"]) == 2
    assert "'local_steps'" in capsys.readouterr().err
    assert main(["fit", "-c", mine, "--trainer.max_stepz", "3"]) == 2
    assert "'trainer.max_steps'" in capsys.readouterr().err


def test_a_sweep_sees_what_is_extended(mine):
    check_rate_key("vars.lr", [mine], [])
    assert "--lr-key vars.lr" in rate_keys([mine])
    names = [part["class_path"].rpartition(".")[2] for part in trainer_parts("callbacks", [mine])]
    assert names[0] == "WarmupStableDecay"
    assert names[-1] == "EMA"


def test_configs_come_in_the_order_in_which_they_are_merged(mine):
    walked = list(walk_arguments(["fit", "-c", mine, "--trainer.devices=3", "--config=addon:ema", "--vars.lr", "1"]))
    names = [each.name if isinstance(each, Config) else each for each in walked]
    given = ("--trainer.devices", "3"), ("--vars.lr", "1")
    assert names == ["recipe:co2_two_processes", mine, given[0], "addon:ema", given[1]]
    assert [config.is_addon for config in walked if isinstance(config, Config)] == [False, False, True]


LISTS = """\
extends: co2_two_processes
trainer: {max_steps: 7, strategy: auto, callbacks: [{class_path: cli_fixtures.CliProbe}]}
model: {init_args: {lr: 0.5}}
vars: {lr: 0.5, ema_decay: 0.5}
"""


@pytest.mark.parametrize(
    "spelling",
    [["-c", "addon:ema"], ["--config=addon:ema"], ["-caddon:ema"], ["-c=addon:ema"]],
    ids=" ".join,
)
def test_an_addon_before_a_file_adds_to_it(spelling, base, tmp_path, capsys):
    (tmp_path / "lists.yaml").write_text(LISTS)
    printed = []
    for options in ([*spelling, "-c", "lists.yaml"], ["--config=lists.yaml", *spelling]):
        assert main(["fit", *options, "--print_config"]) == 0
        printed.append(yaml.safe_load(capsys.readouterr().out))
    assert printed[0] == printed[1]
    callbacks = printed[0]["trainer"]["callbacks"]
    assert [part["class_path"].rpartition(".")[2] for part in callbacks] == ["CliProbe", "EMA"]
    assert callbacks[1]["init_args"]["decay"] == 0.5, "vars of a file are set, those of an addon defaults"


def test_an_addon_before_a_recipe_is_in_the_run_that_follows(base, tmp_path):
    short = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks: [{class_path: cli_fixtures.CliProbe}]}")
    assert main(["run", "quickstart", "-c", "addon:ema", "-c", "mine.yaml", *short]) == 0
    ((trainer, _),) = CliProbe.seen
    assert {"EMA", "CliProbe"} <= {type(callback).__name__ for callback in trainer.callbacks}


FILE, ADDON, OTHER = ["-c", "lists.yaml"], ["-c", "addon:co2"], ["--config=addon:ema"]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([*ADDON, *FILE, *OTHER], [*FILE, *ADDON, *OTHER]),
        ([*ADDON, *OTHER, *FILE, "-c", "recipe:quickstart"], [*FILE, "-c", "recipe:quickstart", *ADDON, *OTHER]),
        ([*ADDON, "--trainer.min_steps", "-1", *FILE], [*FILE, *ADDON, "--trainer.min_steps", "-1"]),
        ([*ADDON, "--trainer.strategy=ddp", *FILE], [*FILE, *ADDON, "--trainer.strategy=ddp"]),
        ([*ADDON, "--trainer.max_steps", "3", *FILE], ["--trainer.max_steps", "3", *FILE, *ADDON]),
        ([*ADDON, "--model.lr=1", *FILE], ["--model.lr=1", *FILE, *ADDON]),
        ([*OTHER, "--vars.ema_decay", "1", *FILE], ["--vars.ema_decay", "1", *FILE, *OTHER]),
        ([*OTHER, "--trainer.callbacks.decay=1", *FILE], [*FILE, *OTHER, "--trainer.callbacks.decay=1"]),
        (["--trainer.strategy", "ddp", *ADDON, *FILE], ["--trainer.strategy", "ddp", *FILE, *ADDON]),
        ([*FILE, *ADDON, "--trainer.max_steps", "3"], [*FILE, *ADDON, "--trainer.max_steps", "3"]),
    ],
    ids=lambda value: " ".join(value).replace("-c ", ""),
)
def test_addons_are_read_after_files_and_an_option_keeps_what_it_chose(given, read, base, tmp_path):
    (tmp_path / "lists.yaml").write_text(LISTS)
    assert addons_last(["fit", *given]) == ["fit", *read]


def test_without_an_addon_before_a_file_nothing_is_read():
    assert addons_last(["fit", "-c", "gone: [", *ADDON]) == ["fit", "-c", "gone: [", *ADDON]
    assert addons_last([*ADDON]) == ADDON
    with pytest.raises(CommandError, match="is no YAML"):
        addons_last(["fit", *ADDON, "--trainer.max_steps", "3", "-c", "trainer: ["])


@pytest.mark.parametrize("precision", ["bf16-mixed", "e4m3"])
def test_what_a_sweep_sets_for_a_run_comes_after_addons(precision, base, tmp_path):
    """It has looked at the addons: of their callbacks and plugins it has kept what goes with the precision."""
    configs = [base, "addon:simulated", "addon:precision_fallback"]
    content = run_config(Run(precision, 0.1, 0), tmp_path, configs, "val_loss")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    given = ["fit", *(part for name in (*configs, "run.yaml") for part in ("--config", name))]
    assert addons_last(given) == given
    assert main([*given, "--trainer.limit_val_batches", "1"]) == 0
    ((trainer, _),) = CliProbe.seen
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names.count("SweepRecord") == 1
    assert names.count("PrecisionFallback") == (precision == "e4m3")


def test_what_is_no_file_is_left_to_the_parser():
    for given in ("gone.yaml", "trainer: {max_steps: 3}", "x" * 5000):
        (config,) = read_configs(given)
        assert config.value == given
    with pytest.raises(CommandError, match="is no YAML"):
        read_configs("trainer: [")[0].content  # noqa: B018  it is read here
