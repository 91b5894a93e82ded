"""Free variables: one that is set and that nothing refers to is an error, wherever it is set."""

import pytest
from cli_fixtures import CliProbe

from lightning_stable.cli import training
from lightning_stable.cli._variables import check_variables, used_variables
from lightning_stable.cli.locate import CommandError
from lightning_stable.cli.main import main

NOTHING = "but nothing refers to it, so it would change nothing."


@pytest.fixture
def write(base, tmp_path):
    """Write a config, and return its name."""

    def file(text, name="mine.yaml"):
        (tmp_path / name).write_text(text)
        return name

    return file


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("lr: ${vars.lr}\nsteps: ${share:${vars.steps},0.1}", {"lr", "steps"}),
        ("{a: ${..vars.lr}, b: '${fit.vars.rate}', c: x${vars.tag}y}", {"lr", "rate", "tag"}),
        ("${oc.select:vars.lr,${vars.rate}}", {"lr", "rate"}),
        (
            "{a: '${vars[lr]}', b: '${..vars[opt].rate}', c: '${[vars].tag}', d: '${vars.deep[0]}'}",
            {"lr", "opt", "tag", "deep"},
        ),
        ("# --vars.lr 3\nvars: {lr: 3}\nother: ${myvars.rate}", set()),
    ],
)
def test_used_variables(text, names):
    assert used_variables(text) == names


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        (
            "extends: quickstart\nvars: {max_stepss: 3}",
            [],
            ["vars.max_stepss is set in mine.yaml, " + NOTHING, "Did you mean 'max_steps'"],
        ),
        ("{}", ["--vars", "{lrrr: 2}"], ["vars.lrrr is set, " + NOTHING, "Did you mean 'lr'"]),
        ("{}", ['--vars={"lrrr": 2}'], ["vars.lrrr is set, " + NOTHING, "Did you mean 'lr'"]),
        ("{}", ["--vars", "{ema_decay: 0.5}"], ["vars.ema_decay is set, " + NOTHING, "add --config addon:ema."]),
        ("vars: {rank: 9}", [], ["vars.rank is set in mine.yaml, " + NOTHING, "recipe:lm_finetune_pissa", "extends"]),
        ("vars: {ema_deccay: 0.5}", ["-c", "addon:ema"], ["vars.ema_deccay is set in mine.yaml", "'ema_decay'"]),
    ],
    ids=["in a file", "in a mapping", "after an equals sign", "of an addon", "of a recipe", "misspelt for an addon"],
)
def test_a_variable_that_nothing_refers_to_is_an_error(text, options, parts, base, write, tmp_path, capsys):
    mapping = [option for option in options if option.startswith("--vars")]
    # A mapping takes the place of all variables, so it stands before the files.
    rest = options if not mapping else []
    assert main(["fit", *(options if mapping else []), "-c", base, "-c", write(text), *rest]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("vars: {ema_decay: 0.5}", ["-c", "addon:ema"]),
        ("vars: {mine: 3}", ["--trainer.min_steps", "${vars.mine}"]),
        ("vars: {first: 3, second: '${.first}'}\ntrainer: {min_steps: '${vars.second}'}", []),
        ("vars: {first: 3, second: '${vars.first}'}\ntrainer: {min_steps: '${vars.second}'}", []),
        ("vars: {first: 3}\ntrainer: {min_steps: '${oc.select:vars.first}'}", []),
        ("vars: {first: 3}\nmodel: {init_args: {lr: 0.1}}\nother: ${vars}", []),
        ("vars: {first: 3}\ntrainer: {min_steps: '${vars[first]}'}", []),
        ("vars: {first: {here: 3}}\ntrainer: {min_steps: '${vars[first].here}'}", []),
        ("vars: {first: {here: 3}, second: '${.first.here}'}\ntrainer: {min_steps: '${vars.second}'}", []),
        ("vars: {first: 3, second: '${.[first]}'}\ntrainer: {min_steps: '${[vars][second]}'}", []),
        ("vars: {first: 3}\nother: ${[vars]}", []),
        ("vars: 3", []),
    ],
    ids=[
        "an addon",
        "an option",
        "beside",
        "another one",
        "a function",
        "all of them",
        "brackets",
        "a part of it",
        "a part of one beside",
        "brackets beside",
        "all of them in brackets",
        "no mapping",
    ],
)
def test_what_is_referred_to_is_fine(text, options, write):
    assert check_variables(["fit", "-c", write(text), *options]) == ""


def test_a_file_for_several_addons_goes_without_them_and_a_line_says_so(base, write, monkeypatch):
    told = []
    monkeypatch.setattr(training, "rank_zero_info", told.append)
    mine = write("vars: {ema_decay: 0.5, fallback_decay: 0.5}")
    for options, missing in (([], ["ema", "balanced_ema"]), (["-c", "addon:ema"], ["balanced_ema"])):
        assert main(["fit", "-c", base, "-c", mine, *options, "--trainer.fast_dev_run", "1"]) == 0
        (line,) = told
        told.clear()
        assert line.startswith(
            "lightning-stable: without addon:wsd or addon:wsd_s there is no use for vars.wsd_decay ("
        )
        assert [f"without addon:{name} there is no use" in line for name in ("ema", "balanced_ema")] == [
            name in missing for name in ("ema", "balanced_ema")
        ]
        assert "vars.fallback_decay (mine.yaml)." in line


def test_a_saved_config_has_no_references_left_and_runs_again(base, write, tmp_path, capsys):
    """Its variables are what they were: a record."""
    assert main(["fit", "-c", base]) == 0
    capsys.readouterr()
    assert main(["fit", "-c", base, "--print_config"]) == 0
    printed = write(capsys.readouterr().out, "printed.yaml")
    (saved,) = tmp_path.glob("runs/cli/version_0/config.yaml")
    for whole in (str(saved), printed):
        assert check_variables(["fit", "-c", whole]) == ""
        assert main(["fit", "-c", whole, "-c", "addon:ema"]) == 0
    assert len(CliProbe.seen) == 3
    with pytest.raises(CommandError, match=r"vars\.lr is set, but .*No config refers to a variable"):
        check_variables(["fit", "-c", printed, "--vars.lr", "0.5"])
