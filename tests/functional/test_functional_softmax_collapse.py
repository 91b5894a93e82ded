"""Which samples' softmax has collapsed, against the loss and gradient that torch then gives."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_stable.functional.softmax_collapse import softmax_collapse

# The gap of two logits at which the smaller one's exponential is half of the last digit of 1.
EDGES = {
    torch.float64: 53 * math.log(2),
    torch.float32: 24 * math.log(2),
    torch.float16: 11 * math.log(2),
    torch.bfloat16: 8 * math.log(2),
}


@pytest.mark.parametrize("dtype", EDGES)
def test_two_classes_collapse_where_the_precision_ends(dtype):
    edge = EDGES[dtype]
    scores = torch.tensor([[edge * share, 0.0] for share in (0.9, 1.1)], dtype=torch.float64)
    assert softmax_collapse(scores, dtype).tolist() == [False, True]


def test_a_collapsed_sample_has_no_loss_and_no_gradient():
    generator = torch.Generator().manual_seed(0)
    scores = (12 * torch.randn(400, 5, generator=generator)).requires_grad_()
    losses = cross_entropy(scores, scores.argmax(1), reduction="none")
    losses.sum().backward()
    collapsed = softmax_collapse(scores)
    assert 0 < int(collapsed.sum()) < 400
    assert torch.equal(collapsed, losses == 0)
    # What is left in the others' classes is below the last digit of anything it is added to.
    top = scores.grad.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    assert torch.equal(collapsed, top == 0)


def test_many_small_classes_hold_it_up():
    few, many = torch.zeros(2), torch.zeros(50_000)
    few[0] = many[0] = 17.0
    assert softmax_collapse(few)
    assert not softmax_collapse(many)


def test_two_equal_logits_never_collapse():
    assert not softmax_collapse(torch.tensor([500.0, 500.0, 0.0]))
    assert softmax_collapse(torch.tensor([500.0, 450.0, 0.0]))


def test_shapes_and_precisions():
    scores = torch.randn(2, 3, 4)
    assert softmax_collapse(scores).shape == (2, 3)
    assert softmax_collapse(scores.bfloat16()).dtype == torch.bool
    wide = torch.tensor([[7.0, 0.0]], dtype=torch.float32)
    assert not softmax_collapse(wide)
    assert softmax_collapse(wide, torch.bfloat16)


def test_autocast_changes_nothing():
    scores = torch.tensor([[7.0, 0.0], [2.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert softmax_collapse(scores, torch.bfloat16).tolist() == [True, False]
        assert softmax_collapse(scores).tolist() == [False, False]


@pytest.mark.parametrize(
    ("scores", "dtype", "message"),
    [
        (torch.zeros(2, 2), torch.int32, r"dtype=torch.int32 is not a floating-point dtype"),
        (torch.zeros(2, 2), "float32", r"dtype='float32' is not a floating-point dtype"),
        (torch.zeros(2, 1), torch.float32, r"Logits of shape \(2, 1\) have no two classes"),
        (torch.zeros(()), torch.float32, r"Logits of shape \(\) have no two classes"),
    ],
)
def test_bad_input_is_told(scores, dtype, message):
    with pytest.raises(ValueError, match=message):
        softmax_collapse(scores, dtype)
