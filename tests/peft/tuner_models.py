"""What tests of tuners adapt, and the configs that they adapt it by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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
