"""The packaged recipes, made small: options with which each runs in seconds on the CPU, and a job of two processes."""

import json
import os
from typing import Any

import yaml

from lightning_stable.cli._configs import read_configs
from lightning_stable.cli.locate import list_templates
from lightning_stable.cli.main import main

RECIPES = [template.name for template in list_templates("recipe")]
ADDONS = [template.name for template in list_templates("addon")]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]

_TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def content(name: str) -> dict[str, Any]:
    """Return what a recipe says, with what it extends: a key of the last config that has it."""
    merged: dict[str, Any] = {}
    for config in read_configs(f"recipe:{name}"):
        for key, value in config.content.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def own(name: str) -> dict[str, Any]:
    """Return what the recipe's own file says."""
    (path,) = [template.path for template in list_templates("recipe") if template.name == name]
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def processes(name: str) -> int:
    """Return how many processes a recipe is for; more than two are tried with two."""
    found = content(name)["vars"]
    return min(2, max(found[key] if isinstance(found.get(key), int) else 1 for key in ("devices", "nodes")))


def small(name: str) -> list[str]:
    """Return the options that make a recipe small enough for a test, and let it run without a GPU."""
    found = content(name)
    options = ["--trainer.accelerator", "cpu", *QUIET]
    for key, value in {"batch_size": 4, "sequence_length": 16, "init_batches": 2, "epochs": 1, "tasks": 2}.items():
        options += [f"--vars.{key}", str(value)] if key in found["vars"] else []
    if found["data"]["class_path"].endswith("TextDataModule"):
        options += ["--data.max_bytes", "200000"]
    settings = found["model"]["init_args"]
    if "config" in settings:
        options += ["--model.config", json.dumps(_TINY)]
    return [*options, "--model.compile", "false"] if "compile" in settings else options


def run_recipe(name: str, options: list[str], folder: str) -> int:
    """Run in each of two processes: a recipe, as torchrun would start it. Return the exit code."""
    os.chdir(folder)
    return main(["run", name, *small(name), *options])
