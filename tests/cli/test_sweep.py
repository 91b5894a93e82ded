"""``lightning-stable sweep``: the grid, what each run is told, going on after a kill, what diverged, table and map."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from cli_fixtures import CliData, CliModule
from lightning.pytorch import Trainer

from lightning_stable.cli import _sweep_pool, sweep
from lightning_stable.cli._sweep_grid import Run, make_grid, parse_seeds, precision_settings, read_json, write_json
from lightning_stable.cli._sweep_pool import PARENT_VARIABLE, Ended, Job, make_slots, run_here
from lightning_stable.cli._sweep_record import SweepRecord
from lightning_stable.cli._sweep_report import divergence, make_cells, markdown_table
from lightning_stable.cli.locate import CommandError
from lightning_stable.cli.main import main
from lightning_stable.functional.quantize import Quantizer, parse_format

CONFIG = """
vars: {lr: 0.01}
model:
  class_path: lightning_stable.recipes.image_classifier.ImageClassifier
  init_args: {architecture: mlp, width: 16, lr: "${vars.lr}"}
data: {class_path: lightning_stable.data.digits.DigitsDataModule}
trainer: {accelerator: cpu, max_steps: 3, limit_val_batches: 1, enable_model_summary: false}
"""
TWELVE = ["--config", "mine.yaml", "--seeds", "2", "--lr", "3e-3", "1e-3", "0.01", "--precision", "e8m7", "e8m3"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return tmp_path


def record_of(lr, seed, precision):
    """What a stand-in for a run records: coarse formats diverge at high rates."""
    lost = lr >= 0.01 and precision == "e8m3"
    final = None if lost and seed else 3.0 if lost else 0.5 + seed / 10
    return {"metric": "val_loss", "steps": 5, "initial": 2.3, "best": 0.4, "final": final, "curve": [[5, final]]}


class StandIn:
    """Takes the place of a subprocess; notes what it was asked for."""

    def __init__(self, codes=None):
        self.codes = codes or {}
        self.jobs = []

    def __call__(self, job, started=None):
        folder = Path(job.folder)
        self.jobs.append(job)
        code = self.codes.get(folder.name, 0)
        (folder / "log.txt").write_text(f"some lines\nlightning-stable: error: it broke with {code}.\n\n")
        checkpoint = folder / "logs" / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        if code == 0:
            settings = yaml.safe_load((folder / "run.yaml").read_text())["trainer"]
            (record,) = (c["init_args"] for c in settings["callbacks+"])
            options = dict(zip(job.command, job.command[1:], strict=False))
            (plugin,) = settings["plugins"]
            values = float(options["--vars.lr"]), int(options["--seed_everything"]), plugin["init_args"]["weights"]
            write_json(Path(record["path"]), record_of(*values))
        return code, 0.5

    @property
    def names(self):
        return sorted(Path(job.folder).name for job in self.jobs)


@pytest.fixture
def stand_in(here, monkeypatch):
    found = StandIn()
    monkeypatch.setattr(_sweep_pool, "run_one", found)
    return found


# ----------------------------------------------------------------------------- twelve runs


def test_twelve_runs_give_a_table_a_map_and_all_results(here, stand_in, capsys):
    assert main(["sweep", *TWELVE, "--jobs", "3", "--trainer.max_steps", "7", "--vars.width=3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
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
    assert main(["sweep", *TWELVE]) == 2
    assert "The run e8m7 lr 0.003 seed 0 cannot begin: it broke with 2. Its output: " in capsys.readouterr().err
    assert len(stand_in.jobs) <= 2


def test_without_matplotlib_there_is_a_table(stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it now fails
    assert main(["sweep", *TWELVE]) == 0
    out = capsys.readouterr().out
    assert "100% of 2" in out
    assert "lightning-stable[plots]" in out


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
        (["--config", "mine.yaml", "--lr", "1", "--seeds", "0"], ["--seeds 0: one number is how many"]),
        (["--config", "mine.yaml", "--lr", "1", "--seeds", "1", "-2"], ["--seeds 1 -2: seeds are from 0 on"]),
        (["--config", "mine.yaml", "--lr", "1", "--jobs", "0"], ["--jobs 0: give a number from 1 on"]),
        (["--config", "mine.yaml", "--lr", "1", "--diverged-at", "0"], ["--diverged-at 0.0: a share is above 0"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(options, parts, stand_in, here, capsys):
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


def test_seeds_and_order():
    assert parse_seeds([3]) == [0, 1, 2]
    assert parse_seeds([3, 7]) == [3, 7]
    runs = make_grid(["e8m7", "e8m3"], [0.1, 0.2], [1, 0])
    assert runs[:3] == [Run("e8m7", 0.1, 1), Run("e8m7", 0.2, 1), Run("e8m3", 0.1, 1)]
    assert len({run.name for run in runs}) == 8
    with pytest.raises(CommandError, match="same name"):
        make_grid(["e8m7"], [0.1, 0.1 + 1e-12], [0])


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


# ----------------------------------------------------------------------------- precisions


def simulated(**settings):
    return [{"class_path": "lightning_stable.precision.simulated.SimulatedPrecision", "init_args": settings}]


def test_the_formats_are_those_of_the_quantizer():
    known = [
        *(f"e{x}m{y}" for x in range(12) for y in range(13)),
        *(f"{k}{n}" for k in ("int", "shift") for n in range(12)),
    ]
    known += [
        "mxfp8",
        "mxfp8_e5m2",
        "mxfp6",
        "mxfp6_e2m3",
        "mxfp4",
        "mxfp4_e2m1",
        "nvfp4",
        "binary",
        "ternary",
        "fp8",
        "",
    ]
    for name in known:
        try:
            parse_format(name)
        except ValueError:
            with pytest.raises(CommandError, match=r"give a precision"):
                make_grid([name], [0.1], [0])
        else:
            assert make_grid([name], [0.1], [0])
    for scaling in ("none", "row", "group:32", "shift:4", "group:0", "group", "rows", "tensor:2"):
        try:
            Quantizer("int4", scaling=scaling)
        except ValueError:
            with pytest.raises(CommandError, match=r"give a precision"):
                make_grid([f"int4:{scaling}"], [0.1], [0])
        else:
            assert make_grid([f"int4/int8:{scaling}"], [0.1], [0])


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("32-true", {"precision": "32-true", "plugins": None}),
        ("bf16-mixed", {"precision": "bf16-mixed", "plugins": None}),
        ("e8m5", simulated(weights="e8m5", activations="e8m5", gradients="e8m5", scaling="none")),
        ("e4m3", simulated(weights="e4m3", activations="e4m3", gradients="e4m3")),
        ("e4m3/e5m2:row", simulated(weights="e4m3", activations="e4m3", gradients="e5m2", scaling="row")),
        ("int4:group:128", simulated(weights="int4", activations="int4", gradients="int4", scaling="group:128")),
        ("e8m5:tensor", simulated(weights="e8m5", activations="e8m5", gradients="e8m5", scaling="tensor")),
    ],
)
def test_what_a_precision_means(precision, expected, here):
    wanted = expected if isinstance(expected, dict) else {"precision": None, "plugins": expected}
    assert precision_settings(precision, ["mine.yaml"]) == wanted


def test_plugins_of_the_config_stay_and_its_precision_gives_way(here):
    io = {"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}
    own = {"class_path": "pkg.SimulatedPrecision", "init_args": {"weights": "int8", "scaling": "row", "exclude": ["a"]}}
    other = {"class_path": "lightning.pytorch.plugins.HalfPrecision"}
    (here / "a.yaml").write_text(yaml.safe_dump({"trainer": {"plugins": [io, other]}}))
    (here / "b.yaml").write_text(yaml.safe_dump({"trainer": {"plugins+": own}}))
    assert precision_settings("32-true", ["a.yaml", "b.yaml"])["plugins"] == [io]
    settings = {"weights": "e8m5", "scaling": "row", "exclude": ["a"], "activations": "e8m5", "gradients": "e8m5"}
    assert precision_settings("e8m5", ["a.yaml", "b.yaml"])["plugins"] == [io, *simulated(**settings)]
    (here / "c.yaml").write_text("trainer: {plugins: null}")
    assert precision_settings("32-true", ["a.yaml", "b.yaml", "c.yaml"])["plugins"] is None


# ----------------------------------------------------------------------------- what counts as diverged


@pytest.mark.parametrize(
    ("initial", "best", "final", "expected"),
    [
        (2.3, 0.1, 0.15, False),  # a little worse than its best, next to what it has learnt
        (2.3, 0.1, 0.64, False),
        (2.3, 0.1, 0.66, True),  # 0.1 + 0.25 * 2.2 = 0.65
        (2.3, 0.1, None, True),
        (2.3, None, None, True),
        (2.3, 2.4, 2.35, False),  # learnt nothing: noise
        (2.3, 2.4, 2.4, True),  # 2.3 + 0.25 * 0.23 = 2.3575
        (None, 1.0, 1.2, False),  # its first loss was not finite: the first value that was measured stands for it
        (None, 1.0, 1.6, True),  # 1.0 + 0.25 * 2 = 1.5
        (-1.0, -5.0, -4.5, False),
        (-1.0, -5.0, -3.9, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_when_a_run_has_diverged(initial, best, final, expected):
    record = {"metric": "val_loss", "initial": initial, "best": best, "final": final, "curve": [[1, None], [2, 3.0]]}
    assert bool(divergence(record)) is expected
    if final is not None and initial is not None:
        assert not divergence(record, 1e9)


def test_a_cell_of_failed_runs_has_no_share():
    runs = make_grid(["int8"], [0.1, 0.2], [0])
    cells = make_cells(runs, {}, runs[:1])
    assert cells["int8", 0.1].share is None
    assert "no run; 1 failed" in markdown_table(cells, "val_loss")


# ----------------------------------------------------------------------------- the record of a run


def trained(path, module=None, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    defaults = {**quiet, "enable_checkpointing": False, "max_steps": 5, "limit_val_batches": 1}
    record = SweepRecord(str(path), settings.pop("metric", "val_loss"))
    trainer = Trainer(**{**defaults, **settings}, callbacks=[record])
    module = CliModule() if module is None else module
    trainer.fit(module, datamodule=CliData())
    return trainer, module


class Lost(CliModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step >= 2 else loss


def test_the_last_value_is_that_of_the_last_step(tmp_path):
    trainer, module = trained(tmp_path / "record.json")  # epochs of four batches, so no validation after the fifth
    record = read_json(tmp_path / "record.json")
    assert [step for step, _ in record["curve"]] == [4, 5]
    with torch.no_grad():
        expected = float(module(torch.ones(2, 4)).pow(2).mean())
    assert record["final"] == pytest.approx(expected)
    assert record["best"] == min(value for _, value in record["curve"])
    assert record["initial"] > record["curve"][0][1]
    assert record["steps"] == trainer.global_step == 5


def test_the_first_loss_is_that_of_whole_batches(tmp_path):
    records = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        trained(tmp_path / "record.json", accumulate_grad_batches=accumulate)
        records.append(read_json(tmp_path / "record.json"))
    assert records[0]["initial"] == pytest.approx(records[1]["initial"])


def test_a_run_that_is_lost_ends_early(tmp_path):
    trainer, _ = trained(tmp_path / "record.json", Lost(), max_steps=400)
    assert trainer.global_step == 40, "looked at after 20 steps and after 40"
    record = read_json(tmp_path / "record.json")
    assert record["final"] is None
    assert record["initial"] is not None
    assert divergence(record)


def test_a_value_of_training_does_where_there_is_no_validation(tmp_path):
    trained(tmp_path / "record.json", limit_val_batches=0, metric="train_loss")
    assert read_json(tmp_path / "record.json")["final"] is not None
    with pytest.raises(ValueError, match=r"no 'val_los' among what this run logs: train_loss, val_loss"):
        trained(tmp_path / "other.json", metric="val_los")
    assert not (tmp_path / "other.json").exists()


def test_a_run_whose_sweep_is_gone_ends(tmp_path, monkeypatch):
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getppid()))
    trained(tmp_path / "record.json")
    parents = iter([os.getppid(), os.getppid(), 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    with pytest.raises(RuntimeError, match="The sweep that started this run is gone"):
        trained(tmp_path / "gone.json")


# ----------------------------------------------------------------------------- side by side


def test_who_stops_taking_results_ends_the_runs(tmp_path):
    jobs = []
    for place, seconds in enumerate([0, 60, 60, 60]):
        (tmp_path / str(place)).mkdir()
        jobs.append(Job([sys.executable, "-c", f"import time; time.sleep({seconds})"], str(tmp_path / str(place)), {}))
    begin = time.monotonic()
    results = run_here(jobs, 2)
    assert next(results)[:2] == (0, 0)
    results.close()
    assert time.monotonic() - begin < 15
    assert not (tmp_path / "3" / "log.txt").exists()


def test_runs_side_by_side_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert make_slots(1) == [{}]
    assert make_slots(4) == [{"OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert make_slots(1) == [{}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in make_slots(3)] == ["4", "6", "4"]


def fake_ray(seen):
    """A stand-in for Ray that runs its tasks when they are asked for; the third is lost with its machine."""

    class Task:
        def __init__(self, function):
            self.function = function

        def remote(self, job):
            seen["jobs"].append(job)
            return job.folder

    def get(folder):
        place = next(place for place, job in enumerate(seen["jobs"]) if job.folder == folder)
        if place == 2:
            raise OSError("the machine is gone")
        return seen["run"](seen["jobs"][place])

    module = types.ModuleType("ray")
    module.is_initialized = lambda: False
    module.init = lambda: seen.update(init=True)
    module.remote = lambda **options: lambda function: (seen.update(options=options), Task(function))[1]
    module.wait = lambda folders, num_returns: (folders[-1:], folders[:-1])
    module.get = get
    module.cancel = lambda folder: None
    return module


def test_ray_runs_what_the_machine_would(here, stand_in, monkeypatch, capsys):
    seen = {"jobs": [], "run": stand_in}
    monkeypatch.setitem(sys.modules, "ray", fake_ray(seen))
    assert main(["sweep", *TWELVE, "--ray", "--gpus-per-run", "0.5"]) == 1
    out, err = capsys.readouterr()
    assert seen["init"]
    assert seen["options"] == {"num_cpus": 1, "num_gpus": 0.5, "max_retries": 0}
    assert len(seen["jobs"]) == 12
    assert "1 of 12 runs failed" in err
    assert "Ray: the machine is gone" in err
    assert "50% of 2" in out or "100% of 2" in out


def test_without_ray_it_says_how_to_get_it(stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", *TWELVE, "--ray"]) == 2
    assert "pip install ray" in capsys.readouterr().err


# ----------------------------------------------------------------------------- killed, and for real

KILLED = """
import sys
from lightning_stable.cli import sweep
from lightning_stable.cli.main import main
RUN = '''
import json, pathlib, sys, time
time.sleep(0.15)
folder = pathlib.Path(sys.argv[1])
record = {"metric": "val_loss", "steps": 1, "initial": 2.0, "best": 1.0, "final": 1.0, "curve": [[1, 1.0]]}
(folder / "record.json").write_text(json.dumps(record))
'''
sweep.command_of = lambda run, folder, *rest: [sys.executable, "-c", RUN, str(folder)]
sys.exit(main(["sweep", *sys.argv[1:]]))
"""


def test_a_sweep_that_was_killed_goes_on(here):
    command = [sys.executable, "-c", KILLED, *TWELVE, "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    results = here / "runs/sweep/runs"
    end = time.monotonic() + 60
    while len(list(results.glob("*/result.json"))) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 4 <= len(before) < 12
    assert not (here / "runs/sweep/table.md").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} of 12 runs in runs/sweep have ended before." in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(results.glob("*/result.json"))) == 12
    assert (here / "runs/sweep/heatmap.png").exists()


def test_real_runs_of_digits_in_this_process(here, monkeypatch, capsys):
    def run_them(jobs, count):
        for place, job in enumerate(jobs):
            assert job.command[1:3] == ["-m", "lightning_stable.cli.main"]
            yield Ended(place, main(job.command[3:]), 1.0)

    monkeypatch.setattr(sweep, "run_here", run_them)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    interrupt = signal.getsignal(signal.SIGINT)
    options = ["--config", "mine.yaml", "--seeds", "1", "--lr", "0.01", "1e4", "--precision", "32-true", "e8m3"]
    try:
        assert main(["sweep", *options, "--trainer.max_steps", "5"]) == 0, capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, interrupt)
    everything = json.loads((here / "runs/sweep/sweep.json").read_text())
    found = {(run["precision"], run["lr"]): run for run in everything["runs"]}
    assert {key[1] for key, run in found.items() if run["diverged"]} == {1e4}
    calm = [found["32-true", 0.01], found["e8m3", 0.01]]
    assert all(1.5 < run["final"] < run["initial"] and run["steps"] == 5 for run in calm)
    assert calm[0]["final"] != calm[1]["final"]
    assert calm[0]["initial"] == pytest.approx(calm[1]["initial"], abs=0.1)
    for name in ("32-true", "e8m3"):
        assert (here / f"runs/sweep/runs/{name}-lr0.01-seed0/logs/config.yaml").is_file()


def test_a_real_run_in_a_process_of_its_own(here, capsys):
    options = ["--config", "mine.yaml", "--seeds", "1", "--lr", "0.01", "--precision", "e8m3"]
    assert main(["sweep", *options, "--trainer.max_steps", "2"]) == 0, capsys.readouterr().err
    (run,) = json.loads((here / "runs/sweep/sweep.json").read_text())["runs"]
    assert (run["status"], run["steps"]) == ("ended", 2)
    log = (here / "runs/sweep/runs/e8m3-lr0.01-seed0/log.txt").read_text()
    assert "SimulatedPrecision: 3 layers converted" in log
