"""What is LoLDU's own among the tuners: starts, the scale, registration, transformers models."""

import importlib.util
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.loldu_twin import residual_form
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_stable.functional.loldu import CHANGING_INITS, INITS
from lightning_stable.peft import _register, loldu
from lightning_stable.peft.loldu import LoLDUConfig, LoLDUModel

TOKENS = torch.arange(12).view(2, 6)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def inputs() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def adapted(**settings: Any) -> PeftModel:
    return get_peft_model(net(), LoLDUConfig(**{"r": 3, "target_modules": ["0", "2"], **settings}))


@pytest.mark.parametrize("init", INITS)
def test_only_the_starts_that_change_the_function_say_so(init: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = adapted(init=init)
    assert [str(each.message) for each in told if "LoLDUConfig: init" in str(each.message)] == [
        f"LoLDUConfig: init={init!r} starts from another function than the base model's. 'lu', 'uniform', 'normal' and "
        "'constant' start from the base model."
    ] * (init in CHANGING_INITS)
    assert torch.equal(model(inputs()), net()(inputs())) == (init not in CHANGING_INITS)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), net()(inputs()))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.filterwarnings("ignore:LoLDUConfig. init=:UserWarning")
def test_a_layer_is_the_papers_form_with_its_residual(init: str) -> None:
    model = adapted(init=init, alpha=2.0)
    layer = model.base_model.model[2]
    layer.loldu_vector["default"].data += torch.tensor([0.5, -1.0, 2.0])
    start, z = layer.loldu_start["default"].tolist(), layer.loldu_vector["default"].tolist()
    papers = torch.tensor(residual_form(net()[2].weight.tolist(), 3, 2.0 / 3, start, z), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, papers, layer.base_layer.bias))


def test_a_trained_scale_is_a_factor_of_its_own() -> None:
    model = adapted(train_scale=True, alpha=6.0, target_modules=["2"])
    layer = model.base_model.model[2]
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert {name: tuple(parameter.shape) for name, parameter in trained.items()} == {
        "loldu_vector.default": (3,),
        "loldu_scale.default": (1,),
    }
    assert float(layer.loldu_scale["default"].detach()) == 2.0
    with torch.no_grad():
        layer.loldu_scale["default"].fill_(5.0)
        layer.loldu_vector["default"].mul_(1.5)
    left, right, start = (getattr(layer, f"loldu_{part}")["default"] for part in ("left", "right", "start"))
    residual = layer.base_layer.weight - 2.0 * (left * start) @ right
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = nn.functional.linear(x, residual + 5.0 * (left * (1.5 * start)) @ right, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained.values())


def test_alpha_over_rank_is_the_scale_of_each_layer() -> None:
    model = adapted(alpha=6.0, rank_pattern={"2": 4})
    assert [model.base_model.model[place].scaling["default"] for place in (0, 2)] == [2.0, 1.5]


def test_each_layer_draws_its_own_numbers_from_the_seed_and_nothing_of_the_global_ones() -> None:
    def drawn(seed: int) -> list[Tensor]:
        model = get_peft_model(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
            LoLDUConfig(r=3, target_modules=["0", "1"], init="s_normal", seed=seed, inference_mode=True),
        )
        return [model.base_model.model[place].loldu_vector["default"].detach() for place in (0, 1)]

    torch.manual_seed(0)
    first = drawn(1)
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(1), strict=True))
    assert not torch.equal(first[0], drawn(2)[0])


def test_it_is_a_method_of_peft_like_its_own(tmp_path: Path) -> None:
    assert PeftType("LOLDU") is PeftType.LOLDU
    assert "LOLDU" in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LOLDU"] is LoLDUConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOLDU] is LoLDUModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["LOLDU"] == "loldu_"
    assert len(set(map(str, PeftType))) == len(list(PeftType))
    _register.register_tuner("loldu", LoLDUConfig, LoLDUModel)
    assert list(PeftType).count("LOLDU") == 1

    config = LoLDUConfig(r=5, alpha=3.0, init="normal", train_scale=True, target_modules=["a", "b"], seed=4)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOLDU"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert isinstance(loaded, LoLDUConfig)
    assert pickle.loads(pickle.dumps(config)) == config
    assert PeftConfig.from_peft_type(**{**config.to_dict(), "peft_type": "LOLDU"}) == config


def test_importing_again_registers_nothing_twice() -> None:
    # In a copy, so that the classes of the other tests stay those that are registered.
    found = importlib.util.spec_from_file_location("loldu_again", loldu.__file__)
    again = importlib.util.module_from_spec(found)
    found.loader.exec_module(again)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LOLDU"] is LoLDUConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"alpha": 0.0}, "alpha=0.0"), ({"init": "svd"}, "init='svd' is unknown"), ({"r": 2.5}, "r=2.5")],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoLDUConfig(**settings)


def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
        ).eval()


def gpt() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


# peft asks transformers by a name that it is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [llama, gpt])
@pytest.mark.parametrize("target", [None, "all-linear"])
def test_transformers_models_are_adapted_and_saved(make: Any, target: str | None, tmp_path: Path) -> None:
    model = get_peft_model(make(), LoLDUConfig(r=3, target_modules=target, task_type="CAUSAL_LM"))
    expected = make()(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, expected)
    assert not any("lm_head" in name or "wte" in name for name in model.targeted_module_names)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    trained = model(TOKENS).logits
    assert float((trained - expected).detach().norm() / expected.detach().norm()) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, trained)
    torch.testing.assert_close(loaded.merge_and_unload()(TOKENS).logits, trained, rtol=1e-4, atol=1e-4)


def test_some_blocks_only_are_adapted() -> None:
    model = inject_adapter_in_model(
        LoLDUConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"), llama()
    )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.layers.1.self_attn.q_proj.loldu_vector.default"]
