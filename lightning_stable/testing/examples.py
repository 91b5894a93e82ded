"""What a card shows, run as a reader would: its Python, then its configs and its commands on the module of the Python.

A card's ``mine.yaml`` is a config of the module that its Python fits first, on the same data. Names of parts in a
config, such as ``logits: head``, are therefore names in that module.
"""

import contextlib
import functools
import inspect
import io
import re
import shlex
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

__all__ = ["StopSoon", "run_examples", "shell_commands"]

_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LENGTH, _STEPS = 3000, 2


class StopSoon(Callback):
    """Ends a fit after a few steps: not by ``max_steps``, by which a method may plan a whole run."""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.global_step >= _STEPS


def run_examples(name: str, text: str, addons: Sequence[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a card, but for those that give a reason on their first line, as in ``no-run="needs a GPU"``.

    Of commands these are the ones about ``mine.yaml``: what else a card names may be on another machine.

    Args:
        name: The card's, for messages.
        text: What stands in it.
        addons: The addons of its method; ``--config addon:NAME`` means one of these where it can.
        folder: An empty one to run in.
        monkeypatch: Undoes at the end what a run needs of the process.

    Raises:
        AssertionError: There is no Python in it, a config or a command fails, or there is no module to run them on.
    """
    blocks = [(language, code) for language, rest, code in _BLOCK.findall(text) if "no-run=" not in rest]
    python = [code for language, code in blocks if language == "python"]
    assert python, f"{name} has no Python example"
    monkeypatch.chdir(folder)
    fitted = _run_python(name, python, monkeypatch)
    commands = _commands(name, blocks, {f"addon:{path.stem}": str(path) for path in addons}, folder)
    if not commands:
        return
    assert fitted is not None, f"{name}: its configs and commands run on the module that its Python fits: it fits none"
    _write_config(fitted, folder, monkeypatch)
    for what, words in commands.items():
        _run(words, what)


def shell_commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell, without variables before it, and files that output goes to."""
    for line in code.replace("\\\n", " ").splitlines():
        command: list[str] = []
        words = iter(shlex.split(line.removeprefix("$ "), comments=True))
        for word in words:
            if word in ("|", "&&", "||", ";"):
                yield command
                command = []
            elif word in (">", ">>"):
                next(words)
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)
        if command:
            yield command


def _commands(name: str, blocks: list[tuple[str, str]], addons: dict[str, str], folder: Path) -> dict[str, list[str]]:
    """Return the commands of a card that are about ``mine.yaml``, and one for each config; keys say where it stands."""
    found = {}
    for number, (language, code) in enumerate(blocks):
        if language == "yaml":
            settings = yaml.safe_load(code)
            assert isinstance(settings, dict), f"{name}: a YAML block is no mapping"
            config = folder / f"block-{number}.yaml"
            config.write_text(code, encoding="utf-8")
            mine = [] if {"model", "extends"} & settings.keys() else ["--config", "mine.yaml"]
            found[f"{name}, the config\n{code}"] = ["fit", *mine, "--config", str(config)]
        for words in shell_commands(code) if language == "bash" else ():
            if words[0] == "lightning-stable" and any(word.endswith("mine.yaml") for word in words):
                found[f"{name}, the command\n{shlex.join(words)}"] = [addons.get(word, word) for word in words[1:]]
    return found


def _run_python(name: str, codes: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any] | None:
    """Run the Python of a card as one module, called ``card``; return the arguments of its first fit."""
    card = types.ModuleType("card")
    monkeypatch.setitem(sys.modules, "card", card)
    fit, found = Trainer.fit, []

    @functools.wraps(fit)
    def recorded(*args: Any, **kwargs: Any) -> None:
        found.append(inspect.signature(fit).bind(*args, **kwargs).arguments)
        fit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", recorded)
        for code in codes:
            exec(compile(code, name, "exec"), vars(card))  # noqa: S102  the card's own code, which has to run
    return found[0] if found else None


def _write_config(fitted: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write ``mine.yaml``: the class of the module that was fitted, its data, and a Trainer for a long run."""
    module = type(fitted["model"])
    config: dict[str, Any] = {
        "model": {"class_path": f"{module.__module__}.{module.__qualname__}"},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": _LENGTH,
            "limit_val_batches": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "runs", "name": "mine"},
            },
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    data = fitted.get("datamodule") or fitted.get("train_dataloaders")
    if data is not None:  # else the module brings its own
        if not isinstance(data, LightningDataModule):
            validation = fitted.get("val_dataloaders")
            data = _Loaders(data) if validation is None else _AlsoValidation(data, validation)

        def make_data() -> LightningDataModule:
            return data

        monkeypatch.setattr(sys.modules["card"], "make_data", make_data, raising=False)
        config["data"] = {"class_path": "card.make_data"}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


class _Loaders(LightningDataModule):
    """The training loader that a fit was given."""

    def __init__(self, train: Any) -> None:
        super().__init__()
        self.train = train

    @override
    def train_dataloader(self) -> Any:
        return self.train


class _AlsoValidation(_Loaders):
    """And that of its validation."""

    def __init__(self, train: Any, validation: Any) -> None:
        super().__init__(train)
        self.validation = validation

    @override
    def val_dataloader(self) -> Any:
        return self.validation


def _run(words: list[str], what: str) -> None:
    """Run a command of ours, in this process and so on one device."""
    from lightning_stable.cli.main import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training ended at optimizer step")  # so it does, here
        stop = ["--trainer.callbacks+", f"{__name__}.{StopSoon.__name__}"] if words[0] == "fit" else []
        code = main([*words, "--trainer.devices", "1", *stop])
    assert code == 0, f"{what}\nends with exit code {code}:\n{said.getvalue()}"
