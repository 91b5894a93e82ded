"""Exports of adapters: the base's folder and its tied weights, what is refused, and single weights."""

import json

import pytest
import torch
from export_fixtures import GPT2, LLAMA, Finetune, difference, load, logits_of, make_base, train
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_stable.peft._export import export_adapter
from lightning_stable.peft._export_weight import is_transposed, merged_weight

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CLOSE = 5e-6

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pissa(tmp_path_factory, base):
    return train(tmp_path_factory.mktemp("pissa"), base, LORA, "pissa")


# ----------------------------------------------------------------------------- the base's folder


def test_sharded_weights_and_other_files_are_copied(tmp_path, pissa):
    base = tmp_path / "base"
    load(pissa.base).save_pretrained(str(base), max_shard_size="8KB")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("old weights")
    assert len(list(base.glob("*.safetensors"))) > 1
    export_adapter(pissa.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "merged")), pissa.logits) < CLOSE
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    assert difference(logits_of(load(base)), logits_of(load(pissa.base))) == 0, "the base itself stays"


def test_a_base_of_less_precision_is_said_to_round(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)

    class Wide(Finetune):
        def __init__(self, folder):
            super().__init__(folder)
            self.float()

    run = train(tmp_path, base, LORA, "pissa", cls=Wide)
    done = export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    (note,) = done.notes
    assert "bfloat16 and training was in float32" in note
    merged = load(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert CLOSE < difference(logits_of(merged.float()), run.logits) < 0.03
    export_adapter(run.checkpoint, tmp_path / "lora")
    onto = PeftModel.from_pretrained(load(base, dtype=torch.float32), str(tmp_path / "lora"))
    assert difference(logits_of(onto), run.logits) < CLOSE


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q_proj"]], ids="-".join
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_tied_weights_come_apart_where_one_is_adapted(targets, tmp_path):
    base = make_base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    run = train(tmp_path, base, {**LORA, "target_modules": targets})
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(base)), run.logits) > 1e-3
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE
    tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (targets == ["q_proj"])


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_a_tied_head_may_be_in_the_files(tmp_path):
    base = make_base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    run = train(tmp_path, base, {**LORA, "target_modules": ["lm_head"]})
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base)
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_an_adapted_weight_that_trained_too_is_merged(init, base, tmp_path):
    config = {**LORA, "target_modules": ["q_proj", "lm_head"]}
    run = train(tmp_path, base, config, init, trainable=["model.lm_head.weight"])
    assert export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base).notes == []
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


@pytest.mark.parametrize("adapted", ["lm_head", "embed_tokens", "q_proj"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_a_tied_weight_that_trained_too_is_merged(adapted, tmp_path):
    base = make_base(tmp_path / "base", {**LLAMA, "tie_word_embeddings": True})
    run = train(tmp_path, base, {**LORA, "target_modules": ["q_proj", adapted]}, trainable=["*embed_tokens*"])
    assert export_adapter(run.checkpoint, tmp_path / "merged", form="merged", base=base).notes == []
    assert difference(logits_of(load(tmp_path / "merged")), run.logits) < CLOSE


# ----------------------------------------------------------------------------- refusals


def test_another_base_is_refused(pissa, tmp_path):
    other = load(pissa.base)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"1 of 4 adapted weights.*layers\.1\.mlp\.down_proj"):
        export_adapter(pissa.checkpoint, tmp_path / "out", form="merged", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    make_base(tmp_path / "gpt2", GPT2)
    with pytest.raises(ValueError, match="no weight of 4 of the 4 adapted layers"):
        export_adapter(pissa.checkpoint, tmp_path / "out", form="merged", base=tmp_path / "gpt2")


def test_folders_that_are_no_base_are_refused(pissa, tmp_path):
    folder = tmp_path / "folder"

    def refused(kind, match, base=folder):
        with pytest.raises(kind, match=match):
            export_adapter(pissa.checkpoint, tmp_path / "out", form="merged", base=base)

    refused(ValueError, "by --base", None)
    refused(FileNotFoundError, "no folder")
    folder.mkdir()
    refused(FileNotFoundError, "no config.json")
    config = json.loads((pissa.base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    refused(FileNotFoundError, "no model.safetensors")
    for text in ("version https://git-lfs.github.com/spec/v1", ""):
        (folder / "model.safetensors").write_text(text)
        refused(ValueError, "git lfs")
    (folder / "model.safetensors").write_bytes((pissa.base / "model.safetensors").read_bytes()[:-4])
    refused(ValueError, "only a part")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refused(FileNotFoundError, "lacks gone.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused(ValueError, "quantized")
    with pytest.raises(ValueError, match="own folder"):
        export_adapter(pissa.checkpoint, pissa.base / "out", form="merged", base=pissa.base)
    with pytest.raises(ValueError, match="around it"):
        export_adapter(pissa.checkpoint, tmp_path, form="native", base=tmp_path / "base", force=True)


def test_files_that_are_no_checkpoint_are_refused(base, tmp_path):
    def refused(match, kind=ValueError, path=tmp_path / "it.ckpt"):
        with pytest.raises(kind, match=match):
            export_adapter(path, tmp_path / "out")

    refused("no checkpoint", FileNotFoundError)
    refused("consolidate_checkpoint", path=tmp_path)
    (tmp_path / "it.ckpt").write_text("text")
    refused("no checkpoint of a Trainer")
    torch.save({"weights": 1}, tmp_path / "it.ckpt")
    refused("no state_dict")
    torch.save({"state_dict": {}}, tmp_path / "it.ckpt")
    refused("no adapters")
    torch.save({"state_dict": {}, "hyper_parameters": {"net": nn.Linear(1, 1)}}, tmp_path / "it.ckpt")
    refused("not safe to read")
    run = train(tmp_path, base, {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []})
    refused("PEFT type IA3", path=run.checkpoint)


def test_a_folder_that_is_not_empty_is_kept_unless_forced(pissa, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty.*--force"):
        export_adapter(pissa.checkpoint, out)
    with pytest.raises(FileNotFoundError):
        export_adapter(pissa.checkpoint, out, form="merged", base=tmp_path / "none", force=True)
    assert len(list(out.iterdir())) == 1, "an export that fails changes nothing"
    (out / "model-00001-of-00002.safetensors").write_text("a model")
    export_adapter(pissa.checkpoint, out, force=True)
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in out.iterdir()} == adapter | {"model-00001-of-00002.safetensors", "notes.txt"}
    export_adapter(pissa.checkpoint, out, form="merged", base=pissa.base, force=True)
    names = {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert {path.name for path in out.iterdir()} == names, "transformers would read what is left of others"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="is a file"):
        export_adapter(pissa.checkpoint, out / "notes.txt")
    with pytest.raises(ValueError, match="form='all'"):
        export_adapter(pissa.checkpoint, out, form="all")


def test_variants_that_are_no_sum_of_weights_are_not_merged(pissa, tmp_path):
    checkpoint = torch.load(pissa.checkpoint, weights_only=True)
    checkpoint["lightning_stable_adapters"]["config"]["trainable_token_indices"] = [1, 2]
    torch.save(checkpoint, tmp_path / "it.ckpt")
    with pytest.raises(ValueError, match="trainable_token_indices"):
        export_adapter(tmp_path / "it.ckpt", tmp_path / "out", form="merged", base=pissa.base)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 1), nn.Conv1d(3, 5, 2), nn.Embedding(7, 5)], ids=str
)
def test_other_layers_merge_as_in_peft(layer):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(layer))
    parts = {}
    for name, tensor in model[0].named_parameters():
        if name.startswith("lora_"):
            nn.init.normal_(tensor)
            parts[name.replace(".default", "")] = tensor.detach()
    wanted = layer.weight + model[0].get_delta_weight("default")
    torch.testing.assert_close(merged_weight(layer.weight.detach(), parts, 1.5), wanted)


def test_one_layer_that_is_not_square_tells_how_all_are_held():
    def parts(rows, columns):
        return {"lora_A.weight": torch.zeros(1, columns), "lora_B.weight": torch.zeros(rows, 1)}

    shapes = {"square": (4, 4), "wide": (4, 6)}
    found = is_transposed(shapes, {"square": parts(4, 4), "wide": parts(6, 4)}, "", False)
    assert found == {"square": True, "wide": True}
    found = is_transposed(shapes, {"square": parts(4, 4), "wide": parts(4, 6)}, "gpt2", True)
    assert found == {"square": False, "wide": False}
    square = {"square": parts(4, 4)}
    assert is_transposed(shapes, square, "gpt2", False) == {"square": True}
    assert is_transposed(shapes, square, "", True) == {"square": True}
    assert is_transposed(shapes, square, "llama", False) == {"square": False}
