"""What PEFT's own suite asks of every tuner: asked of LoLDU and SVFit, and of LoRA, which shows the questions right."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuner_models import (
    TARGETS,
    Base,
    adapted,
    answer,
    assert_pristine,
    base_weights,
    config,
    each_of_ours,
    each_tuner,
    inputs,
    move,
)

# PEFT's own: LoRA asks for another layout of the weight with each layer in turn.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


# ---------------------------------------------------------------------------------------------------- injection


@each_tuner
@pytest.mark.parametrize("wrap", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_the_function_is_the_same_bit_by_bit_and_only_the_adapter_trains(tuner: str, wrap: Any) -> None:
    expected = answer(Base())
    model = wrap(Base(), config(tuner))
    assert torch.equal(answer(model), expected)
    assert_pristine(model)
    prefix = {"loldu": "loldu_", "svfit": "svfit_", "lora": "lora_"}[tuner.partition("_")[0]]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(prefix in name for name in trained)
    layers = {name.partition(f".{prefix}")[0].removeprefix("base_model.model.") for name in trained}
    assert layers == set(TARGETS)

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(inputs()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= trained
    assert not torch.equal(answer(model), expected)


@each_of_ours
def test_gradients_are_in_the_vector_alone(tuner: str) -> None:
    model = get_peft_model(Base(), config(tuner))
    expected = {"vector", "scale"} if tuner == "loldu_scale" else {"vector"}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split("_")[-1].split(".")[0] for name in trained} == expected
    assert len(trained) == len(TARGETS) * len(expected)


def test_the_gradient_is_that_of_the_residual_form() -> None:
    model = adapted("loldu", target_modules=["second"])
    layer = model.base_model.model.second
    left, right, vector = (getattr(layer, f"loldu_{part}")["default"] for part in ("left", "right", "vector"))
    z = vector.detach().clone().requires_grad_()
    scale = 6.0 / 3
    residual = layer.base_layer.weight - scale * (left * layer.loldu_start["default"]) @ right
    x = inputs()
    expected = nn.functional.linear(x, residual + scale * (left * z) @ right)
    torch.testing.assert_close(layer(x), expected)
    expected.square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(vector.grad, z.grad)


@each_tuner
def test_a_regular_expression_and_all_linear_find_the_layers(tuner: str) -> None:
    by_regex = get_peft_model(Base(), config(tuner, target_modules="first|sec.*"))
    assert sorted(by_regex.targeted_module_names) == ["first", "second"]
    all_linear = get_peft_model(Base(), config(tuner, target_modules="all-linear", exclude_modules=["head"]))
    assert sorted(all_linear.targeted_module_names) == sorted(TARGETS)
    all_linear.add_adapter("other", config(tuner, target_modules="all-linear", r=2))
    assert set(all_linear.targeted_module_names) == {*TARGETS, "head"}
    assert type(all_linear.base_model.model.first.get_base_layer()) is nn.Linear


@each_tuner
def test_a_rank_pattern_holds_for_its_layers(tuner: str) -> None:
    model = get_peft_model(Base(), config(tuner, rank_pattern={"second": 5}))
    ranks = {name: model.base_model.model.get_submodule(name).r["default"] for name in TARGETS}
    assert ranks == {"first": 3, "second": 5, "flat": 3}


# ---------------------------------------------------------------------------------------------------- save and load


@each_tuner
@pytest.mark.parametrize("lean", [False, True], ids=["", "low_cpu_mem_usage"])
def test_a_saved_adapter_gives_the_same_outputs_on_a_pristine_base(tuner: str, lean: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = adapted(tuner)
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    loaded = PeftModel.from_pretrained(Base(), tmp_path, low_cpu_mem_usage=lean)
    assert torch.equal(answer(loaded), answer(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_pristine(loaded)
    trained = PeftModel.from_pretrained(Base(), tmp_path, is_trainable=True, low_cpu_mem_usage=lean)
    flags = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, trained)]
    assert flags[0] == flags[1] != set()


@each_of_ours
def test_without_its_factors_an_adapter_is_small_and_loads_on_the_same_base(tuner: str, tmp_path: Path) -> None:
    model = adapted(tuner, save_factors=False)
    model.save_pretrained(tmp_path)
    saved = get_peft_model_state_dict(model)
    assert not any("left" in name or "right" in name for name in saved)
    assert max(tensor.numel() for tensor in saved.values()) <= 12
    for lean in (False, True):
        torch.manual_seed(2)
        loaded = PeftModel.from_pretrained(Base(), tmp_path, low_cpu_mem_usage=lean)
        assert torch.equal(answer(loaded), answer(model))


@each_of_ours
def test_without_its_factors_an_adapter_refuses_another_base(tuner: str, tmp_path: Path) -> None:
    adapted(tuner, save_factors=False).save_pretrained(tmp_path)
    other = Base()
    nn.init.normal_(other.second.weight)
    with pytest.raises(ValueError, match=r"the factors of .*second.* the base model is another one"):
        PeftModel.from_pretrained(other, tmp_path)


@each_tuner
def test_the_state_of_an_adapter_goes_from_model_to_model(tuner: str) -> None:
    model, plain = adapted(tuner), inject_adapter_in_model(config(tuner), Base())
    state = get_peft_model_state_dict(model)
    assert not any("base_layer" in name or "default" in name for name in state)
    result = set_peft_model_state_dict(plain, state)
    assert not result.unexpected_keys
    assert torch.equal(answer(plain), answer(model))
    again = get_peft_model_state_dict(plain)
    assert {f"base_model.model.{name}" for name in again} == set(state)


@each_tuner
def test_the_whole_state_goes_into_a_model_whose_base_was_another(tuner: str) -> None:
    model, other = adapted(tuner), Base()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other = get_peft_model(other, config(tuner))
    other.load_state_dict(model.state_dict())
    assert torch.equal(answer(other), answer(model))


@each_tuner
def test_modules_to_save_train_and_are_saved(tuner: str, tmp_path: Path) -> None:
    model = adapted(tuner, modules_to_save=["head"])
    assert model.base_model.model.head.modules_to_save["default"].weight.requires_grad
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Base(), tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(Base()))


@each_tuner
def test_a_model_is_copied(tuner: str) -> None:
    model = adapted(tuner)
    other = copy.deepcopy(model)
    assert torch.equal(answer(other), answer(model))
    move(other, seed=5)
    assert not torch.equal(answer(other), answer(model))


# ---------------------------------------------------------------------------------------------------- merging


@each_tuner
@pytest.mark.parametrize("safe", [False, True])
def test_merging_keeps_the_function_and_is_undone(tuner: str, safe: bool) -> None:
    model = adapted(tuner)
    expected = answer(model)
    model.merge_adapter(safe_merge=safe)
    assert not torch.equal(model.base_model.model.second.base_layer.weight, Base().second.weight)
    torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(answer(model), expected, rtol=1e-5, atol=1e-5)
    for name, weight in base_weights(model).items():
        torch.testing.assert_close(weight, Base().state_dict()[name], rtol=0.0, atol=2e-6)
    with model.disable_adapter():
        torch.testing.assert_close(answer(model), answer(Base()), rtol=1e-5, atol=1e-5)


@each_tuner
def test_a_merged_model_is_plain_again(tuner: str) -> None:
    model = adapted(tuner)
    expected = answer(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.first) is nn.Linear
    assert type(merged.flat) is Conv1D
    assert merged.state_dict().keys() == Base().state_dict().keys()
    torch.testing.assert_close(answer(merged), expected, rtol=1e-5, atol=1e-5)


@each_tuner
def test_unloading_gives_the_base_back(tuner: str) -> None:
    model = adapted(tuner).unload()
    assert_pristine(model)
    assert torch.equal(answer(model), answer(Base()))


@each_tuner
def test_a_safe_merge_refuses_values_that_are_not_finite(tuner: str) -> None:
    model = adapted(tuner)
    broken = next(p for name, p in model.named_parameters() if p.requires_grad and "second" in name)
    broken.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"(?i)nan|not be finite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(model.base_model.model.second.base_layer.weight, Base().second.weight)


@each_of_ours
def test_merging_twice_or_undoing_nothing_warns(tuner: str) -> None:
    model = adapted(tuner, target_modules=["second"])
    model.merge_adapter()
    merged = model.base_model.model.second.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(model.base_model.model.second.base_layer.weight, merged)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="nothing to undo"):
        model.unmerge_adapter()
