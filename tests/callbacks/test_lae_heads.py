"""LAE: heads of several kinds, adapters of a library, and heads that cannot be joined."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ensembles import held_out, quick, validated
from lightning.pytorch import LightningModule
from tasks import STEPS, fit_tasks
from torch import Tensor, nn

from lightning_stable._glue.quiet import is_quiet
from lightning_stable.testing.harness import Net, fit


class Wrapped(nn.Module):
    """A head that holds its logits in an object or a mapping."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.kind(logits=self.linear(x), other=1)


class WrappedNet(Net):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.head = Wrapped(kind)

    def forward(self, x: Tensor) -> Tensor:
        output = self.head(self.body(x))
        logits = output["logits"] if isinstance(output, dict) else output.logits
        return logits.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_a_head_that_holds_logits(kind: type) -> None:
    inner, outer = quick(logits="head.linear"), quick(logits="head")
    losses = [validated([lae], fit_tasks([lae], module=WrappedNet(kind)).module) for lae in (inner, outer)]
    assert losses[0] == losses[1]


class Twice(Net):
    """Runs its head twice a step."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 2 * super().loss((-batch[0], batch[1]))


def test_a_head_that_runs_twice() -> None:
    lae = quick()
    run = fit_tasks([lae], module=Twice())
    online, slow = copy.deepcopy(run.module).eval(), copy.deepcopy(run.module).eval()
    slow.load_state_dict({**slow.state_dict(), **lae.offline})
    total = 0.0
    with torch.no_grad():
        for index in range(2):
            x, y = held_out().batch(index)
            for sign, weight in ((1, 1), (-1, 2)):
                surest = [one.head(one.body(sign * x)).log_softmax(-1) for one in (online, slow)]
                z = surest[0].maximum(surest[1])
                predicted = (z[:, ::2].sum(1, keepdim=True) - z[:, 1::2].sum(1, keepdim=True)) / 3**0.5
                total += weight * float(nn.functional.mse_loss(predicted, y)) / 2
    assert validated([lae], run.module) == pytest.approx(total, rel=1e-5)


class Lora(LightningModule):
    """A classifier of PEFT's adapters over a small body, which was not trained before."""

    def __init__(self, targets: list[str]) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(1)
        self.model = nn.ModuleDict({"body": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, self.model)
        if "head" not in targets:
            self.model["head"].requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model["head"](torch.tanh(self.model["body"](x)))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), (batch[1][:, 0] > 0).long())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("targets", [["body"], ["body", "head"]])
def test_adapters_of_peft(targets: list[str]) -> None:
    lae = quick(parameters=["*lora_*"])
    module = Lora(targets)
    start = copy.deepcopy(module.state_dict())
    fit([lae], module=module, max_steps=STEPS)
    assert lae.state_dict()["head"] == "model.head"
    assert len(lae.offline) == 2 * len(targets)
    assert not torch.equal(
        module.state_dict()["model.body.lora_A.default.weight"], start["model.body.lora_A.default.weight"]
    )
    assert torch.equal(module.model["body"].base_layer.weight, start["model.body.base_layer.weight"])
    slow = copy.deepcopy(module)
    slow.load_state_dict({**module.state_dict(), **lae.offline})
    loss = 0.0
    with torch.no_grad():
        for index in range(2):
            x, y = held_out().batch(index)
            surest = module(x).softmax(-1).maximum(slow(x).softmax(-1))
            loss += float(nn.functional.cross_entropy(surest.log(), (y[:, 0] > 0).long())) / 2
    assert validated([lae], module) == pytest.approx(loss, rel=1e-5)


class OneOutput(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)


class RunsAgain(Net):
    """Runs its head once more when nothing is quiet."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(1 if is_quiet(self) else 2):
            self.head(self.body(batch[0]))


class RunsLess(Net):
    """Runs its head once less when nothing is quiet."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2 if is_quiet(self) else 1):
            self.head(self.body(batch[0]))


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (Net, {"parameters": ["*lora_*"]}, r"LAE: the pattern '\*lora_\*' in parameters matches no parameter of Net"),
        (Net, {"logits": "tail"}, "logits='tail' of LAE is no submodule of Net"),
        (OneOutput, {}, r"LAE: the output of 'head' is Tensor of shape \(8, 1\), not logits of several classes"),
        (RunsAgain, {}, r"LAE: 'head' puts out logits of shape \(8, 3\) with the live weights, and nothing"),
        (RunsLess, {}, r"LAE: 'head' ran 2 times with the offline copy and 1 times with the live weights"),
    ],
)
def test_refuses_modules(module: type[Net], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit([quick(**settings)], module=module(), validation=held_out(), max_steps=12)
