"""QPiSSA: merging, and exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import Net, adapters, fit, outputs
from export_fixtures import LLAMA, difference, load, logits_of, make_base, train
from peft import PeftModel
from qpissa_runs import NF4, trained
from safetensors.torch import load_file
from torch import nn

from lightning_stable.cli.main import main
from lightning_stable.functional._factors import shift
from lightning_stable.peft import merge_adapters
from lightning_stable.peft._export import export_adapter
from lightning_stable.peft._initialise import factors_of
from lightning_stable.peft._record import KEY, find_record
from lightning_stable.peft._targets import tuner_layers

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


CLOSE = 5e-6


def test_merging_gives_plain_layers_with_the_values_of_the_codes() -> None:
    module = trained("llama")
    expected = outputs(module, "llama")
    names, flags = zip(*((n, p.requires_grad) for n, p in Net("llama").named_parameters()), strict=True)
    layer = module.model.get_submodule("model.layers.1.mlp.up_proj")
    a, b = factors_of(layer) or ()
    weight = layer.base_layer.matrix() + 2 * b @ a
    merge_adapters(module)
    assert torch.allclose(module.model.get_submodule("model.layers.1.mlp.up_proj").weight, weight, atol=1e-6)
    assert torch.allclose(outputs(module, "llama"), expected, atol=1e-5)
    assert tuple(n for n, _ in module.named_parameters()) == names
    assert tuple(p.requires_grad for p in module.parameters()) == flags
    assert {type(part) for part in module.modules() if "Linear" in type(part).__name__} == {nn.Linear}
    ended = Net()
    fit(ended, adapters("pissa", init_options=NF4, merge_on_end=True), steps=2)
    assert find_record(ended) is None
    assert type(ended.model.first) is nn.Linear


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a run on a model of a folder, saved without its base and with it."""
    folder = tmp_path_factory.mktemp("qpissa")
    run = train(folder, make_base(folder / "base", LLAMA), LORA, "pissa", init_options=NF4)
    run.module.trainer.callbacks[0].save = "full"
    run.module.trainer.save_checkpoint(folder / "full.ckpt")
    return run


def test_a_merged_model_computes_what_was_trained(exported: Any, tmp_path: Path) -> None:
    for name in (exported.checkpoint, exported.checkpoint.parent / "full.ckpt"):
        out = tmp_path / name.stem
        assert export_adapter(name, out, form="merged", base=exported.base).notes == []
        assert difference(logits_of(load(out)), exported.logits) < CLOSE
    bare = export_adapter(exported.checkpoint.parent / "full.ckpt", tmp_path / "bare", form="merged")
    assert "There are weights only" in bare.notes[0]
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("bare", "full"))
    assert set(wanted) <= set(ours)
    assert not {name for name in ours if "scales" in name or ours[name].dtype != torch.float32}
    assert all(torch.allclose(ours[name], wanted[name], atol=1e-6) for name in wanted)


def test_the_shifted_base_of_native_is_that_of_the_codes(exported: Any, tmp_path: Path) -> None:
    done = export_adapter(exported.checkpoint, tmp_path / "out", form="native", base=exported.base)
    assert "in nf4 is written in floating point" in done.notes[0]
    base = load(tmp_path / "out" / "base")
    held = dict(tuner_layers(exported.module.model))["model.layers.1.mlp.down_proj"].base_layer
    assert torch.equal(base.model.layers[1].mlp.down_proj.weight, held.matrix())
    assert difference(logits_of(PeftModel.from_pretrained(base, str(tmp_path / "out"))), exported.logits) < CLOSE


def test_lora_for_the_untouched_base_says_that_it_differs(exported: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["export-adapter", str(exported.checkpoint), str(tmp_path / "out")]) == 0
    assert "Training had the base in nf4, and the folder is for the untouched base" in capsys.readouterr().err
    onto = PeftModel.from_pretrained(load(exported.base), str(tmp_path / "out"))
    assert CLOSE < difference(logits_of(onto), exported.logits) < 0.3
    # What it is off by is what quantizing took: with that put back it is what was trained.
    for name, layer in tuner_layers(exported.module.model):
        first = find_record(exported.module)[2].shift[name]
        plain = onto.base_model.model.get_submodule(name).base_layer
        shifted = shift(plain.weight, first["a"], first["b"], layer.scaling["default"])
        plain.weight.data += layer.base_layer.matrix() - shifted
    assert difference(logits_of(onto), exported.logits) < CLOSE


def test_another_rounding_at_an_export_is_told(exported: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(exported.checkpoint, weights_only=True)
    checkpoint[KEY]["held"]["model.layers.0.self_attn.q_proj"] = "other"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    done = export_adapter(tmp_path / "other.ckpt", tmp_path / "out", form="merged", base=exported.base)
    assert "1 bases have other codes in nf4" in done.notes[0]
