"""``export-adapter``: from a recipe's run to folders that PEFT and transformers load; what it refuses, in one line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_stable.cli.main import main
from lightning_stable.peft import load_adapters
from lightning_stable.peft._export import FORMS
from lightning_stable.recipes.causal_lm import CausalLM

RECIPES = ["pissa", "lora_ga", "eva", "loldu", "svfit"]
SMALL = {
    **{"model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
INPUTS = torch.arange(64).reshape(2, 32)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory, base):
    """Run a recipe for a few steps, once."""
    found = {}

    def run(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                small = ["--data.max_bytes", "60000", "--vars.batch_size", "4", "--vars.sequence_length", "32"]
                quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
                rank = ["--vars.rank", "2", "--vars.lr", "0.02", "--model.pretrained", str(base)]
                steps = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]
                assert main(["run", f"lm_finetune_{name}", *small, *quiet, *rank, *steps]) == 0
            found[name] = folder / f"runs/lm_finetune_{name}/version_0/checkpoints/last.ckpt"
        return found[name]

    return run


@torch.no_grad()
def logits(model):
    return model.eval()(INPUTS).logits


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_adapters_go_to_other_libraries(name, checkpoint_of, base, tmp_path, capsys):
    checkpoint = str(checkpoint_of(name))
    wanted = logits(load_adapters(CausalLM(pretrained=str(base)), checkpoint).model)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), wanted, rtol=1e-3, atol=1e-3)
    assert main(["export-adapter", checkpoint, str(tmp_path / "adapter")]) == 0
    out, err = capsys.readouterr()
    assert "for 7 layers of the untouched base" in out
    assert f"PeftModel.from_pretrained(base, {str(tmp_path / 'adapter')!r})" in out
    assert "warning" not in err
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    assert main(["export-adapter", checkpoint, str(tmp_path / "model"), "--as", "merged", "--base", str(base)]) == 0
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["CKPT", "OUT", "export-adapter --help"]),
        (["it.ckpt", "out", "--as", "lore"], ["--as lore", "'lora'"]),
        (["it.ckpt", "out"], ["no checkpoint it.ckpt"]),
        (["text.ckpt", "out"], ["text.ckpt is no checkpoint of a Trainer"]),
        (["plain.ckpt", "out"], ["plain.ckpt holds no adapters", "Adapters"]),
        (["plain.ckpt", "full"], ["full is not empty", "--force"]),
        (["plain.ckpt", "text.ckpt"], ["text.ckpt is a file"]),
        (["PISSA", "out", "--as", "merged"], ["--base"]),
        (["PISSA", "out", "--as", "native"], ["'pissa'", "--base", "--as lora"]),
        (["PISSA", "out", "--as", "merged", "--base", "gone"], ["no folder gone"]),
        (["PISSA", "out", "--as", "merged", "--base", "full"], ["full has no config.json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, parts, checkpoint_of, tmp_path, monkeypatch, capsys):
    pissa = checkpoint_of("pissa") if "PISSA" in arguments else None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.ckpt").write_text("text")
    torch.save({"state_dict": {}}, "plain.ckpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert main(["export-adapter", *(str(pissa) if word == "PISSA" else word for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in parts:
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["svfit", "loldu"])
def test_native_adapters_in_a_fresh_process(name, checkpoint_of, tmp_path):
    out = tmp_path / "out"
    words = ["export-adapter", str(checkpoint_of(name)), str(out), "--as", "native"]
    code = f"import sys; from lightning_stable.cli.main import main; sys.exit(main({words!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == name.upper()


def test_the_guides_example_works_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    assert main(["show", "export_adapter"]) == 0
    guide = capsys.readouterr().out
    bash = re.search(r"```bash\n(.*?)```", guide, re.S)[1]
    python = re.search(r"```text\n(.*?)```", guide, re.S)[1]
    monkeypatch.chdir(tmp_path)
    small = ["--data.max_bytes", "60000", "--vars.batch_size", "2", "--vars.sequence_length", "16"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_steps", "2"]
    for line in bash.splitlines():
        program, *words = shlex.split(line)
        if program == "python":
            exec(words[1], {})  # noqa: S102  a line of ours
        else:
            assert program == "lightning-stable"
            assert main([*words, *small, *quiet] if words[0] == "run" else words) == 0
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    adapted, merged = (dict(names), dict(names))
    first, second, third = python.splitlines()
    exec(f"{first}\n{second}", adapted)  # noqa: S102
    exec(third, merged)  # noqa: S102
    torch.testing.assert_close(logits(adapted["model"]), logits(merged["model"]), rtol=1e-4, atol=1e-5)
    start = AutoModelForCausalLM.from_pretrained(Path("base"))
    assert not torch.equal(logits(start), logits(merged["model"]))


def test_force_and_notes(checkpoint_of, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["export-adapter", str(checkpoint_of("svfit")), str(out), "--as", "native", "--force"]) == 0
    assert "lightning-stable: warning: To load it PEFT has to know SVFIT" in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"


def test_the_guide_and_the_help_name_every_form(capsys):
    assert main(["show", "export_adapter"]) == 0
    guide = capsys.readouterr().out
    assert main(["export-adapter", "--help"]) == 0
    text = capsys.readouterr().out
    for form in FORMS:
        assert f"\n## {form}\n" in guide
        assert f"{form}:" in text
    for option in ("--as", "--base", "--force"):
        assert f"`{option}`" in guide
        assert option in text
