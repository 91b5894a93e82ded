"""What Adapters refuses: one error each that names the value, before anything of the module is changed."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapter_refusals import CONFIG, refused
from adapter_runs import Net, Samples, adapters, fit, loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_stable.peft import load_adapters, load_from_checkpoint, merge_adapters
from lightning_stable.peft.adapters import Adapters


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init": "pisa"}, "init='pisa' is unknown"),
        ({"save": "all"}, "save='all' is unknown"),
        ({"init_mode": "test"}, "init_mode='test' is unknown"),
        ({"init_batches": 0}, "init_batches=0"),
        ({"seed": -1}, "seed=-1"),
        ({"trainable": "head.*"}, "one text"),
        ({"init": "pisa"}, "Did you mean 'pissa'"),
        ({"config": {**CONFIG, "r": "8"}}, "config has r='8', a str"),
        ({"config": 3}, "config is a int, not a PEFT config"),
        ({"config": {**CONFIG, "rank": 4}}, "'rank', which is no field of LoraConfig"),
        ({"config": {**CONFIG, "peft_type": "LORRA"}}, "peft_type='LORRA' is unknown. Did you mean 'LORA'"),
        ({"config": {"r": 4, "target_modules": "a", "layers_pattern": "b"}}, "layers_pattern"),
        ({"config": {**CONFIG, "inference_mode": True}}, "inference_mode=True"),
        (
            {"config": {**CONFIG, "peft_type": "LOHA"}, "init": "pissa"},
            "init='pissa' starts adapters of peft_type 'LORA'",
        ),
        (
            {"config": {**CONFIG, "peft_type": "LORA"}, "init": "svfit"},
            "init='svfit' starts adapters of peft_type 'SVFIT'",
        ),
        ({"config": {**CONFIG, "init_lora_weights": "olora"}, "init": "pissa"}, "init_lora_weights='olora' beside"),
        ({"config": {**CONFIG, "init_lora_weights": False}}, "init_lora_weights=False beside"),
        ({"config": {**CONFIG, "lora_bias": True}, "init": "pissa"}, "'lora_bias', a variant of LoRA"),
        ({"init": "pissa", "init_options": {"iteration": 3}}, "'iteration', which is no setting of init='pissa'"),
        ({"init": "olora", "init_options": {"iterations": 3}}, "It has none"),
        ({"init": "pissa", "init_options": {"iterations": -3}}, "iterations=-3"),
        (
            {"init": "olora", "init_options": {"quantize_residual": "nf4"}},
            "'quantize_residual', which is no setting",
        ),
        ({"init": "lora_ga", "init_options": {"direction": "up"}}, "direction='up' is unknown"),
        ({"init": "lora_ga", "init_options": {"exact": "yes"}}, "exact='yes' is not true or false"),
        ({"init": "eva", "init_options": {"rho": 0.5}}, "rho=0.5"),
        ({"init": "eva", "init_options": {"tau": 1.5}}, "tau=1.5"),
        ({"init": "corda", "init_options": {"method": "x"}}, "method='x' is unknown"),
        ({"init_loss": "nowhere.loss"}, "init_loss='nowhere.loss' cannot be imported"),
        ({"init_loss": "math.pi"}, "is no function but a float"),
    ],
)
def test_settings_are_refused_at_construction(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Adapters(**{"config": CONFIG, **settings})


def test_layers_that_are_not_there_are_listed() -> None:
    told = refused("q_proj", Adapters({"r": 4, "target_modules": ["q_proj"]}))
    assert "first (Linear), norm (BatchNorm1d), second (Linear)" in told
    refused("no submodule 'net'; its submodules are 'model', 'head'", Adapters(CONFIG, model="net"))
    refused("trainable has 'heads.*'", Adapters(CONFIG, trainable=["heads.*"]))


@pytest.mark.parametrize(("init", "most"), [("pissa", 12), ("olora", 12), ("lora_ga", 6), ("mica", 12)])
def test_a_rank_above_the_smaller_side_is_refused(init: str, most: int) -> None:
    told = refused(f"layer 'first' has a rank of r={most + 1}", Adapters({**CONFIG, "r": most + 1}, init=init))
    assert f"up to {most} " in told


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_rank_above_the_smaller_side_is_refused_for_plain_adapters_too(init: str) -> None:
    told = refused("layer 'first' has a rank of r=13", Adapters({**CONFIG, "r": 13}, init=init))
    assert "up to 12 " in told


def test_an_odd_rank_is_refused_where_it_is_split() -> None:
    refused("Choose an even r", Adapters({**CONFIG, "r": 3}, init="orthogonal"))


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "eva", "olora", "orthogonal", "corda"])
def test_a_layer_of_another_kind_is_refused_and_not_started_otherwise(init: str) -> None:
    module = Net()
    module.model.first = nn.Sequential(nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 20, 12), nn.Flatten())
    config = {"r": 1 if init != "orthogonal" else 2, "target_modules": ["first.1", "second"]}
    refused(
        f"init={init!r} is made for Linear and Conv1D, and layer 'first.1' is a Conv1d",
        Adapters(config, init=init),
        module,
    )


class Tied(Net):
    """A language model whose embedding is its head."""

    def __init__(self) -> None:
        super().__init__("llama")
        self.model.lm_head.weight = self.model.model.embed_tokens.weight


def test_tied_weights_are_refused_where_the_base_is_shifted_or_merged() -> None:
    config = {"r": 4, "target_modules": ["lm_head"]}
    for init in ("pissa", "olora", "lora_ga", "corda"):
        told = refused("is tied", Adapters(config, init=init), Tied())
        assert "model.model.embed_tokens.weight" in told
        assert "model.lm_head.weight" in told
    module = Tied()
    fit(module, Adapters(config, init="eva"), steps=1)
    with pytest.raises(ValueError, match=r"layer 'lm_head' is tied"):
        merge_adapters(module)


def test_a_layer_in_two_places_is_refused() -> None:
    module = Net()
    module.model.again = module.model.first
    refused("is the same module as 'first' and 'again'", Adapters(CONFIG), module)


def test_weights_without_values_are_refused() -> None:
    module = Net()
    module.model.first.to("meta")
    with pytest.raises(NotImplementedError, match="meta") as caught:  # the host cannot tidy such a module up
        fit(module, Adapters(CONFIG), steps=1)
    assert "layer 'first' is on the meta device" in str(caught.value.__context__)
    lazy = Net()
    lazy.model.first = nn.LazyLinear(20)
    with pytest.raises(ValueError, match=r"'first.weight' gets its shape from the first batch"):
        fit(lazy, Adapters(CONFIG), steps=1)


def test_quantized_weights_are_refused_where_the_base_is_shifted() -> None:
    module = Net()
    module.model.first.weight = nn.Parameter(module.model.first.weight.detach().to(torch.int8), requires_grad=False)
    refused("which is quantized or no plain tensor", Adapters(CONFIG, init="pissa"), module)
    marked = Net()
    marked.model.first.weight.quant_state = object()
    refused("which is quantized or no plain tensor", Adapters(CONFIG, init="lora_ga"), marked)


def test_dropout_in_front_of_a_part_of_the_weights_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 with init='pissa'"):
        fit(Net(), Adapters({**CONFIG, "lora_dropout": 0.1}, init="pissa"), steps=1)
    fit(Net(), Adapters({**CONFIG, "lora_dropout": 0.1}, init="eva"), steps=1, data=loader(size=64))


@pytest.mark.parametrize("init", ["lora_ga", "eva", "corda"])
def test_training_data_that_cannot_be_read_beforehand_is_refused(init: str) -> None:
    class Nothing(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.left = iter(Samples("mlp"))

        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> Any:
            return next(self.left)

    refused("gave no batch", adapters(init), data=DataLoader(Nothing(), batch_size=4))
    refused("gives each batch once", adapters(init), data=DataLoader(Once(), batch_size=4))
    refused("the run has none", adapters(init), limit_train_batches=0)


def test_a_training_step_without_a_loss_is_refused() -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None

    class Detached(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx).detach()

    class Manual(Net):
        automatic_optimization = False

    class Needs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.optimizers()[3]

    for init in ("lora_ga", "eva"):
        refused("Skips.training_step returned no loss for batch 0", adapters(init), Skips())
        refused("Manual steps its optimizers itself", adapters(init), Manual())
        refused("init_loss='package.module.function'", adapters(init), Needs())
    refused("does not depend on the layers", adapters("lora_ga"), Detached())


def test_layers_that_batches_do_not_reach_and_values_that_are_not_finite_are_refused() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.model.idle = nn.Linear(12, 12)

    class Broken(Samples):
        def __getitem__(self, index: int) -> Any:
            return self.x[index] / 0.0, self.y[index]

    config = {"target_modules": ["first", "idle"]}
    refused("layer 'idle' over 3 batches is 0", adapters("lora_ga", config=config), Idle())
    refused("layer 'idle' did not run in 3 batches", adapters("eva", config=config, init_options={"tau": 1.0}), Idle())
    refused("layer 'idle' did not run in 3 batches", adapters("corda", config=config), Idle())
    data = DataLoader(Broken("mlp"), batch_size=4)
    refused("not finite", adapters("lora_ga"), data=data)
    refused("not finite", adapters("eva"), data=data)


def test_inputs_that_are_no_longer_the_same_are_refused() -> None:
    class Parts(Net):
        """Two layers have the same input for the first batch, and each its own later."""

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"first": nn.Linear(12, 4), "second": nn.Linear(12, 4)})
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            other = x if self.calls == 0 else x * 2
            self.calls += 1
            return (self.model["first"](x) + self.model["second"](other)).sum(1, keepdim=True)

    refused("Set init_options={'share_inputs': False}", adapters("eva"), Parts())
    fit(Parts(), adapters("eva", init_options={"share_inputs": False}), steps=1)


class Encoder(Net):
    """A layer that reads the weights of its parts itself, in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.unsqueeze(1))[:, 0]


@pytest.mark.parametrize("init", ["default", "gaussian", "mica", "pissa", "lora_ga", "eva"])
def test_layers_whose_parent_reads_their_weight_are_refused(init: str) -> None:
    for name, words in (("out_proj", "MultiheadAttention"), ("linear1", "fast path")):
        refused(words, Adapters({"r": 4, "target_modules": [name]}, init=init), Encoder())


def test_an_optimizer_without_the_adapters_is_refused_and_one_with_some_is_warned_of() -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    class Some(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for name, p in self.named_parameters() if "lora_B" in name], lr=0.1)

    with pytest.raises(ValueError, match="no optimizer holds a parameter of the adapters"):
        fit(Early(), adapters("default"), steps=1)
    with pytest.warns(UserWarning, match=r"2 of 4 parameters of the adapters are in no optimizer.*first.lora_A"):
        fit(Some(), adapters("default"), steps=1)


def test_a_start_that_fails_leaves_the_module_plain() -> None:
    module = Net()
    nn.init.zeros_(module.model.second.weight)
    refused("second", adapters("pissa"), module)
    assert type(module.model.first) is nn.Linear
    fit(module, adapters("default"), steps=1)


class Masked(Samples):
    def __init__(self, counts: int) -> None:
        super().__init__("llama")
        self.counts = counts

    def __getitem__(self, index: int) -> Any:
        mask = torch.tensor([1] * self.counts + [0] * (8 - self.counts))
        return {"input_ids": self.x[index], "labels": self.x[index], "attention_mask": mask}


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_batches_of_padding_alone_are_refused(init: str) -> None:
    callback = adapters(init, "llama")
    refused(f"init={init!r} has no rows", callback, Net("llama"), data=DataLoader(Masked(0), batch_size=4))


def test_arguments_in_the_wrong_places_are_told() -> None:
    with pytest.raises(TypeError, match="module is the class Net"):
        load_adapters(Net, "last.ckpt")
    with pytest.raises(TypeError, match="The class comes first"):
        load_from_checkpoint("last.ckpt", Net)
