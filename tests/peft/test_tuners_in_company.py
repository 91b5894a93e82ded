"""The same of several adapters, of precisions, of the way to LoRA, and of what tuners refuse."""

from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from tuner_models import TARGETS, Base, adapted, answer, config, each_of_ours, each_tuner, inputs, move

from lightning_stable.peft._diagonal_model import as_lora

# PEFT's own: LoRA asks for another layout of the weight with each layer in turn.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")


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
