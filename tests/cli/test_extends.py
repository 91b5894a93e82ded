"""Configs that begin with a packaged recipe, ``extends: NAME``: as if it stood before them."""

import pytest
import yaml

from lightning_stable.cli._configs import Config, read_configs, walk_arguments
from lightning_stable.cli._sweep_grid import check_rate_key, rate_keys
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


def test_what_is_no_file_is_left_to_the_parser():
    for given in ("gone.yaml", "trainer: {max_steps: 3}", "x" * 5000):
        (config,) = read_configs(given)
        assert config.value == given
    with pytest.raises(CommandError, match="is no YAML"):
        read_configs("trainer: [")[0].content  # noqa: B018  it is read here
