"""What LoRA-GA and EVA start from."""

from typing import Any

import pytest
import torch
from adapter_runs import Net, Samples, adapters, fit, loader
from adapter_starts import AtStart, started
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stable.functional.lora_ga import lora_ga_factors


def test_lora_ga_starts_from_the_mean_gradient_of_the_first_batches() -> None:
    module, start = Net(), AtStart()
    fit(module, adapters("lora_ga"), start, steps=1, data=loader(shuffle=False))
    twin, data = Net().eval(), Samples("mlp")
    losses = [twin.loss((data.x[i : i + 4], data.y[i : i + 4])) for i in (0, 4, 8)]
    weight = twin.model.first.weight
    (gradient,) = torch.autograd.grad(sum(losses) / 3, [weight])
    expected = lora_ga_factors(weight, gradient, 4, 2.0, exact=True)
    a = start.state["model.first.lora_A.default.weight"]
    b = start.state["model.first.lora_B.default.weight"]
    # alpha of 8 and rank 4: only the scaling enters both.
    assert torch.allclose(a.abs(), expected.a.abs(), atol=2e-3)
    assert torch.allclose(b.abs(), expected.b.abs(), atol=2e-3)


def test_train_mode_and_another_loss_change_what_gradients_are_taken() -> None:
    _, evaluated = started("lora_ga")
    _, trained = started("lora_ga", init_mode="train")
    _, other = started("lora_ga", init_loss="test_adapters_starts.absolute_loss")
    name = "model.first.lora_A.default.weight"
    assert not torch.allclose(evaluated.state[name], trained.state[name], atol=1e-4)
    assert not torch.allclose(evaluated.state[name], other.state[name], atol=1e-4)


def absolute_loss(module: Net, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).abs().mean()


def test_eva_gives_ranks_to_layers_that_need_them_and_shares_inputs() -> None:
    module, start = started("eva", config={"r": 6}, init_options={"rho": 2.0})
    ranks = {name: getattr(module.model, name).r["default"] for name in ("first", "second")}
    assert sorted(ranks.values()) == [5, 7]
    for name in ranks:
        assert getattr(module.model, name).scaling["default"] == pytest.approx(8 / 6)
        a = start.state[f"model.{name}.lora_A.default.weight"]
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-5)

    _, shared = started("eva", "llama", init_options={"rho": 1.0})
    _, apart = started("eva", "llama", init_options={"rho": 1.0, "share_inputs": False})
    first = "model.model.layers.0.self_attn.{}_proj.lora_A.default.weight"
    assert torch.equal(shared.state[first.format("q")], shared.state[first.format("k")])
    assert torch.allclose(shared.state[first.format("q")], apart.state[first.format("q")], atol=1e-5)


def test_eva_leaves_a_layer_without_an_adapter_whose_input_explains_little() -> None:
    class Even(Samples):
        """Inputs that vary alike in four directions; those of the next layer vary in more."""

        def __getitem__(self, index: int) -> Any:
            x = torch.zeros(12)
            x[index % 4] = 1.0 - 2.0 * (index // 4 % 2)
            return x, self.y[index]

    module = Net()
    directions = torch.eye(12)[:4]
    module.model.first.weight.data = torch.cat([directions, -directions, torch.zeros(12, 12)])
    module.model.first.bias.data.zero_()
    fit(module, adapters("eva", config={"r": 2}), data=DataLoader(Even("mlp"), batch_size=8))
    adapted = {name: part.r["default"] for name, part in module.model.named_modules() if hasattr(part, "lora_A")}
    assert adapted == {"first": 4}


def test_eva_keeps_the_scaling_of_rslora() -> None:
    module, _ = started("eva", config={"r": 6, "use_rslora": True})
    layers = [module.model.first, module.model.second]
    assert len({layer.r["default"] for layer in layers}) > 1
    assert all(layer.scaling["default"] == pytest.approx(8 / 6**0.5) for layer in layers)


def test_eva_leaves_padding_and_unlabelled_tokens_out() -> None:
    class Padded(Samples):
        """The second half of each row is padding."""

        def __init__(self, filler: int, key: str) -> None:
            super().__init__("llama")
            self.filler, self.key = filler, key

        def __getitem__(self, index: int) -> Any:
            tokens = self.x[index].clone()
            tokens[4:] = self.filler
            mask = torch.tensor([1] * 4 + [0] * 4)
            if self.key == "labels":
                return {"input_ids": tokens, "labels": torch.where(mask == 1, tokens, -100)}
            return {"input_ids": tokens, "labels": tokens, "attention_mask": mask}

    for key in ("labels", "attention_mask"):
        found = []
        for filler in (1, 9):
            module, start = Net("llama"), AtStart()
            data = DataLoader(Padded(filler, key), batch_size=4)
            fit(module, adapters("eva", "llama", init_options={"rho": 1.0}), start, steps=1, data=data)
            found.append(start.state["model.model.layers.0.self_attn.q_proj.lora_A.default.weight"])
        assert torch.equal(*found), key


def test_eva_leaves_padding_out_with_one_label_a_sequence() -> None:
    class Sequences(Samples):
        def __init__(self, filler: int) -> None:
            super().__init__("llama")
            self.filler = filler

        def __getitem__(self, index: int) -> Any:
            tokens = self.x[index].clone()
            tokens[4:] = self.filler
            mask = torch.tensor([1] * 4 + [0] * 4)
            return {"input_ids": tokens, "labels": torch.tensor(index % 2), "attention_mask": mask}

    class Sums(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch["input_ids"]).logits.square().mean()

    found = []
    for filler in (1, 9):
        module, start = Sums("llama"), AtStart()
        data = DataLoader(Sequences(filler), batch_size=4)
        fit(module, adapters("eva", "llama", init_options={"rho": 1.0}), start, steps=1, data=data)
        found.append(start.state["model.model.layers.0.self_attn.q_proj.lora_A.default.weight"])
    assert torch.equal(*found)
