"""``fit`` and its kin: configs and how they compose, references that follow overrides, and what ends a run."""

import logging
import os

import pytest
import torch
import yaml
from cli_fixtures import CliProbe

from lightning_stable.cli.main import main
from lightning_stable.cli.training import StableCLI, interval, marks, product, share, shares


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
    config = printed("-c", "recipe:quickstart", "--vars.max_steps", str(steps))
    every = config["trainer"]["val_check_interval"]
    (wsd,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("WarmupStableDecay")]
    budgets = wsd["init_args"]["budgets"]
    assert len(budgets) == 2
    assert [budget % every for budget in budgets] == [0, 0]
    assert 10 <= steps / every <= 41 or steps < 10
    assert steps % every == 0 or steps in (97, 601), "only a prime number of steps may end beside a validation"


def test_product():
    assert product(8, 2) == 16
    for wrong in ("auto", 2.0, True):
        with pytest.raises(ValueError, match=f"{wrong!r} is no whole number"):
            product(wrong, 2)


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


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_after_ctrl_c_no_checkpoint_of_an_earlier_run_is_named(base, tmp_path, capsys):
    options = ["fit", "--config", base, "--trainer.logger", "false"]
    assert main(options) == 0
    (old,) = tmp_path.glob("checkpoints/*.ckpt")
    os.utime(old, (1, 1))
    assert main([*options, "--trainer.callbacks.fail", "interrupt"]) == 130
    assert "To go on" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ([], ["--vars.steps", "3"], "the checkpoint is at step 4, beyond trainer.max_steps=3. Raise that to train on."),
        ([], [], "the checkpoint is at step 4, where the run ends by trainer.max_steps=4. Raise"),
        (
            ["--vars.steps=-1", "--trainer.max_epochs", "1"],
            [],
            "at epoch 1, where the run ends by trainer.max_epochs=1.",
        ),
        ([], ["--vars.steps", "5"], ""),
        ([], ["--vars.steps", "8"], ""),
    ],
    ids=["beyond", "at the end", "of epochs", "in an epoch", "on to the end of an epoch"],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_has_nothing_left_to_train_says_so(first, then, told, base, tmp_path, capsys):
    command = ["fit", "--config", base, *first]
    assert main(command) == 0
    (saved,) = tmp_path.glob("runs/cli/version_0/checkpoints/*.ckpt")
    capsys.readouterr()
    assert main([*command, *then, "--ckpt_path", str(saved)]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "nothing was trained" in line]
    assert len(warned) == bool(told)
    assert all(line.startswith("lightning-stable: warning: ") and told in line for line in warned)


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


def test_remarks_of_libraries_are_kept_back_for_a_command_unless_they_are_asked_for(base, monkeypatch):
    seen = []
    torchao, pytree, other = map(logging.getLogger, ("torchao", "torch.utils._pytree", "lightning_stable"))
    monkeypatch.setattr(torchao, "level", logging.NOTSET)
    monkeypatch.setattr(pytree, "level", logging.DEBUG)  # as by TORCH_LOGS

    def look(self, subcommand):
        child = logging.getLogger("torchao.kernel.intmm")
        seen.extend(logger.isEnabledFor(logging.WARNING) for logger in (torchao, child, pytree, other))

    monkeypatch.setattr(StableCLI, "_run_subcommand", look)
    assert main(["fit", "--config", base]) == 0
    assert seen == [False, False, True, True]
    assert (torchao.level, pytree.level) == (logging.NOTSET, logging.DEBUG)


class SGD(torch.optim.SGD):
    """An optimizer of torch's name, as libraries have them that plugins import."""


@pytest.mark.parametrize("options", [["--optimizer", "SGD"], ["--optimizer=SGD"]])
def test_an_optimizer_by_its_bare_name_is_that_of_torch_and_trains_adapters(options, base, tmp_path):
    adapting = ["--config", "addon:adapters", "--vars.adapters_model", "null", "--vars.adapters_rank", "1"]
    schedule = ["--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.5"]
    assert main(["fit", "--config", base, *adapting, *options, "--optimizer.lr", "0.5", *schedule]) == 0
    (path,) = tmp_path.glob("runs/cli/version_0/checkpoints/*.ckpt")
    saved = torch.load(path, weights_only=True)
    factors = {name: each for name, each in saved["state_dict"].items() if "lora_" in name}
    assert factors["layer.lora_B.default.weight"].abs().sum() > 0  # it began at 0
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == len(factors) == 2
