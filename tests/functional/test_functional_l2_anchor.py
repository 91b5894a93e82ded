"""The pull to an anchor against automatic differentiation of the penalty."""

import pytest
import torch
from torch import Tensor

from lightning_stable.functional.l2_anchor import add_anchor_gradient, anchor_penalty

SHAPES = [(3, 4), (5,), (), (0, 2)]


def make(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_gradient_of_the_penalty(weighted: bool) -> None:
    weights = [weight.requires_grad_() for weight in make(0)]
    anchors, before = make(1), make(2)
    importance = [value.square() for value in make(3)] if weighted else None
    terms = [(weight - anchor) ** 2 for weight, anchor in zip(weights, anchors, strict=True)]
    if importance is not None:
        terms = [term * value for term, value in zip(terms, importance, strict=True)]
    penalty = 0.7 * sum(term.sum() for term in terms)
    expected = [g + old for g, old in zip(torch.autograd.grad(penalty, weights), before, strict=True)]
    gradients = [gradient.clone() for gradient in before]
    add_anchor_gradient(gradients, weights, anchors, 0.7, importance)
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(anchor_penalty(weights, anchors, 0.7, importance), penalty.detach())


def test_nothing_is_added_at_the_anchor_or_with_a_weight_of_zero() -> None:
    weights, anchors, gradients = make(0), make(1), make(2)
    add_anchor_gradient(gradients, weights, [weight.clone() for weight in weights], 5.0)
    add_anchor_gradient(gradients, weights, anchors, 0.0)
    add_anchor_gradient([], [], [], 1.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients, make(2), strict=True))
    assert float(anchor_penalty(weights, weights, 5.0)) == 0.0


def test_a_large_weight_does_not_lose_a_small_distance() -> None:
    weight, anchor = torch.tensor([1.0 + 2**-20]), torch.tensor([1.0])
    gradient = torch.zeros(1)
    add_anchor_gradient([gradient], [weight], [anchor], 1e6)
    assert float(gradient) == 2e6 * 2**-20


def test_half_precision_with_an_importance_in_full() -> None:
    weights, anchors, gradients = (make(seed, torch.bfloat16) for seed in range(3))
    importance = [value.square() for value in make(3, torch.float32)]
    add_anchor_gradient(gradients, weights, anchors, 0.5, importance)
    for gradient, old, weight, anchor, value in zip(gradients, make(2), weights, anchors, importance, strict=True):
        exact = old.to(torch.bfloat16).float() + value * (weight - anchor).float()
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, exact.to(torch.bfloat16))
    assert anchor_penalty(weights, anchors, 0.5, importance).dtype == torch.float32


def test_refuses_shapes_that_differ() -> None:
    weights = make(0)
    with pytest.raises(ValueError, match="The anchors have the shapes"):
        add_anchor_gradient(make(1), weights, weights[1:], 1.0)
    with pytest.raises(ValueError, match="The importances have the shapes"):
        anchor_penalty(weights, weights, 1.0, list(reversed(weights)))
