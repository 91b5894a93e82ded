"""Adapters of modules that name, store or list their weights in unusual ways, and data that draws by itself."""

from pathlib import Path

import peft
import pytest
import torch
from adapter_runs import Net, adapters, fit, loader, outputs
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_stable.peft import load_adapters, load_from_checkpoint, merge_adapters
from lightning_stable.peft._config import build_config
from lightning_stable.peft._export import export_adapter
from lightning_stable.peft._record import fingerprint


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("init", ["eva", "lora_ga", "corda"])
def test_a_loader_that_draws_its_order_from_the_global_generator_gives_the_same_batches(
    init: str, workers: int
) -> None:
    seen = []
    for callbacks in ([], [adapters(init)]):
        module = Net()
        fit(module, *callbacks, steps=14, data=loader(num_workers=workers, persistent_workers=bool(workers)))
        seen.append(module.seen)
    assert len(seen[0]) == 14  # into the second order of twelve batches
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("given", [[0, 2], ["0", 2]])
def test_numbers_name_layers_of_a_sequential(given: list[object]) -> None:
    """A command line makes numbers of such names, whatever quotes stand around them."""
    assert build_config("Adapters", {"target_modules": given}, "default").target_modules == {"0", "2"}
    assert build_config("Adapters", {"target_modules": given[1]}, "default").target_modules == "2"


class Compiled(Net):
    """A module that compiles its model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.compile(self.model, backend="eager")


def compiled(init: str) -> Net:
    module = Compiled()
    fit(module, adapters(init, config={"rank_pattern": {"second": 2}}), steps=6).save_checkpoint("last.ckpt")
    return module


@pytest.mark.parametrize("init", ["default", "pissa", "eva"])
def test_adapters_of_a_compiled_model_load_and_export_under_the_names_of_the_model(init: str) -> None:
    module = compiled(init)
    expected = outputs(module, "mlp")
    for other in (load_adapters(Net(), "last.ckpt"), load_from_checkpoint(Net, "last.ckpt")):
        assert torch.equal(outputs(other, "mlp"), expected)
    assert torch.equal(outputs(load_adapters(Compiled(), "last.ckpt"), "mlp"), expected)
    inner = module.model._orig_mod
    export_adapter("last.ckpt", Path("lora"), form="lora")
    exported = peft.PeftModel.from_pretrained(Net().model, "lora").base_model.model
    exported.norm.load_state_dict(inner.norm.state_dict())
    torch.testing.assert_close(outputs(exported, "mlp"), outputs(inner, "mlp"), rtol=0, atol=1e-5)


def test_another_base_is_refused_for_adapters_of_a_compiled_model() -> None:
    compiled("pissa")
    other = Net()
    other.model.first.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="first"):
        load_adapters(other, "last.ckpt")


@pytest.mark.parametrize("bare", [False, True])
def test_many_other_weights_share_a_mark_within_the_model_and_one_beside_it(
    bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_stable.peft._beside._MOST", 1)
    module = Net()
    fit(module, adapters("pissa"), steps=2).save_checkpoint("last.ckpt")
    other = Net()
    other.model.norm.weight.data += 0.5
    with pytest.raises(ValueError, match="one of the weights beside the adapted layers"):
        load_adapters(other.model if bare else other, "last.ckpt")
    other = Net()
    other.head.weight.data += 0.5  # no part of the model
    if bare:
        expected = outputs(module.model, "mlp")
        assert torch.equal(outputs(load_adapters(other.model, "last.ckpt"), "mlp"), expected)
    else:
        with pytest.raises(ValueError, match="one of the weights beside the adapted layers"):
            load_adapters(other, "last.ckpt")


def test_the_mark_of_a_weight_is_the_same_wherever_it_lies_in_memory() -> None:
    whole = torch.randn(241)
    part = whole[1:].view(20, 12)
    assert fingerprint(part) == fingerprint(part.clone())
    changed = part.clone()
    changed[7, 7] += 1e-3
    assert fingerprint(changed) != fingerprint(part)
    module = Net()
    module.model.first.weight = nn.Parameter(whole[1:].view(20, 12))
    fit(module, adapters("pissa"), steps=1)


class Attention(LightningModule):
    """A module with attention of torch, whose parameters peft makes anew whenever they are listed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["attention"](x, x, x)[0]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)


@pytest.mark.parametrize("on_end", [False, True])
def test_adapters_of_attention_merge(on_end: bool) -> None:
    module, before = Attention(), Attention()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, 16, generator=generator)
    callback = adapters("default", config={"r": 2, "target_modules": ["attention"]}, merge_on_end=on_end)
    fit(module, callback, steps=4, data=DataLoader(x, batch_size=2))
    module.eval()
    before.eval()
    with torch.no_grad():
        if not on_end:
            trained = module(x)
            merge_adapters(module)
            torch.testing.assert_close(module(x), trained, rtol=0, atol=1e-6)
        assert type(module.model["attention"]) is nn.MultiheadAttention
        assert not torch.equal(module(x), before(x))
