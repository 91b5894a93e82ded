"""Strategies on the command line: names and classes, messages, and real runs of several processes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_stable.cli import messages, training
from lightning_stable.cli.locate import list_scripts
from lightning_stable.cli.main import main
from lightning_stable.cli.summary import read_metrics
from lightning_stable.cli.training import StableCLI
from lightning_stable.registry import METHODS
from lightning_stable.strategies._workers import LostWorkerError

STRATEGIES = [method for method in METHODS if method.kind == "strategy"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
BASH = shutil.which("bash") or ""
needs_bash = pytest.mark.skipif(not BASH, reason="needs bash")
# A busy machine takes minutes to import everything in several processes.
PATIENCE = 500

BASE = """
trainer:
  max_steps: 4
  accelerator: cpu
  devices: 2
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  enable_checkpointing: false
model: {class_path: cli_fixtures.CliModule}
data: {class_path: cli_fixtures.CliData}
"""

FAILING = """
from lightning.pytorch import Callback

class Failing(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5 and trainer.global_rank == self.rank:
            raise RuntimeError(f"planned on rank {self.rank}")
"""


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A config in an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the current directory there
    (tmp_path / "base.yaml").write_text(BASE)
    previous = signal.getsignal(signal.SIGINT)
    yield "base.yaml"
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def built(base, monkeypatch):
    """Build everything that a ``fit`` with the given options runs, and return it."""
    made: list[StableCLI] = []
    monkeypatch.setattr(StableCLI, "_run_subcommand", lambda self, subcommand: made.append(self))

    def build(*options):
        assert main(["fit", "--config", base, *options]) == 0
        return made.pop()

    return build


def command(*arguments, cwd, check=True):
    """Run the command as a user does, in a process of its own and those that it starts."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_stable.cli.main", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# ----------------------------------------------------------------------------- names and classes


@pytest.mark.parametrize("method", STRATEGIES, ids=lambda method: method.name)
def test_a_strategy_goes_by_its_name_and_by_its_class(method, built):
    for spelling in (method.name, method.class_name):
        assert type(built("--trainer.strategy", spelling).trainer.strategy).__name__ == method.class_name
    options = ["--trainer.strategy", method.class_path, "--trainer.strategy.timeout", "0:01:00"]
    cli = built(*options)
    assert type(cli.trainer.strategy).__name__ == method.class_name
    saved = Path("saved.yaml")
    saved.write_text(yaml.safe_dump(yaml.safe_load(cli.parser.dump(cli.config))["fit"]))
    again = built("--config", str(saved))
    assert type(again.trainer.strategy) is type(cli.trainer.strategy)
    assert again.trainer.strategy._timeout == cli.trainer.strategy._timeout


def test_arguments_reach_the_strategy(built):
    options = ["--trainer.strategy.local_steps", "[[0, 4], [100, 24]]", "--trainer.strategy.staleness_penalty", "gap"]
    strategy = built("--trainer.strategy", "CO2Strategy", *options).trainer.strategy
    assert [tuple(pair) for pair in strategy.local_steps] == [(0, 4), (100, 24)]
    assert strategy.staleness_penalty == "gap"
    assert built("-c", "addon:co2", "--vars.co2_local_steps", "auto").trainer.strategy.local_steps == "auto"


def test_an_addon_takes_the_place_of_plain_ddp_and_an_option_that_of_an_addon(built):
    co2, diloco = ["-c", "addon:co2"], ["--trainer.strategy", "DiLoCoStrategy"]
    assert type(built("--trainer.strategy", "ddp", *co2).trainer.strategy).__name__ == "CO2Strategy"
    assert type(built(*co2, *diloco).trainer.strategy).__name__ == "DiLoCoStrategy"


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (["--trainer.strategy", "co3"], 2, ["trainer.strategy", "'co3'", "'co2'"]),
        (["--trainer.strategy", "zzzzz"], 2, ["'zzzzz'", "local_sgd", "package.module.Class"]),
        (
            ["--trainer.strategy", "co2", "--trainer.strategy.local_steps", "4"],
            2,
            ["trainer.strategy", "'co2'", "write CO2Strategy"],
        ),
        (["--trainer.strategy", "CO2Strategy", "--trainer.strategy.local_stepz", "4"], 2, ["'local_steps'"]),
        (["-c", "addon:slowmo", "--vars.slowmo_local_steps", "0"], 1, ["local_steps", "0"]),
        (["-c", "addon:diloco", "--vars.diloco_momentum", "1.5"], 1, ["outer_momentum", "1.5"]),
    ],
    ids=["near", "far", "name with options", "no option", "no steps", "momentum"],
)
def test_what_is_wrong_with_a_strategy_is_one_line(options, code, parts, base, capsys):
    assert main(["fit", "--config", base, *options]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-stable: error:")]
    assert "Subtypes" not in line
    for part in parts:
        assert part in line


def test_a_bug_in_the_constructor_of_a_strategy_keeps_its_traceback(base, tmp_path):
    (tmp_path / "own_strategy_of_the_test.py").write_text(
        "from lightning.pytorch.strategies import DDPStrategy\n"
        "class OwnStrategy(DDPStrategy):\n"
        "    def __init__(self, size: int = 1):\n"
        "        raise ValueError('a bug of the user')\n"
    )
    options = ["--trainer.strategy", "own_strategy_of_the_test.OwnStrategy", "--trainer.strategy.size", "2"]
    with pytest.raises(ValueError, match="a bug of the user"):
        main(["fit", "--config", base, *options])


# ----------------------------------------------------------------------------- real processes


def test_two_processes_make_one_run(tmp_path):
    """The recipe as it is, but short: what is printed is printed once, and there is one folder."""
    short = ["--trainer.max_steps", "24", "--vars.warmup_steps", "4", "--trainer.val_check_interval", "12"]
    done = command("run", "co2_two_processes", *short, "--trainer.log_every_n_steps", "1", *QUIET, cwd=tmp_path)
    *_, validation, picture, place = done.stdout.splitlines()
    assert re.fullmatch(r"Last validation, at step 24: val_accuracy 0\.\d{4}, val_loss \d\.\d{4}", validation)
    assert picture == "Picture: runs/co2_two_processes/version_0/training.png"
    assert place == "The run's files are in runs/co2_two_processes/version_0"
    assert done.stdout.count("Last validation") == 1
    assert "Starting with 2 processes" in done.stderr
    (folder,) = (tmp_path / "runs/co2_two_processes").iterdir()
    assert {"config.yaml", "metrics.csv", "training.png"} <= {path.name for path in folder.iterdir()}
    metrics = read_metrics(folder / "metrics.csv")
    assert [step for step, _ in metrics["train_loss"]] == list(range(24)), "one process writes the log"
    assert [step for step, _ in metrics["val_loss"]] == [11, 23]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 24
    assert last["CO2Strategy"]["steps"] == 24
    # It goes on from there, with the config that it wrote.
    more = ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "--trainer.max_steps", "28"]
    command("fit", "--config", str(folder / "config.yaml"), *more, cwd=tmp_path)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["version_0", "version_1"]


@pytest.mark.skipif(shutil.which("lightning-stable", path=Path(sys.executable).parent) is None, reason="not installed")
def test_the_installed_command_starts_itself_again(base, tmp_path):
    program = shutil.which("lightning-stable", path=Path(sys.executable).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = ["fit", "--config", base, "--trainer.strategy", "local_sgd"]
    done = subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_fails_the_run(rank, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    failing = ["--trainer.callbacks+=failing.Failing", "--trainer.callbacks.rank", str(rank)]
    short = ["--trainer.max_steps", "40", "--vars.warmup_steps", "0", *QUIET]
    done = command("run", "co2_two_processes", *short, *failing, cwd=tmp_path, check=False)
    # The host may end the first process by a signal when it sees that another one has failed.
    assert done.returncode in (1, -signal.SIGKILL)
    assert f"RuntimeError: planned on rank {rank}" in done.stderr
    assert "Last validation" not in done.stdout


def test_a_lost_rank_is_one_line_unless_it_came_up_behind_an_error_of_this_one(monkeypatch):
    monkeypatch.setattr(messages, "_raised_in", lambda error: "lightning_stable.strategies._workers")

    def lost():
        try:
            raise RuntimeError("connection closed")
        except RuntimeError as error:
            raise LostWorkerError("rank 1 did not come") from error

    with pytest.raises(LostWorkerError) as alone:
        lost()
    assert messages.is_bad_input(alone.value)

    def lost_behind_an_error():
        try:
            raise ValueError("a bug of the user")
        except ValueError:
            lost()

    with pytest.raises(LostWorkerError) as behind:
        lost_behind_an_error()
    assert not messages.is_bad_input(behind.value)


def test_the_command_waits_for_the_other_processes_and_takes_note_of_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(training, "_SECONDS_TO_END", 5)

    def run(*programs):
        started = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
        trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=started)))
        return training._failed_processes(trainer)

    assert training._failed_processes(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == 0
    assert run("pass", "import time; time.sleep(0.3)") == 0
    assert capsys.readouterr().err == ""
    assert run("pass", "raise SystemExit(3)", "import time; time.sleep(600)") == 1
    assert capsys.readouterr().err.splitlines() == [
        "lightning-stable: error: the process of rank 2 ended with exit code 3.",
        f"lightning-stable: error: the process of rank 3 ended with exit code {-signal.SIGKILL}.",
    ]


# ----------------------------------------------------------------------------- several machines

SMALL = [
    *("--vars.warmup_steps", "2", "--vars.local_steps", "2", "--vars.batch_size", "2", "--vars.sequence_length", "16"),
    *("--data.max_bytes", "200000", "--trainer.max_steps", "8", "--trainer.limit_val_batches", "1"),
    *("--trainer.val_check_interval", "8"),  # a checkpoint is the end of a round
    *("--trainer.accelerator", "cpu", "--model.config.hidden_size", "16", "--model.config.intermediate_size", "16"),
    *("--model.config.num_hidden_layers", "1", "--model.config.num_attention_heads", "2"),
    *("--model.config.num_key_value_heads", "2"),
    *QUIET,
]


@needs_bash
def test_the_script_for_torchrun_starts_a_run_over_two_nodes(tmp_path):
    """Both nodes are this machine, with a process each; what they exchange goes the way of two machines."""
    (script,) = [path for path in list_scripts() if path.suffix == ".sh"]
    with_port = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment = {**with_port, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "NODES": "2", "HEAD": "127.0.0.1"}
    environment |= {"PROCESSES": "1", "PORT": str(_free_port())}
    nodes = [
        subprocess.Popen(
            [BASH, str(script), "co2_multi_node", *SMALL],
            cwd=tmp_path,
            env={**environment, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (out, err), (other_out, other_err) = [node.communicate(timeout=PATIENCE) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], err + other_err
    assert out.count("Last validation, at step 8:") == 1
    assert "Last validation" not in other_out
    (folder,) = (tmp_path / "runs/co2_multi_node").iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["CO2Strategy"]["finished_rounds"] == 3


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@needs_bash
def test_the_script_for_slurm_gives_the_numbers_of_the_job(tmp_path):
    """With a stand-in for ``srun`` that prints what it is to start: SLURM itself is not here."""
    (script,) = [path for path in list_scripts() if path.suffix == ".slurm"]
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8"}
    out = subprocess.run(
        [BASH, str(script), "co2_multi_node", "--vars.lr", "0.1"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    python, m, module, *arguments = out.split()
    assert (python, m, module) == ("python", "-m", "lightning_stable.cli.main")
    assert main([*arguments, "--print_config"]) == 0


@needs_bash
def test_the_script_for_torchrun_says_what_is_missing(tmp_path):
    (script,) = [path for path in list_scripts() if path.suffix == ".sh"]
    done = subprocess.run(
        [BASH, str(script)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Set NODES" in done.stderr
