"""What PEFT's own suite asks of every tuner: asked of LoLDU and SVFit, and of LoRA, which shows the questions right."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_stable.peft._diagonal_model import as_lora
from lightning_stable.peft.loldu import LoLDUConfig
from lightning_stable.peft.svfit import SVFitConfig

CONFIGS: dict[str, Callable[..., Any]] = {
    "loldu": lambda **settings: LoLDUConfig(**{"r": 3, "alpha": 6.0, **settings}),
    "loldu_scale": lambda **settings: LoLDUConfig(**{"r": 3, "train_scale": True, **settings}),
    "loldu_drawn": lambda **settings: LoLDUConfig(**{"r": 3, "init": "normal", **settings}),
    "svfit": lambda **settings: SVFitConfig(**{"r": 3, **settings}),
    "lora": lambda **settings: LoraConfig(**{"r": 3, "lora_alpha": 6, **settings}),
}
OURS = [name for name in CONFIGS if name != "lora"]
TARGETS = ["first", "second", "flat"]

each_tuner = pytest.mark.parametrize("tuner", CONFIGS)
each_of_ours = pytest.mark.parametrize("tuner", OURS)
# PEFT's own: LoRA asks for another layout of the weight with each layer in turn.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


class Base(nn.Module):
    """Two linear layers, the first of them used twice, transformers' Conv1D, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(11)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 6, bias=False)
            self.flat = Conv1D(10, 6)
            self.head = nn.Linear(10, 2)
            nn.init.normal_(self.flat.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.flat(self.second(x))))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(4)).to(dtype)


def config(tuner: str, **settings: Any) -> Any:
    return CONFIGS[tuner](**{"target_modules": list(TARGETS), **settings})


def move(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Put other values into what an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    moved = [p for name, p in model.named_parameters() if f".{adapter}" in name and "base_layer" not in name]
    assert moved
    for parameter in moved:
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def adapted(tuner: str, seed: int = 0, **settings: Any) -> PeftModel:
    model = get_peft_model(Base(), config(tuner, **settings))
    move(model, seed=seed)
    return model


@torch.no_grad()
def answer(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(inputs(dtype))


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the base, by the names that they have in it."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in ("lora_", "loldu_", "svfit_", "modules_to_save"))
    }


def assert_pristine(model: nn.Module) -> None:
    found, expected = base_weights(model), Base().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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


# ---------------------------------------------------------------------------------------------------- several adapters


@pytest.fixture
def pair(tuner: str) -> tuple[PeftModel, Tensor, Tensor]:
    """A model with two adapters, and what each gives alone."""
    alone = [answer(adapted(tuner, seed=seed, r=rank)) for seed, rank in ((0, 3), (7, 2))]
    model = get_peft_model(Base(), config(tuner))
    model.add_adapter("other", config(tuner, r=2))
    move(model)
    move(model, "other", seed=7)
    if tuner == "lora":
        # Its A is random: what the adapters are alone is found by switching, and the rest by it.
        alone = []
        for name in ("default", "other"):
            model.set_adapter(name)
            alone.append(answer(model))
        model.set_adapter("default")
    return model, alone[0], alone[1]


@each_tuner
def test_adapters_live_side_by_side_and_are_switched(tuner: str, pair: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, second = pair
    assert not torch.equal(first, second)
    assert torch.equal(answer(model), first)
    model.set_adapter("other")
    assert torch.equal(answer(model), second)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".other" in name for name in trained)
    model.set_adapter("default")
    assert torch.equal(answer(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = answer(model)
    assert not torch.equal(both, first)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(answer(model), both, rtol=1e-5, atol=1e-5)


@each_tuner
def test_disabled_adapters_leave_the_pristine_function(tuner: str, pair: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, _ = pair
    with model.disable_adapter():
        assert torch.equal(answer(model), answer(Base()))
    assert torch.equal(answer(model), first)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(answer(model), answer(Base()), rtol=1e-5, atol=1e-5)


@each_tuner
def test_a_deleted_adapter_is_gone(tuner: str, pair: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, first, _ = pair
    model.delete_adapter("other")
    assert torch.equal(answer(model), first)
    assert not any("other" in name for name in model.state_dict())
    assert "other" not in model.peft_config


@each_tuner
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
def test_deleting_the_active_adapter_makes_another_active(tuner: str, pair: tuple[PeftModel, Tensor, Tensor]) -> None:
    model, _, second = pair
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(answer(model), second)
    model.delete_adapter("other")
    # A PeftModel without any adapter cannot be called, the model within can.
    assert torch.equal(answer(model.base_model.model), answer(Base()))


@each_tuner
def test_a_second_adapter_is_saved_and_loaded_by_itself(
    tuner: str, pair: tuple[PeftModel, Tensor, Tensor], tmp_path: Path
) -> None:
    model, _, second = pair
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    loaded = PeftModel.from_pretrained(Base(), tmp_path / "other")
    assert torch.equal(answer(loaded), second)
    again = adapted(tuner, seed=9)
    again.load_adapter(tmp_path / "other", "late")
    again.set_adapter("late")
    assert torch.equal(answer(again), second)


# ---------------------------------------------------------------------------------------------------- precision


@each_tuner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_has_its_adapter_in_single(tuner: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(Base().to(dtype), config(tuner))
    assert torch.equal(answer(model, dtype), answer(Base().to(dtype), dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    move(model)
    expected = answer(model, dtype)
    assert expected.dtype == dtype
    assert float((expected.float() - answer(adapted_like(tuner, model))).norm() / expected.float().norm()) < 3e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(PeftModel.from_pretrained(Base().to(dtype), tmp_path), dtype), expected)
    model.merge_adapter(safe_merge=True)
    assert float((answer(model, dtype) - expected).float().norm() / expected.float().norm()) < 5e-2


def adapted_like(tuner: str, model: PeftModel) -> PeftModel:
    """The same adapter on the base in single precision."""
    other = get_peft_model(Base(), config(tuner))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    return other


@each_of_ours
def test_a_model_cast_as_a_whole_starts_as_the_base_cast(tuner: str) -> None:
    model = get_peft_model(Base(), config(tuner)).to(torch.bfloat16)
    assert torch.equal(answer(model, torch.bfloat16), answer(Base().to(torch.bfloat16), torch.bfloat16))


@each_of_ours
def test_without_upcasting_the_vector_is_single_precision_all_the_same(tuner: str, tmp_path: Path) -> None:
    model = get_peft_model(Base().bfloat16(), config(tuner), autocast_adapter_dtype=False)
    move(model)
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(
            Base().bfloat16(), tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=lean
        )
        assert torch.equal(answer(loaded, torch.bfloat16), answer(model, torch.bfloat16))


@each_tuner
def test_autocast_computes_in_its_precision_and_gradients_come_in_single(tuner: str) -> None:
    model = adapted(tuner)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), answer(model), rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@each_of_ours
def test_a_base_in_double_precision_has_its_adapter_in_double(tuner: str) -> None:
    model = get_peft_model(Base().double(), config(tuner))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}
    assert torch.equal(answer(model, torch.float64), answer(Base().double(), torch.float64))


# ---------------------------------------------------------------------------------------------------- as LoRA


@each_of_ours
def test_an_adapter_is_a_lora_adapter_of_its_own_rank(tuner: str, tmp_path: Path) -> None:
    model = adapted(tuner, rank_pattern={"second": 5})
    found = as_lora(model)
    assert {name: len(factors.a) for name, factors in found.items()} == {
        f"base_model.model.{name}": rank for name, rank in (("first", 3), ("second", 5), ("flat", 3))
    }
    ranks = {name.rpartition(".")[2]: len(factors.a) for name, factors in found.items()}
    settings = LoraConfig(r=1, lora_alpha=1, target_modules=TARGETS, rank_pattern=ranks, alpha_pattern=ranks)
    lora = get_peft_model(Base(), settings)
    for name, (a, b, scaling) in found.items():
        layer = lora.get_submodule(name)
        assert layer.scaling["default"] == scaling
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    torch.testing.assert_close(answer(lora), answer(model), rtol=1e-5, atol=1e-5)
    lora.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(PeftModel.from_pretrained(Base(), tmp_path)), answer(model), rtol=1e-5, atol=1e-5)


@each_of_ours
def test_pefts_own_conversion_to_lora_works(tuner: str) -> None:
    model = adapted(tuner, target_modules=["first", "second"])
    settings, state = convert_to_lora(model, rank=3)
    lora = get_peft_model(Base(), settings)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(answer(lora), answer(model), rtol=1e-4, atol=1e-4)


def test_a_model_without_such_an_adapter_is_no_lora() -> None:
    with pytest.raises(ValueError, match="no layer of Base has an adapter 'default'"):
        as_lora(Base())
    with pytest.raises(ValueError, match="'other'"):
        as_lora(adapted("svfit"), "other")


# ---------------------------------------------------------------------------------------------------- refusals


class Odd(nn.Module):
    """Layers that cannot be adapted, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 3, 3)
        self.embedding = nn.Embedding(9, 8)
        self.bits = nn.Linear(8, 8, bias=False)
        self.bits.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.empty = nn.Linear(8, 8, device="meta")
        self.broken = nn.Linear(8, 8)
        nn.init.constant_(self.broken.weight, torch.inf)


@each_of_ours
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("conv", "is of type Conv2d; only Linear"),
        ("embedding", "is of type Embedding; only Linear"),
        ("bits", "quantised and sharded"),
        ("computed", "a parametrization"),
        ("attention.out_proj", "MultiheadAttention"),
        ("block.linear1", "TransformerEncoderLayer"),
        ("empty", "meta device"),
    ],
)
def test_other_layers_are_refused_by_name_before_anything_is_changed(tuner: str, target: str, words: str) -> None:
    model = Odd()
    with pytest.raises(ValueError, match=words) as error:
        get_peft_model(model, config(tuner, target_modules=["linear", target]))
    assert f"layer '{target}'" in str(error.value)
    assert type(model.linear) is nn.Linear
    assert model.linear.weight.requires_grad


@each_of_ours
def test_without_the_fast_path_a_layer_of_a_transformer_encoder_works(tuner: str) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = get_peft_model(nn.Sequential(block), config(tuner, target_modules=["linear1"])).eval()
        before = model(x).detach()
        move(model)
        with torch.no_grad():
            assert not torch.allclose(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@each_of_ours
def test_a_rank_or_a_value_that_does_not_fit_names_the_layer(tuner: str) -> None:
    with pytest.raises(ValueError, match=r"layer 'second' has a weight of shape \(6, 8\), and rank 7 is above"):
        get_peft_model(Base(), config(tuner, target_modules=["second"], r=7))
    with pytest.raises(ValueError, match="layer 'broken' has a weight with values that are not finite"):
        get_peft_model(Odd(), config(tuner, target_modules=["broken"]))


@each_of_ours
def test_settings_that_do_not_fit_together_are_refused(tuner: str) -> None:
    for settings, words in (
        ({"r": 0}, "r=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rank_pattern": {"a": 0}}, "the rank of 'a' in rank_pattern=0"),
        ({"layers_pattern": "blocks"}, "layers_to_transform"),
    ):
        with pytest.raises(ValueError, match=words):
            config(tuner, **settings)
    with pytest.raises(ValueError, match="save_factors=False of the new adapter is not that of adapter 'default'"):
        adapted(tuner).add_adapter("other", config(tuner, save_factors=False))


@each_of_ours
def test_a_tied_weight_is_adapted_and_never_merged(tuner: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(9, 8)
            self.out = nn.Linear(8, 9, bias=False)
            self.out.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.tokens(x))

    base = Tied()
    x = torch.arange(4)
    expected = base.tokens(x).detach().clone()
    model = get_peft_model(base, config(tuner, target_modules=["out"]))
    before = model(x).detach()
    move(model)
    assert not torch.equal(model(x), before)
    assert torch.equal(base.tokens(x), expected)
    with pytest.raises(ValueError, match=r"the weight of 'out' is shared \(tokens.weight, out.weight\)"):
        model.merge_adapter()
    assert torch.equal(base.tokens(x), expected)
