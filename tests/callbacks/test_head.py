"""Where the logits are found: by name, or at the last linear layer that feeds the loss."""

from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_stable.callbacks._head import HeadTap
from lightning_stable.testing.harness import Net


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Tail(nn.Module):
    def forward(self, hidden: Tensor) -> Output:
        return Output(hidden * 2, hidden)


class Heads(LightningModule):
    """Its head runs before a projection that only a metric sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.monitor = nn.Linear(8, 2)
        self.tail = Tail()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).tanh()
        logits = self.head(hidden)
        self.monitor(hidden)
        return self.tail(logits).logits


def loss_and_tap(name: str | None, module: LightningModule | None = None, passes: int = 1) -> tuple[HeadTap, Any]:
    module = Heads() if module is None else module
    tap = HeadTap("Test", name)
    tap.attach(module)
    with tap.recording() as record:
        outputs = [module(torch.randn(4, 6)) for _ in range(passes)]
        loss = sum(output.sum() for output in outputs)
    tap.resolve(record, loss, module)
    return tap, record


def test_finds_the_last_linear_that_feeds_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        tap, record = loss_and_tap(None)
    assert tap.name == "head"
    assert tap.logits(record).shape == (4, 3)
    assert "Test: the logits are the output of 'head'" in caplog.text


def test_hooks_only_the_head_once_it_is_found() -> None:
    module = Heads()
    tap, _ = loss_and_tap(None, module)
    assert [len(part._forward_hooks) for part in (module.body, module.head, module.monitor)] == [0, 1, 0]
    tap.detach()
    assert not module.head._forward_hooks


def test_records_only_while_asked() -> None:
    module = Heads()
    _, record = loss_and_tap("head", module)
    module(torch.randn(4, 6))
    assert len(record) == 1


def test_takes_an_object_with_logits() -> None:
    tap, record = loss_and_tap("tail")
    assert tap.logits(record).shape == (4, 3)


def test_joins_several_calls() -> None:
    tap, record = loss_and_tap("head", passes=3)
    assert tap.logits(record).shape == (12, 3)


class NoLinear(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 2, 1)


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach().requires_grad_()


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("haed", Heads, r"logits='haed' of Test is no submodule of Heads. Candidates: 'body', 'head', 'monitor'"),
        (None, NoLinear, r"NoLinear has none. Name the submodule .* Candidates: 'convolution'"),
        (None, Detached, "no nn.Linear of Detached whose output feeds the loss"),
    ],
)
def test_refuses(name: str | None, module: type[LightningModule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_and_tap(name, module())


def test_refuses_a_head_that_does_not_run_or_gives_no_logits() -> None:
    tap, record = loss_and_tap("unused")
    with pytest.raises(ValueError, match="'unused' did not run in the training step"):
        tap.logits(record)
    tap.name = "tail"
    with pytest.raises(ValueError, match="the output of 'tail' is int, not logits"):
        tap.logits([("tail", 3)])
    with pytest.raises(ValueError, match=r"Tensor of shape \(4,\), not logits"):
        tap.logits([("tail", torch.ones(4))])
