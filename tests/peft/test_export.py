"""Exports of adapters: what other libraries load computes what was trained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_fixtures import GPT2, LLAMA, Finetune, difference, load, logits_of, make_base, train
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lightning_stable.peft import load_adapters
from lightning_stable.peft._export import export_adapter

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
OWN = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
INITS = ["default", "gaussian", "orthogonal", "mica", "olora", "pissa", "lora_ga", "eva", "corda", "loldu", "svfit"]
CLOSE = 5e-6

pytestmark = [
    # What PEFT does to every model of transformers, and to every Conv1D.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def pissa(tmp_path_factory, base):
    return train(tmp_path_factory.mktemp("pissa"), base, LORA, "pissa")


@pytest.fixture(scope="session")
def loldu(tmp_path_factory, base):
    return train(tmp_path_factory.mktemp("loldu"), base, OWN, "loldu")


def adapted(base, folder):
    return logits_of(PeftModel.from_pretrained(load(base), str(folder)))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# ----------------------------------------------------------------------------- lora and merged


@pytest.mark.parametrize("init", INITS)
def test_both_forms_compute_what_was_trained(init, base, tmp_path):
    run = train(tmp_path, base, OWN if init in ("loldu", "svfit") else LORA, init)
    assert difference(logits_of(load(base)), run.logits) > 0.01, "the adapter does something"
    done = export_adapter(run.checkpoint, tmp_path / "lora")
    assert done.notes == []
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    assert export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base).notes == []
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE
    doubled = init in ("olora", "pissa", "lora_ga", "corda")
    if init != "eva":
        assert config_of(tmp_path / "lora")["r"] == (4 if doubled or init in ("loldu", "svfit") else 2)
    assert config_of(tmp_path / "lora")["init_lora_weights"] is True
    assert config_of(tmp_path / "lora")["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("rslora", [False, True])
def test_a_shifted_base_keeps_each_layers_scaling(rslora, base, tmp_path):
    config = {
        **LORA,
        "use_rslora": rslora,
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "0.mlp.down_proj": 1},
        "alpha_pattern": {"down_proj": 5},
    }
    run = train(tmp_path, base, config, "pissa")
    export_adapter(run.checkpoint, tmp_path / "lora")
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    written, root = config_of(tmp_path / "lora"), 2**0.5
    assert written["r"] == 4
    assert written["rank_pattern"] == {"^model.layers.0.mlp.down_proj": 2, "^model.layers.1.self_attn.q_proj": 6}
    assert written["lora_alpha"] == pytest.approx(6 * root if rslora else 12)
    wanted = 5 * root if rslora else 10
    assert list(written["alpha_pattern"].values()) == [pytest.approx(wanted), pytest.approx(wanted)]
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


def test_the_folder_loads_without_this_package(loldu, tmp_path):
    export_adapter(loldu.checkpoint, tmp_path / "lora", base=loldu.base)
    torch.save(loldu.logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'lora')!r}).eval()\n"
        "found = model(torch.arange(64).reshape(4, 16) % 48).logits\n"
        f"torch.testing.assert_close(found, torch.load({str(tmp_path / 'logits.pt')!r}), rtol=1e-4, atol=1e-4)\n"
        "assert not any(name.startswith('lightning_stable') for name in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_what_else_trained_goes_along_or_is_named(base, tmp_path):
    config = {**LORA, "modules_to_save": ["lm_head"]}
    run = train(tmp_path, base, config, "pissa", trainable=["head.*", "model.model.norm.weight"])
    done = export_adapter(run.checkpoint, tmp_path / "lora")
    inside, outside = done.notes
    assert "no adapter: model.model.norm.weight." in inside
    assert "modules_to_save" in inside
    assert ": head.bias, head.weight." in outside
    assert "modules_to_save" not in outside, "it does not hold what is outside of the adapted module"
    weights = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    whole = load_adapters(Finetune(str(base)), run.checkpoint)
    for name in ("head.bias", "head.weight"):  # what the note says to do
        assert torch.equal(weights[name], run.module.get_parameter(name))
        assert torch.equal(whole.get_parameter(name), run.module.get_parameter(name))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in tensors
    onto = load(base)
    with torch.no_grad():
        onto.model.norm.weight.copy_(run.module.model.model.norm.weight)
    assert difference(logits_of(PeftModel.from_pretrained(onto, str(tmp_path / "lora"))), run.logits) < CLOSE
    done = export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    (note,) = done.notes
    assert ": head.bias, head.weight. They are in the checkpoint" in note
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


def test_trained_biases_go_along(tmp_path):
    base = make_base(tmp_path / "base", {**LLAMA, "attention_bias": True})
    run = train(tmp_path, base, {**LORA, "target_modules": ["q_proj"], "bias": "all"}, "pissa")
    assert export_adapter(run.checkpoint, tmp_path / "lora").notes == []
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_dora_is_exported(init, base, tmp_path):
    run = train(tmp_path, base, {**LORA, "use_dora": True}, init)
    export_adapter(run.checkpoint, tmp_path / "lora")
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


@pytest.mark.parametrize(
    ("init", "targets"), [("pissa", ["c_attn", "c_proj"]), ("pissa", ["attn.c_proj"]), ("loldu", ["attn.c_proj"])]
)
def test_weights_that_are_held_transposed(init, targets, tmp_path):
    base = make_base(tmp_path / "base", GPT2)
    run = train(tmp_path, base, {"r": 2, "target_modules": targets}, init)
    export_adapter(run.checkpoint, tmp_path / "lora")
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(base)), run.logits) > 1e-3
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


# ----------------------------------------------------------------------------- other levels, whole checkpoints


@pytest.mark.parametrize("model", [None, "model.model"])
def test_the_folder_may_be_of_another_level(model, base, tmp_path):
    config = {**LORA, "rank_pattern": {"layers.1.self_attn.q_proj": 3}}
    run = train(tmp_path, base, config, "pissa", model=model)
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE
    notes = export_adapter(run.checkpoint, tmp_path / "plain").notes
    start = "base_model.model.model.model.layers.0." if model is None else "base_model.model.layers.0."
    assert any(name.startswith(start) for name in load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert len(notes) == (model is None)
    assert all("--base" in note and "model.model.layers.0.mlp.down_proj" in note for note in notes)
    assert export_adapter(run.checkpoint, tmp_path / "lora", base=base).notes == []
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    assert config_of(tmp_path / "lora")["rank_pattern"] == {"^model.layers.1.self_attn.q_proj": 6}
    assert export_adapter(run.checkpoint, tmp_path / "native", form="native", base=base).notes == []
    assert difference(adapted(tmp_path / "native" / "base", tmp_path / "native"), run.logits) < CLOSE


def test_the_whole_module_adapted_by_exact_names(base, tmp_path):
    targets = "model.model.layers.(0.self_attn.q_proj|1.mlp.up_proj)"
    config = {**LORA, "task_type": None, "target_modules": targets, "modules_to_save": ["model.lm_head", "head"]}
    run = train(tmp_path, base, config, model=None)
    export_adapter(run.checkpoint, tmp_path / "whole")
    module = Finetune(str(base))
    whole = PeftModel.from_pretrained(module, str(tmp_path / "whole"))
    assert difference(logits_of(module.model), run.logits) < CLOSE
    assert torch.equal(whole.base_model.model.head(torch.ones(1)), run.module.head(torch.ones(1)))
    config = {**config, "modules_to_save": ["model.lm_head"]}
    run = train(tmp_path, base, config, model=None)
    assert export_adapter(run.checkpoint, tmp_path / "lora", base=base).notes == []
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE


@pytest.mark.parametrize("model", [None, "model"])
def test_files_without_the_heads_level_do_not_mislead(model, tmp_path):
    base = make_base(tmp_path / "base", GPT2)
    run = train(tmp_path, base, {"r": 2, "target_modules": ["c_attn"]}, model=model)
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys().isdisjoint(tensors)
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    export_adapter(run.checkpoint, tmp_path / "lora", base=base)
    assert difference(logits_of(load(base)), run.logits) > 1e-3
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_checkpoint_of_everything_needs_no_base(init, base, tmp_path):
    run = train(tmp_path, base, {**LORA, "modules_to_save": ["lm_head"]}, init, save="full")
    export_adapter(run.checkpoint, tmp_path / "lora")
    assert difference(adapted(base, tmp_path / "lora"), run.logits) < CLOSE
    done = export_adapter(run.checkpoint, tmp_path / "alone", form="merged")
    assert "config.json" in done.notes[0]
    (tmp_path / "alone" / "config.json").write_text((base / "config.json").read_text())
    assert difference(logits_of(load(tmp_path / "alone")), run.logits) < CLOSE
    export_adapter(run.checkpoint, tmp_path / "whole", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "whole")), run.logits) < CLOSE


# ----------------------------------------------------------------------------- native


def test_native_loldu_is_its_own_tuner(loldu, tmp_path):
    done = export_adapter(loldu.checkpoint, tmp_path / "native", form="native")
    assert "import lightning_stable.peft.loldu" in done.notes[0]
    assert config_of(tmp_path / "native")["peft_type"] == "LOLDU"
    assert difference(adapted(loldu.base, tmp_path / "native"), loldu.logits) == 0


def test_without_frozen_factors_only_native_is_left(base, tmp_path):
    run = train(tmp_path, base, {**OWN, "save_factors": False}, "svfit")
    with pytest.raises(ValueError, match="save_as_lora"):
        export_adapter(run.checkpoint, tmp_path / "lora")
    export_adapter(run.checkpoint, tmp_path / "native", form="native")
    assert difference(adapted(base, tmp_path / "native"), run.logits) < CLOSE


def test_native_on_a_shifted_base_brings_that_base(pissa, tmp_path):
    with pytest.raises(ValueError, match=r"shifted for them.*--base"):
        export_adapter(pissa.checkpoint, tmp_path / "native", form="native")
    assert not (tmp_path / "native").exists()
    export_adapter(pissa.checkpoint, tmp_path / "native", form="native", base=pissa.base)
    written = config_of(tmp_path / "native")
    assert (written["r"], written["init_lora_weights"]) == (2, True)
    assert Path(written["base_model_name_or_path"]) == tmp_path / "native" / "base"
    assert difference(adapted(tmp_path / "native" / "base", tmp_path / "native"), pissa.logits) == 0


def test_native_lora_keeps_its_ranks(base, tmp_path):
    run = train(tmp_path, base, LORA, "eva")
    export_adapter(run.checkpoint, tmp_path / "native", form="native")
    assert difference(adapted(base, tmp_path / "native"), run.logits) == 0


@pytest.mark.parametrize("form", ["lora", "native"])
def test_names_that_end_alike_keep_their_scaling(form, tmp_path):
    base = make_base(tmp_path / "base")
    # In the order of the alphabet, in which PEFT writes them, the first would be the one for all.
    alpha = {"layers.1.self_attn.q_proj": 64, "1.self_attn.q_proj": 4, "q_proj": 6}
    run = train(tmp_path, base, {**LORA, "target_modules": ["q_proj"], "alpha_pattern": alpha})
    export_adapter(run.checkpoint, tmp_path / form, form=form)
    assert difference(logits_of(load(base)), run.logits) > 1e-3
    assert difference(adapted(base, tmp_path / form), run.logits) == 0
    patterns = config_of(tmp_path / form)["alpha_pattern"]
    assert patterns
    assert all(name.startswith("^model.layers.") for name in patterns)


def test_native_loldu_keeps_its_ranks(base, tmp_path):
    ranks = {"layers.1.self_attn.q_proj": 3, "1.self_attn.q_proj": 2, "q_proj": 5}
    run = train(tmp_path, base, {**OWN, "rank_pattern": ranks}, "loldu")
    export_adapter(run.checkpoint, tmp_path / "native", form="native")
    wanted = {"^model.layers.0.self_attn.q_proj": 5, "^model.layers.1.self_attn.q_proj": 3}
    assert config_of(tmp_path / "native")["rank_pattern"] == wanted
    assert difference(adapted(base, tmp_path / "native"), run.logits) == 0
