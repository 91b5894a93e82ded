"""OLoRA's factors against peft's on linear layers, and that the function is kept."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lightning_stable.functional.olora import olora_factors


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_factors_are_those_of_peft_and_keep_the_weight(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    weight = net[0].weight.detach().clone()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights="olora"), net)
    a, b, residual = olora_factors(weight, 4, 2.0)
    torch.testing.assert_close(a, net[0].lora_A["default"].weight.detach())
    torch.testing.assert_close(b, net[0].lora_B["default"].weight.detach())
    torch.testing.assert_close(residual, net[0].base_layer.weight.detach())
    torch.testing.assert_close(residual + 2.0 * b @ a, weight)
    torch.testing.assert_close(b.T @ b, torch.eye(4))


def test_half_precision_and_bad_input() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b, residual = olora_factors(weight, 3, 1.0)
    assert (a.dtype, b.dtype, residual.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    torch.testing.assert_close(residual.float() + b @ a, weight.float(), rtol=0, atol=2e-2)
    with pytest.raises(ValueError, match="rank=7"):
        olora_factors(weight, 7, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        olora_factors(weight * float("inf"), 2, 1.0)
