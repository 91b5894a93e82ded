"""Distillation against torch's own divergence, and its sets of classes."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lightning_stable.functional.lwf import distillation_loss


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peer(past: Tensor, now: Tensor, temperature: float) -> Tensor:
    pair = (torch.log_softmax(now / temperature, -1), torch.softmax(past / temperature, -1))
    return temperature**2 * kl_div(*pair, reduction="none").sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_it_is_torchs_divergence(temperature: float) -> None:
    past, now = logits(0, 6, 4), logits(1, 6, 4)
    torch.testing.assert_close(distillation_loss(past, now, temperature), peer(past, now, temperature))
    of_two = distillation_loss(past, now, temperature, [[0, 3]])
    torch.testing.assert_close(of_two, peer(past[:, [0, 3]], now[:, [0, 3]], temperature))
    apart = distillation_loss(past, now, temperature, [[0, 3], [1, 2]])
    torch.testing.assert_close(apart, of_two + peer(past[:, [1, 2]], now[:, [1, 2]], temperature))


def test_its_gradient_is_that_of_the_papers_cross_entropy() -> None:
    past, now = logits(0, 6, 4), logits(1, 6, 4).requires_grad_()
    (ours,) = torch.autograd.grad(distillation_loss(past, now, 2.0).mean(), now)
    (papers,) = torch.autograd.grad(cross_entropy(now / 2.0, torch.softmax(past / 2.0, -1)), now)
    torch.testing.assert_close(ours, 4.0 * papers)


def test_new_classes_are_left_out() -> None:
    past, now = logits(0, 6, 4), logits(1, 6, 7).requires_grad_()
    loss = distillation_loss(past, now, 2.0)
    torch.testing.assert_close(loss, peer(past, now[:, :4], 2.0))
    (gradient,) = torch.autograd.grad(loss.sum(), now)
    assert not gradient[:, 4:].any()
    assert gradient[:, :4].any()


def test_nothing_has_changed_and_one_class_alone() -> None:
    past = logits(0, 6, 4)
    assert float(distillation_loss(past, past, 2.0).abs().max()) < 1e-14
    assert not distillation_loss(past, logits(1, 6, 4), 2.0, [[2]]).any()


def test_positions_are_averaged() -> None:
    past, now = logits(0, 3, 5, 4), logits(1, 3, 5, 4)
    torch.testing.assert_close(distillation_loss(past, now, 2.0), peer(past, now, 2.0).mean(1))


@pytest.mark.parametrize(
    ("past", "groups", "message"),
    [
        ((6, 5), None, "cannot be compared"),
        ((5, 4), None, "cannot be compared"),
        ((6, 3), [[0, 3]], r"Classes \[3\] are not among the 3"),
        ((6, 3), [[-1]], r"Classes \[-1\] are not among the 3"),
    ],
)
def test_refuses_what_does_not_fit(past: tuple[int, int], groups: list[list[int]] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(0, *past), logits(1, 6, 4), 2.0, groups)
