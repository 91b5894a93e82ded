"""What is SVFit's own among the tuners: singular values, seeds, registration."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_stable.peft.svfit import SVFitConfig, SVFitModel


def net(size: int = 40) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(size, 30), nn.Tanh(), Conv1D(20, 30))
        nn.init.normal_(model[2].weight)
        return model


@pytest.mark.parametrize("iterations", [None, 10])
def test_what_trains_are_the_largest_singular_values(iterations: int | None) -> None:
    model = get_peft_model(net(), SVFitConfig(r=5, iterations=iterations, target_modules=["0", "2"]))
    for place, weight in ((0, net()[0].weight), (2, net()[2].weight.T)):
        layer = model.base_model.model[place]
        _, sigma, _ = torch.linalg.svd(weight)
        torch.testing.assert_close(layer.svfit_vector["default"].detach(), sigma[:5].detach(), rtol=1e-3, atol=0.0)
        layer.svfit_vector["default"].data.copy_(2 * sigma[:5])
        changed = torch.linalg.svdvals(
            weight + (layer.get_delta_weight("default").T if place else layer.get_delta_weight("default"))
        )
        torch.testing.assert_close(changed[:5], 2 * sigma[:5], rtol=1e-3, atol=0.0)
        torch.testing.assert_close(changed[5:].detach(), sigma[5:].detach(), rtol=1e-2, atol=1e-3)


def test_a_layer_is_the_residual_form() -> None:
    model = get_peft_model(net(), SVFitConfig(r=5, target_modules=["0"]))
    layer = model.base_model.model[0]
    left, right, start = (getattr(layer, f"svfit_{part}")["default"] for part in ("left", "right", "start"))
    sigma = layer.svfit_vector["default"].data.mul_(torch.linspace(0, 2, 5))
    residual = layer.base_layer.weight - (left * start) @ right
    x = torch.randn(6, 40)
    expected = nn.functional.linear(x, residual, layer.base_layer.bias) + ((x @ right.T) * sigma) @ left.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_the_same_factors_come_out_in_any_process_and_others_with_another_seed() -> None:
    def left(seed: int, state: int) -> torch.Tensor:
        torch.manual_seed(state)
        model = get_peft_model(net(), SVFitConfig(r=5, iterations=0, target_modules=["0"], seed=seed))
        return model.base_model.model[0].svfit_left["default"]

    assert torch.equal(left(0, 1), left(0, 2))
    assert not torch.equal(left(0, 1), left(1, 1))


def test_it_trains_sixteen_times_fewer_numbers_than_lora_or_less() -> None:
    model = get_peft_model(net(), SVFitConfig(r=8, target_modules=["0"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 8
    assert 8 * (40 + 30) / trained >= 16


def test_it_is_a_method_of_peft_like_its_own(tmp_path: Path) -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SVFIT"] is SVFitConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SVFIT] is SVFitModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SVFIT] == "svfit_"
    config = SVFitConfig(r=5, iterations=None, target_modules=["a"], rank_pattern={"b": 2}, save_factors=False)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SVFIT"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert isinstance(loaded, SVFitConfig)
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("settings", "words"), [({"iterations": -1}, "iterations=-1"), ({"iterations": 1.5}, "iterations=1.5")]
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SVFitConfig(**settings)
