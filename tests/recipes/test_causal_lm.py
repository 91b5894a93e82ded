import math

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_stable.data.text import TextDataModule
from lightning_stable.recipes.causal_lm import CausalLM
from lightning_stable.testing.harness import QUIET

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def text(**settings):
    return TextDataModule(**{"sequence_length": 64, "batch_size": 16, "max_bytes": 400_000, **settings})


def test_the_default_is_a_llama_of_a_million_parameters_over_bytes():
    module = CausalLM()
    assert module.model.config.model_type == "llama"
    assert module.model.config.max_position_embeddings == 1024
    assert 0.8e6 < sum(parameter.numel() for parameter in module.parameters()) < 1.2e6
    tokens = torch.arange(24).reshape(2, 12)
    output = module(input_ids=tokens, labels=tokens)
    assert output.logits.shape == (2, 12, 256)
    shifted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, shifted)


def test_thirty_steps_learn_something_about_python():
    seed_everything(0)
    module = CausalLM(TINY, lr=1e-2)
    datamodule = text()
    trainer = Trainer(max_steps=30, **QUIET)
    (before,) = trainer.validate(module, datamodule, verbose=False)
    assert before["val_loss"] == pytest.approx(math.log(256), rel=0.05)
    trainer.fit(module, datamodule)
    (after,) = trainer.validate(module, datamodule, verbose=False)
    assert after["val_loss"] < 3.5
    assert after["val_bits_per_token"] == pytest.approx(after["val_loss"] / math.log(2))
    (tested,) = trainer.test(module, datamodule, verbose=False)
    assert tested["test_loss"] == pytest.approx(after["val_loss"])


def test_evaluation_is_the_mean_over_predicted_tokens():
    module = CausalLM(TINY)
    tokens = torch.randint(1, 256, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[1, 4:] = -100
    batches = [
        {"input_ids": tokens[:2], "labels": labels[:2]},
        {"input_ids": tokens[2:, :5], "labels": labels[2:, :5]},
    ]
    (metrics,) = Trainer(**QUIET).validate(module, DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        sums = [module(**batch).loss * (batch["labels"][:, 1:] != -100).sum() for batch in batches]
    assert metrics["val_loss"] == pytest.approx(float(sum(sums)) / (9 + 3 + 4), rel=1e-5)


def test_only_matrices_decay():
    module = CausalLM(TINY, lr=0.5, weight_decay=0.25, betas=(0.5, 0.75))
    optimizer = module.configure_optimizers()
    matrices, vectors = optimizer.param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.25, 0.0)
    assert all((group["lr"], group["betas"]) == (0.5, (0.5, 0.75)) for group in optimizer.param_groups)
    for parameter in vectors["params"]:
        parameter.requires_grad_(False)
    assert len(module.configure_optimizers().param_groups) == 1


def test_pretrained_weights_come_from_a_directory_ready_to_train(tmp_path):
    source = CausalLM(TINY)
    source.model.to(torch.bfloat16).save_pretrained(tmp_path)
    module = CausalLM(pretrained=str(tmp_path))
    assert all(submodule.training for submodule in module.modules())
    for (name, ours), theirs in zip(module.model.named_parameters(), source.model.parameters(), strict=True):
        assert ours.dtype is torch.float32, name
        assert torch.equal(ours, theirs.float()), name
    trainer = Trainer(max_steps=2, limit_val_batches=0, **QUIET)  # warns of modules in evaluation mode, if any
    trainer.fit(module, text(max_bytes=100_000))


def test_a_checkpoint_loads_safely_and_builds_the_module_again(tmp_path):
    module = CausalLM(TINY, lr=0.5)
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, text(max_bytes=100_000))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["config"] == TINY
    again = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.lr == 0.5
    for ours, theirs in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path):
    def run(steps, ckpt_path=None):
        seed_everything(1)
        module = CausalLM({**TINY, "attention_dropout": 0.0})
        trainer = Trainer(max_steps=steps, limit_val_batches=1, **QUIET)
        trainer.fit(module, text(max_bytes=100_000), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module.state_dict()

    run(3)
    whole, resumed = run(6), run(6, tmp_path / "3.ckpt")
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": TINY, "pretrained": "some/model"}, "not both: got config=.* and pretrained='some/model'"),
        ({"config": {"model_type": "lama"}}, "got 'lama'. Did you mean 'llama"),
        ({"config": {"hidden_size": 8}}, "must name in 'model_type' a causal language model of transformers, got None"),
        ({"config": {"model_type": "vit"}}, "a causal language model of transformers, got 'vit'"),
        (
            {"config": {**TINY, "hiden_size": 8}},
            "'hiden_size'=8, which is no field of a 'llama' config. Did you mean 'hidden_size'",
        ),
    ],
)
def test_bad_sources_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(**settings)


@pytest.mark.parametrize("fields", [{"rope_theta": 5000.0}, {"tie_word_embeddings": True}, {"dtype": "bfloat16"}])
def test_fields_of_other_releases_and_of_all_models_are_taken(fields):
    module = CausalLM({**TINY, **fields})
    assert next(module.parameters()).dtype is torch.float32
