"""The blocks of a document, run in their order as a reader would, in one folder: Python, configs and commands.

What takes a reader minutes is made small by options at the end of a command, where the last one counts. A command runs
in this process, and so on one device.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import yaml
from cli.sweep_fixtures import StandIn
from cli.template_runs import QUIET, RECIPES, content, small
from doc_blocks import ROOT, Block, all_blocks, commands_of

from lightning_stable.cli import _sweep_pool
from lightning_stable.cli.main import TRAINER_COMMANDS, main
from lightning_stable.testing.process import restored

__all__ = ["Reader", "made_small"]

# What is run elsewhere, or cannot be here.
_ELSEWHERE = {
    "pip": "tests/test_wheel.py installs the package",
    "make": "tests/test_docs.py knows the targets",
    "bash": "several machines: tests/cli/test_strategies.py runs the script",
    "sbatch": "needs SLURM",
    "git": "shows what a command changed",
    ".venv/bin/python": "tests/test_docs.py knows the files",
}
_OF_A_RUN = re.compile(r"runs/(\w+)/version_(\d+)")
_ONE_DEVICE = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
# A document that shows no `mine.yaml` means any: that of the first page.
_FIRST = ROOT / "docs" / "start.md"


class Reader:
    """Runs the blocks of one document.

    Args:
        document: Its path.
        folder: Where the reader is: the current directory, and empty.
    """

    def __init__(self, document: Path, folder: Path) -> None:
        self.document = document
        self.folder = folder
        self.scope: dict[str, object] = {"__name__": "page"}
        for name, code in (_shown(_FIRST) | _shown(document)).items():
            (folder / name).write_text(code, encoding="utf-8")
        texts = folder / "my_texts"
        texts.mkdir()
        for name in ("one.txt", "two.txt"):
            (texts / name).write_text("A text of the reader's own.\n" * 200, encoding="utf-8")

    def run(self, block: Block) -> None:
        """Run a block; what is neither Python nor a config nor commands is not run."""
        kinds: dict[str, Callable[[Block], None]] = {
            "python": self._run_python,
            "yaml": self._run_config,
            "bash": self._run_commands,
        }
        if block.language in kinds and not {"no-run", "file"} & block.attributes.keys():
            with contextlib.redirect_stdout(io.StringIO()):
                kinds[block.language](block)

    def _run_python(self, block: Block) -> None:
        exec(compile(block.code, self.document.name, "exec"), self.scope)  # noqa: S102  the document's own code

    def _run_config(self, block: Block) -> None:
        config = yaml.safe_load(block.code)
        (self.folder / "block.yaml").write_text(block.code, encoding="utf-8")
        mine = [] if {"model", "extends"} & config.keys() else ["--config", "mine.yaml"]
        self._run(["fit", *mine, "--config", "block.yaml"])

    def _run_commands(self, block: Block) -> None:
        for words in commands_of(block):
            if words[0] == "lightning-stable":
                self._run(words[1:])
            elif words[:2] == ["python", "-c"]:
                exec(compile(words[2], self.document.name, "exec"), {})  # noqa: S102  the document's own code
            elif words[0] == "python":
                assert (ROOT / words[1]).exists(), f"{self.document.name}: there is no {words[1]}"
            else:
                assert words[0] in _ELSEWHERE, f"{self.document.name}: nothing runs {shlex.join(words)}"

    def _run(self, words: list[str]) -> None:
        """Run a command of ours, after the runs whose files it names and that an earlier page made."""
        for name, version in _OF_A_RUN.findall(" ".join(words)):
            while name in RECIPES and not (self.folder / "runs" / name / f"version_{version}").exists():
                self._run(["run", name])
        said = io.StringIO()
        # tests/cli/test_sweep.py starts the processes of a sweep.
        with contextlib.redirect_stderr(said), restored(), patch.object(_sweep_pool, "run_one", StandIn()):
            code = main(made_small(words))
        allowed = (0, 1) if words[0] == "doctor" else (0,)  # what it finds is up to the machine
        assert code in allowed, f"{self.document.name}: {shlex.join(words)}\nends with {code}:\n{said.getvalue()}"


def made_small(words: list[str]) -> list[str]:
    """Return a command that does the same with a smaller model and in a few steps, and asks nothing."""
    if words[0] == "new":
        return [*words, "--no-input"]
    if words[0] not in ("run", *TRAINER_COMMANDS) or "--print_config" in words:
        return words
    recipe = _recipe(words)
    if recipe is None:  # the module of the first page warms up for 20 steps
        return [*words, *QUIET, "--trainer.max_steps", "40", *_ONE_DEVICE]
    found, options = content(recipe), ["--trainer.limit_val_batches", "1", *_ONE_DEVICE]
    if "max_epochs" in found["trainer"]:  # a stream of tasks, each of which has to come
        options += ["--trainer.limit_train_batches", "8"]
    else:
        options += ["--trainer.max_steps", "60" if "--ckpt_path" in words else "40" if recipe == "quickstart" else "4"]
    for name in {"warmup_steps", "devices"} & found["vars"].keys():
        options += [f"--vars.{name}", "1"]
    return [*words, *small(recipe), *options]


def _recipe(words: list[str]) -> str | None:
    """Return the recipe that a command trains, or that its config extends."""
    if words[0] == "run":
        return words[1]
    configs = [yaml.safe_load(Path(word).read_text(encoding="utf-8")) for word in words if word.endswith(".yaml")]
    extended: list[str] = [config["extends"] for config in configs if "extends" in config]
    return extended[0] if extended else None


def _shown(document: Path) -> dict[str, str]:
    """Return the blocks that a reader saves, by name."""
    return {block.attributes["file"]: block.code for block in all_blocks(document) if "file" in block.attributes}
