"""``lightning-stable sweep``: what each run is told, going on with a sweep, what failed, and wrong use."""

import json
import subprocess
import sys

import pytest
import yaml
from sweep_fixtures import CONFIG, TWELVE, StandIn

from lightning_stable.cli import _sweep_pool
from lightning_stable.cli._sweep_grid import config_paths, read_json, write_json
from lightning_stable.cli._sweep_precision import trainer_parts
from lightning_stable.cli.main import main

# ----------------------------------------------------------------------------- twelve runs


def test_twelve_runs_give_a_table_a_map_and_all_results(here, stand_in, capsys):
    assert main(["sweep", *TWELVE, "--jobs", "3", "--trainer.max_steps", "7", "--vars.width=3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first, *lines = out.splitlines()
    assert first == ("12 runs (2 precisions x 3 rates x 2 seeds), 3 at a time on this machine. Results: runs/sweep"), (
        "before the first run ends"
    )
    assert {line.split("]")[0] for line in lines[:12]} == {f"[{place}/12" for place in range(1, 13)}
    assert any(line.endswith("e8m7 lr 0.003 seed 1: val_loss 0.6 (0 s)") for line in lines[:12])
    assert any("e8m3 lr 0.01 seed 1: diverged: val_loss is not finite at the end" in line for line in lines[:12])
    assert any("e8m3 lr 0.01 seed 0: diverged: val_loss ended at 3, above 0.875" in line for line in lines[:12])
    table = (here / "runs/sweep/table.md").read_text()
    assert table in out
    assert [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:3] in ("| p", "| e")
    ] == [
        ["precision", "lr 0.001", "lr 0.003", "lr 0.01"],
        ["e8m7", "0% of 2; 0.55", "0% of 2; 0.55", "0% of 2; 0.55"],
        ["e8m3", "0% of 2; 0.55", "0% of 2; 0.55", "100% of 2"],
    ]
    assert (here / "runs/sweep/heatmap.png").read_bytes()[:4] == b"\x89PNG"
    everything = json.loads((here / "runs/sweep/sweep.json").read_text())
    assert len(everything["runs"]) == 12
    assert sum(run["diverged"] for run in everything["runs"]) == 2
    worst = next(cell for cell in everything["cells"] if (cell["precision"], cell["lr"]) == ("e8m3", 0.01))
    assert (worst["share"], worst["ended"], worst["median"]) == (1.0, 2, None)
    assert not list(here.rglob("*.ckpt")), "checkpoints of runs that ended are not kept"


def test_what_a_run_is_told(here, stand_in):
    assert main(["sweep", *TWELVE, "--trainer.max_steps", "7", "--vars.width=3", "--model.lr_decay", "-1"]) == 0
    job = next(job for job in stand_in.jobs if job.folder.endswith("e8m3-lr0.003-seed1"))
    assert job.command[:4] == [sys.executable, "-m", "lightning_stable.cli.main", "fit"]
    folder = "runs/sweep/runs/e8m3-lr0.003-seed1"
    assert job.command[4:8] == ["--config", "mine.yaml", "--config", f"{folder}/run.yaml"]
    overrides = ["--trainer.max_steps", "7", "--vars.width=3", "--model.lr_decay", "-1"]
    assert job.command[8:] == [*overrides, "--vars.lr", "0.003", "--seed_everything", "1"]
    settings = yaml.safe_load((here / folder / "run.yaml").read_text())["trainer"]
    assert settings["logger"][0]["init_args"]["save_dir"] == str(here / folder)
    assert settings["default_root_dir"] == str(here / folder)


def test_started_again_it_runs_what_is_missing_alone(here, stand_in, capsys):
    assert main(["sweep", *TWELVE]) == 0
    first = (here / "runs/sweep/table.md").read_text()
    stand_in.jobs.clear()
    capsys.readouterr()
    assert main(["sweep", *TWELVE]) == 0
    assert stand_in.names == []
    assert "12 of 12 runs in runs/sweep have ended before.\n" in capsys.readouterr().out
    assert (here / "runs/sweep/table.md").read_text() == first
    assert main(["sweep", *TWELVE, "int4:group:32", "--lr", "1e-3", "--seeds", "2"]) == 0
    assert stand_in.names == [f"int4_group_32-lr0.001-seed{seed}" for seed in (0, 1)]
    (here / "runs/sweep/runs/e8m7-lr0.01-seed0/result.json").write_text('{"metric": "val')  # cut off in the middle
    stand_in.jobs.clear()
    assert main(["sweep", *TWELVE]) == 0
    assert stand_in.names == ["e8m7-lr0.01-seed0"]


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        (["--trainer.max_steps", "9"], "options"),
        (["--metric", "val_accuracy"], "metric"),
        (["--lr-key", "lr"], "lr-key"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(options, differs, stand_in, capsys):
    assert main(["sweep", *TWELVE]) == 0
    assert main(["sweep", *TWELVE, *options]) == 2
    assert f"--out runs/sweep holds a sweep that differs in: {differs}." in capsys.readouterr().err


def test_a_sweep_without_a_result_yet_is_in_nobodys_way(here, stand_in, capsys):
    one = ["sweep", "--config", "mine.yaml", "--lr", "0.01", "--seeds", "1", "--precision", "e8m3"]
    stand_in.codes = {"e8m3-lr0.01-seed0": 2}
    assert main([*one, "--trainer.max_stepz", "9"]) == 2
    stand_in.codes = {"e8m3-lr0.01-seed0": 1}
    assert main([*one, "--metric", "val_acc"]) == 1
    stand_in.codes = {}
    assert main([*one, "--trainer.max_steps", "9"]) == 0
    assert main([*one, "--trainer.max_steps", "8"]) == 2
    assert "differs in: options" in capsys.readouterr().err


def test_an_interrupted_sweep_says_how_to_go_on(here, monkeypatch, capsys):
    class Interrupted(StandIn):
        def __call__(self, job, started=None):
            if len(self.jobs) == 3:
                raise self.stop
            return super().__call__(job, started)

    for stop, code in ((KeyboardInterrupt(), 130), (_sweep_pool.Terminated(), 143)):
        stand_in = Interrupted()
        stand_in.stop = stop
        monkeypatch.setattr(_sweep_pool, "run_one", stand_in)
        assert main(["sweep", *TWELVE, "--out", str(code)]) == code
        err = capsys.readouterr().err
        kept = len(list((here / str(code)).glob("runs/*/result.json")))
        assert kept <= 3
        assert err == f"lightning-stable: interrupted; the same command goes on. {kept} of 12 runs have ended.\n"
        assert not (here / str(code) / "table.md").exists()
        monkeypatch.setattr(_sweep_pool, "run_one", again := StandIn())
        assert main(["sweep", *TWELVE, "--out", str(code)]) == 0
        assert len(again.jobs) == 12 - kept


def test_a_config_that_was_edited_is_another_sweep(here, stand_in, capsys):
    assert main(["sweep", *TWELVE]) == 0
    (here / "mine.yaml").write_text(CONFIG + "seed_everything: 3\n")
    assert main(["sweep", *TWELVE]) == 2
    assert "differs in: contents" in capsys.readouterr().err
    assert main(["sweep", *TWELVE, "--out", "elsewhere"]) == 0


def test_runs_that_failed_are_told_and_run_again(here, stand_in, capsys):
    stand_in.codes = {"e8m7-lr0.01-seed1": 1, "e8m3-lr0.001-seed0": -9}
    assert main(["sweep", *TWELVE]) == 1
    out, err = capsys.readouterr()
    log = "runs/sweep/runs/e8m7-lr0.01-seed1/log.txt"
    assert f"e8m7 lr 0.01 seed 1: failed with exit code 1, see {log}" in out
    assert "0% of 1; 0.5; 1 failed" in out
    assert "2 of 12 runs failed. The first of them, e8m" in err
    assert "ended with: it broke with" in err
    assert len(err.splitlines()) == 1
    assert [run["status"] for run in json.loads((here / "runs/sweep/sweep.json").read_text())["runs"]].count(
        "failed"
    ) == 2
    stand_in.codes.clear()
    stand_in.jobs.clear()
    assert main(["sweep", *TWELVE]) == 0
    assert stand_in.names == ["e8m3-lr0.001-seed0", "e8m7-lr0.01-seed1"]


def test_a_wrong_config_stops_the_sweep_at_once(stand_in, capsys):
    stand_in.codes = {"e8m7-lr0.003-seed0": 2}
    stand_in.seconds = 0.2  # of which the first of twelve tells
    assert main(["sweep", *TWELVE]) == 2
    assert "The run e8m7 lr 0.003 seed 0 cannot begin: it broke with 2. Its output: " in capsys.readouterr().err
    assert len(stand_in.jobs) < 12


def test_a_key_of_the_rate_that_a_run_refuses_is_told_with_those_there_are(here, stand_in, capsys):
    stand_in.codes = {"e8m7-lr0.003-seed0": 2}
    said = "model: the class CliModule has no option 'rate'."
    stand_in.say = f"lightning-stable: error: {said}"
    assert main(["sweep", *TWELVE, "--lr-key", "model.rate"]) == 2
    err = capsys.readouterr().err
    assert f"cannot begin: {said} The rate is set by --lr-key model.rate. In these configs there is --lr-key v" in err
    stand_in.say = "lightning-stable: error: it has no option 'speed'."
    assert main(["sweep", *TWELVE, "--lr-key", "model.rate"]) == 2
    assert "The rate is set by" not in capsys.readouterr().err


def test_the_rate_may_be_a_variable_of_an_option(here, stand_in):
    (here / "bare.yaml").write_text("model: {class_path: cli_fixtures.CliModule}")
    options = ["--lr", "0.1", "--seeds", "1", "--precision", "e4m3", "--model.lr", "${vars.lr}"]
    assert main(["sweep", "--config", "bare.yaml", *options]) == 0


def test_callbacks_that_need_a_simulated_format_are_left_out_where_there_is_none_and_that_is_said(
    here, stand_in, capsys
):
    names = "NumericsMonitor", "PrecisionFallback"
    given = [{"class_path": f"lightning_stable.callbacks.{name}"} for name in names]
    (here / "more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": given}}))
    options = ["--config", "mine.yaml", "--config", "more.yaml", "--lr", "0.1", "--seeds", "1"]
    assert main(["sweep", *options, "--precision", "e4m3", "32-true"]) == 0
    said = "Runs in 32-true are without NumericsMonitor and PrecisionFallback: they have no simulated format.\n"
    assert said in capsys.readouterr().out


def test_without_matplotlib_there_is_a_table(stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    assert main(["sweep", *TWELVE]) == 0
    out = capsys.readouterr().out
    assert "100% of 2" in out
    assert "lightning-stable[plots]" in out


def test_names_that_look_alike_are_runs_of_their_own(here, stand_in):
    options = ["sweep", "--config", "mine.yaml", "--seeds", "1", "--lr", "0.1"]
    assert main([*options, "--precision", "mxfp8/e5m2"]) == 0
    assert main([*options, "--precision", "mxfp8_e5m2"]) == 0
    assert main([*options, "0.10000001", "--precision", "mxfp8_e5m2"]) == 0
    assert stand_in.names == [f"mxfp8{rest}-seed0" for rest in ("--e5m2-lr0.1", "_e5m2-lr0.1", "_e5m2-lr0.10000001")]
    table = (here / "runs/sweep/table.md").read_text()
    assert "lr 0.1 " in table
    assert "lr 0.10000001 " in table


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"precision": "e4m3"}, "'e4m3'"), ({"lr": 0.011}, "lr 0.011"), ({"seed": 4}, "seed 4"), (None, "seed None")],
)
def test_the_result_of_another_run_is_not_taken(changed, said, here, stand_in, capsys):
    assert main(["sweep", *TWELVE]) == 0
    path = here / "runs/sweep/runs/e8m7-lr0.01-seed1/result.json"
    found = read_json(path)
    assert (found["precision"], found["lr"], found["seed"]) == ("e8m7", 0.01, 1)
    own = {name: value for name, value in found.items() if name not in ("precision", "lr", "seed")}
    write_json(path, own if changed is None else {**found, **changed})
    stand_in.jobs.clear()
    assert main(["sweep", *TWELVE]) == 2
    err = capsys.readouterr().err
    assert "runs/sweep/runs/e8m7-lr0.01-seed1 is the folder of the run e8m7 lr 0.01 seed 1, and" in err
    assert said in err
    assert not stand_in.jobs


# ----------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--lr", "0.1"], ["arguments are required: -c/--config"]),
        (["--config", "mine.yaml"], ["arguments are required: --lr"]),
        (["--config", "quickstrt", "--lr", "0.1"], ["There is no recipe 'quickstrt'", "quickstart"]),
        (["--config", "gone.yaml", "--lr", "0.1"], ["--config gone.yaml: there is no such file"]),
        (["--config", "addon:emma", "--lr", "0.1"], ["There is no addon 'emma'"]),
        (["--config", "mine.yaml", "--lr", "fast"], ["invalid float value: 'fast'"]),
        (["--config", "mine.yaml", "--lr", "0"], ["--lr 0.0: a learning rate is a finite number above 0"]),
        (["--config", "mine.yaml", "--lr", "0.1", "1e-1"], ["--lr: 0.1 is given twice"]),
        (["--config", "mine.yaml", "--lr", "1", "--precision", "e8m7", "e8m7"], ["--precision: e8m7 is given twice"]),
        (
            ["--config", "mine.yaml", "--lr", "1", "--precision", "e9m9"],
            ["--precision e9m9: give a", "32-true", "mxfp8"],
        ),
        (["--config", "mine.yaml", "--lr", "1", "--precision", "e4m3:group"], ["--precision e4m3:group: give a"]),
        (
            ["--config", "mine.yaml", "--lr", "1", "--precision", "mxfp4:row"],
            ["for each of its blocks", "Write mxfp4."],
        ),
        (["--config", "mine.yaml", "--lr", "1", "--precision", "binary:shift:4"], ["is a mean", "channel"]),
        (
            ["--config", "mine.yaml", "--lr", "1", "--lr-key", "vars.rate"],
            ["--lr-key vars.rate: no config refers to ${vars.rate}", "--lr-key vars.lr and --lr-key model.lr."],
        ),
        (["--config", "bare.yaml", "--lr", "1"], ["--lr-key vars.lr: no config", "as in --lr-key model.lr or"]),
        (["--config", "broken.yaml", "--lr", "1"], ["--config broken.yaml is no YAML"]),
        (["--config", "mine.yaml", "--lr", "1", "--seeds", "0"], ["--seeds 0: one number is how many"]),
        (["--config", "mine.yaml", "--lr", "1", "--seeds", "1", "-2"], ["--seeds 1 -2: seeds are from 0 on"]),
        (["--config", "mine.yaml", "--lr", "1", "--jobs", "0"], ["--jobs 0: give a number from 1 on"]),
        (["--config", "mine.yaml", "--lr", "1", "--diverged-at", "0"], ["--diverged-at 0.0: a share is above 0"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(options, parts, stand_in, here, capsys):
    (here / "bare.yaml").write_text("model: {class_path: cli_fixtures.CliModule}")
    (here / "broken.yaml").write_text("trainer: [")
    assert main(["sweep", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lightning-stable: error: ")
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert not (here / "runs").exists()
    assert not stand_in.jobs


def test_a_recipe_goes_by_its_bare_name(stand_in):
    assert main(["sweep", "--config", "quickstart", "--lr", "0.1", "--seeds", "1", "--precision", "e4m3"]) == 0
    assert stand_in.jobs[0].command[5] == "recipe:quickstart"


def test_it_needs_no_torch(here):
    code = (
        "import sys; from lightning_stable.cli.main import main\n"
        "main(['sweep', '--help']); main(['sweep', '--config', 'mine.yaml', '--lr', '0'])\n"
        "sys.exit(bool({'torch', 'lightning', 'jsonargparse', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--precision" in done.stdout
    assert "a learning rate is" in done.stderr


def test_addons_come_after_files_as_in_a_run(here):
    (here / "lists.yaml").write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]}"
    )
    configs = config_paths(["addon:simulated", "addon:precision_fallback", "lists.yaml"])
    assert configs == ["lists.yaml", "addon:simulated", "addon:precision_fallback"]
    names = [part["class_path"].rpartition(".")[2] for part in trainer_parts("callbacks", configs)]
    assert names == ["LearningRateMonitor", "PrecisionFallback"]
