"""The packaged templates: each builds and trains, keeps its numbers in one place, and goes with the others."""

import re
from functools import lru_cache
from importlib.util import find_spec
from itertools import cycle, islice
from types import SimpleNamespace

import pytest
import torch
import yaml
from template_runs import ADDONS, QUIET, RECIPES, content, own, processes, small

from lightning_stable.cli._configs import Config, addons_last, read_configs
from lightning_stable.cli._conflicts import refuse_conflicts
from lightning_stable.cli._sweep_precision import trainer_parts
from lightning_stable.cli._variables import used_variables
from lightning_stable.cli.locate import CommandError, find_template, list_scripts
from lightning_stable.cli.main import main
from lightning_stable.cli.training import StableCLI

WITH_TWO = [name for name in RECIPES if processes(name) == 2]
ON_TORCHAO = {"float8", "int8", "lm_pretrain_float8"}


@pytest.fixture(autouse=True)
def _torchao_is_there(request):
    """Skips what builds a plugin on torchao where that is not installed, as beside the oldest torch."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if find_spec("torchao") is None and any(given.get(key) in ON_TORCHAO for key in ("name", "recipe", "addon")):
        pytest.skip("torchao is not installed")


# ----------------------------------------------------------------------------- they run


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in WITH_TWO])
def test_every_recipe_of_one_process_trains_two_steps(name, base):
    assert main(["run", name, *small(name), "--trainer.fast_dev_run", "2", "--trainer.devices", "1"]) == 0


@pytest.mark.parametrize("name", WITH_TWO)
def test_every_recipe_of_several_processes_trains_two_steps_in_two(name, workers, tmp_path):
    """As torchrun starts them: its variables are set, and the CPU takes the place of GPUs."""
    here = ["--vars.nodes", "1", "--vars.devices", "2"] if "nodes" in content(name)["vars"] else []
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
    if "warmup_steps" in content(name)["vars"]:
        short += ["--vars.warmup_steps", "1"]
    arguments = {"name": name, "options": [*here, *short], "folder": str(tmp_path)}
    assert workers.run("cli.template_runs:run_recipe", **arguments) == [0, 0]
    (folder,) = (tmp_path / "runs" / name).iterdir()
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert saved["state_dict"]


def test_the_low_bit_recipe_runs_without_any_format_and_warns_that_nothing_is_watched(base, tmp_path):
    short = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", *QUIET]
    formats = [option for name in ("weights", "activations", "gradients") for option in (f"--vars.{name}", "null")]
    with pytest.warns(UserWarning, match="NumericsMonitor watches nothing in this run"):
        assert main(["run", "lowbit_digits", *short, *formats]) == 0
    assert not list(tmp_path.rglob("numerics.*"))


def _adapting_the_layer(addon):
    """Options for the module's one layer, and for a rank that its widths of 4 and 3 allow."""
    told = {"model": "null", "rank": "1", "targets": "[layer]"}
    return [option for name, value in told.items() for option in (f"--vars.{addon}_{name}", value)]


# A few steps are too few for some methods to begin, which they say.
@pytest.mark.filterwarnings("ignore:.* will add nothing")
# The module's inputs are all alike, which EVA refuses to start from: the recipe lm_finetune_eva has it train.
@pytest.mark.parametrize("name", [name for name in ADDONS if name != "eva"])
def test_every_addon_trains_a_few_steps(name, base):
    needed = {
        "lae": ["--vars.lae_parameters", '["layer.weight"]'],  # the module has no LoRA
        "one_bit_adam": ["--optimizer", "torch.optim.Adam", "--optimizer.lr", "0.01"],
        **{name: [f"--vars.{name}_width_multiple", "1"] for name in ("float8", "int8")},  # its widths are 4 and 3
        "logit_sharpness": ["--vars.sharpness_logits", "layer"],  # its steps do not call the module
        "precision_fallback": ["--config", "addon:simulated"],
        **{start: _adapting_the_layer(start) for start in ("adapters", "pissa", "loldu", "svfit")},
        "lora_ga": [*_adapting_the_layer("lora_ga"), "--vars.lora_ga_init_batches", "4"],  # there are four
        "reorthogonalise_lora": ["--config", "addon:adapters", *_adapting_the_layer("adapters")],
    }
    assert main(["fit", "--config", base, "--config", f"addon:{name}", *needed.get(name, [])]) == 0


def test_the_addon_eva_says_that_inputs_do_not_vary(base, capsys):
    assert main(["fit", "--config", base, "--config", "addon:eva", *_adapting_the_layer("eva")]) == 1
    assert "what goes into the layers does not vary" in capsys.readouterr().err


# ----------------------------------------------------------------------------- they go together


def _pairs():
    """Every recipe and every addon at least once; all others: the test without building."""
    count = max(len(RECIPES), len(ADDONS))
    return list(zip(islice(cycle(RECIPES), count), islice(cycle(ADDONS), count), strict=True))


def _brings(trainer):
    """Return the names of what a part of a config brings, and of what there may be one of."""
    names = {_name(part) for key in ("callbacks", "callbacks+", "plugins", "plugins+") for part in trainer.get(key, [])}
    kinds = {"average" for name in names if name.endswith("EMA")}
    kinds |= {"precision" for name in names if name.endswith("Precision")}
    kinds |= {"precision"} if trainer.get("precision") else set()
    kinds |= {"strategy"} if trainer.get("strategy", "ddp") not in ("auto", "ddp") else set()
    return names, kinds


def _name(part):
    return part["class_path"].rpartition(".")[2]


@pytest.mark.parametrize(("recipe", "addon"), _pairs(), ids=str)
def test_recipes_go_with_addons_or_the_error_names_both(recipe, addon, base, monkeypatch, capsys):
    """Each builds the Trainer with all that it had and the addon's part; a second one of its kind is an error."""
    built: list[StableCLI] = []
    monkeypatch.setattr(StableCLI, "_run_subcommand", lambda self, subcommand: built.append(self))
    (added,) = read_configs(f"addon:{addon}")
    before, brought = _brings(content(recipe)["trainer"]), _brings(added.trainer)
    clash = any(first & second for first, second in zip(before, brought, strict=True))
    options = [*small(recipe), "--trainer.devices", "1", "--trainer.num_nodes", "1"]
    code = main(["run", recipe, "--config", f"addon:{addon}", *options])
    err = capsys.readouterr().err
    if clash:
        assert code == 2
        assert f"addon:{addon}" in err
        assert f"recipe:{recipe}" in err
        return
    assert code == 0, err
    trainer = built[0].trainer
    present = {type(part).__name__ for part in (*trainer.callbacks, trainer.precision_plugin)}
    assert present >= before[0] | brought[0]
    if "strategy" in brought[1]:
        assert type(trainer.strategy).__name__ == _name(added.trainer["strategy"])


def _merged(configs):
    """Return what configs together say of the Trainer, as far as they may say it twice."""
    found = {}
    for name in configs:
        for config in read_configs(name):
            found.update(config.trainer)
    lists = {key: trainer_parts(key, configs) for key in ("callbacks", "plugins")}
    return {**{key: found.get(key) for key in ("strategy", "precision")}, **lists}


@pytest.fixture(scope="module")
def _read_once():
    """The YAML of a template is read once for all pairs: reading takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_stable.cli._configs.yaml.safe_load", lru_cache(None)(yaml.safe_load))
        yield


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("_read_once")
def test_every_recipe_goes_with_every_addon_or_both_bring_one_of_a_kind(recipe):
    """What is decided before anything is built. Whichever is given first, all of both is there."""
    before = _brings(content(recipe)["trainer"])
    for addon in ADDONS:
        both = [f"recipe:{recipe}", f"addon:{addon}"]
        asked, turned = (["fit", *(part for name in names for part in ("-c", name))] for names in (both, both[::-1]))
        assert addons_last(turned) == addons_last(asked) == asked
        merged = _merged(both)
        brought = _brings(read_configs(both[1])[-1].trainer)
        assert _brings(merged)[0] == before[0] | brought[0]
        clashes = [first & second for first, second in zip(before, brought, strict=True)]
        if not any(clashes):
            refuse_conflicts(asked, SimpleNamespace(**merged))
            continue
        with pytest.raises(CommandError) as error:
            refuse_conflicts(asked, SimpleNamespace(**merged))
        told = str(error.value)
        assert any(config.name in told for config in read_configs(both[0])), f"{both}: {told}"  # or what it extends
        assert both[1] in told, f"{both}: {told}"


# ----------------------------------------------------------------------------- their numbers

# What a number is called wherever it stands.
NUMBERS = ("max_steps", "lr", "batch_size", "sequence_length", "devices", "num_nodes", "epochs_per_task")
FIRST = ("max_steps", "lr", "batch_size", "devices")
STREAMS = ("epochs", "lr", "batch_size", "devices")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_numbers_at_the_top_and_each_once(name):
    found = own(name)
    keys = list(found)
    assert keys.index("vars") < min(keys.index(key) for key in keys if key in ("trainer", "model", "data"))
    wanted = STREAMS if "max_epochs" in content(name)["trainer"] else FIRST
    assert set(wanted) <= set(found["vars"])
    assert tuple(found["vars"])[:2] == wanted[:2], "what is changed first comes first"
    for part in ("trainer", "model", "data", "optimizer"):
        for key, value in _leaves(found, part):
            a_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # A key of the name of a variable may mean something else, and then holds a word.
            outside = key in NUMBERS or (key in found["vars"] and a_number)
            assert not outside or str(value).startswith("${"), f"{key}: {value!r} stands outside of vars"


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_plugin_stands_at_the_top(name):
    trainer = own(name)["trainer"]
    parts = [part for key in ("callbacks", "plugins", "strategy") for part in _listed(trainer.get(key))]
    for part in parts:
        if isinstance(part, dict) and part["class_path"].startswith("lightning_stable."):
            for key, value in _leaves(part, "init_args"):
                a_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                assert not a_number, f"{part['class_path']}: {key}: {value!r} stands outside of vars"


def _listed(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def _leaves(config, key):
    value = config.get(key)
    if isinstance(value, dict):
        for inner in value:
            yield from _leaves(value, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves({key: inner}, key)
    else:
        yield key, value


@pytest.mark.parametrize("name", [*RECIPES, *(f"addon:{name}" for name in ADDONS)])
def test_every_variable_is_used_and_explained(name):
    config: Config = read_configs(name if name.startswith("addon:") else f"recipe:{name}")[-1]
    texts = [each.text for each in read_configs(config.name)]
    assert set(config.content.get("vars", {})) <= used_variables("\n".join(texts))
    given = config.text.partition("vars:\n")[2].partition("trainer:\n")[0]
    lines = given.splitlines()
    for place, line in enumerate(lines):
        if re.match(r"  \w+:", line) and len(texts) == 1:
            assert " # " in line or lines[place - 1].lstrip().startswith("#"), line


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_how_it_is_started_and_what_to_change_first(name):
    text = find_template("recipe", name).path.read_text(encoding="utf-8")
    comment = text.partition("seed_everything:")[0].partition("\nextends:")[0]
    said = " ".join(line.lstrip("# ") for line in comment.splitlines())
    assert "Change first:" in said
    scripts = [script.name for script in list_scripts() if script.name in said]
    assert f"lightning-stable run {name}" in said or scripts
    if "nodes" in own(name)["vars"] and "scripts of" not in said:
        assert scripts == ["several_machines.sh", "several_machines.slurm"]
        assert f"several_machines.slurm {name}" in said


def test_what_the_scripts_set_is_there_in_the_recipes_that_they_name():
    for script in list_scripts():
        text = script.read_text(encoding="utf-8")
        named = [name for name in RECIPES if re.search(rf"\b{name}\b(?!_)", text)]
        assert named
        for name in named:
            assert {f"vars.{key}" for key in own(name)["vars"]} >= set(re.findall(r"vars\.(?:nodes|devices)", text))


def test_a_recipe_is_what_it_extends_and_its_own_numbers(base, capsys):
    assert main(["run", "lm_finetune_pissa_ddp", "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["strategy"] == "ddp"
    assert config["vars"]["rank"] == own("lm_finetune_pissa")["vars"]["rank"]
    assert config["data"]["init_args"]["batch_size"] == own("lm_finetune_pissa_ddp")["vars"]["batch_size"]
