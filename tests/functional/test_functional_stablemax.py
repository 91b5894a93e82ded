"""StableMax and its cross-entropy against the formula, and against softmax where that one fails."""

import math

import pytest
import torch
from torch import nn

from lightning_stable.functional.stablemax import StableMaxCrossEntropyLoss, log_stablemax, stablemax


def by_formula(row):
    sizes = [x + 1 if x >= 0 else 1 / (1 - x) for x in row]
    return [size / sum(sizes) for size in sizes]


def logits(shape=(5, 7), scale=4.0, dtype=torch.float64, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_probabilities_are_the_formulas():
    scores = logits()
    expected = torch.tensor([by_formula(row) for row in scores.tolist()], dtype=torch.float64)
    assert torch.allclose(stablemax(scores), expected, rtol=1e-12)
    assert torch.allclose(log_stablemax(scores), expected.log(), rtol=1e-12)
    assert torch.allclose(stablemax(scores.T, dim=0), expected.T, rtol=1e-12)


def test_known_values():
    assert stablemax(torch.tensor([0.0, 2.0, -1.0])).tolist() == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_computed_in_float32(dtype):
    scores = logits(dtype=torch.float32).to(dtype)
    assert torch.equal(stablemax(scores), stablemax(scores.float()))
    assert log_stablemax(scores).dtype == torch.float32


def test_the_derivative_is_exact_and_1_at_0():
    scores = logits().requires_grad_()
    assert torch.autograd.gradcheck(log_stablemax, (scores,))
    zero = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    # d log p_0 / d x_0 = d log s(x_0) (1 - p_0) = 1 - 1/2
    log_stablemax(zero)[0, 0].backward()
    assert zero.grad.tolist() == [[0.5, -0.5]]


def test_a_far_ahead_sample_goes_on_teaching():
    target = torch.tensor([0])
    ahead = torch.tensor([[60.0, -60.0, 0.0]])
    for loss, teaches in ((nn.CrossEntropyLoss(), False), (StableMaxCrossEntropyLoss(), True)):
        scores = ahead.clone().requires_grad_()
        value = loss(scores, target)
        value.backward()
        assert (float(value.detach()) > 0) is teaches
        assert bool((scores.grad[0, 0] != 0).item()) is teaches


def test_masked_classes_have_no_probability_and_no_gradient():
    scores = torch.tensor([[1.0, -math.inf, -2.0]], requires_grad=True)
    assert stablemax(scores)[0, 1] == 0
    StableMaxCrossEntropyLoss()(scores, torch.tensor([0])).backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, 1] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", [{}, {"ignore_index": 2}, {"label_smoothing": 0.1}, {"weight": True}])
def test_the_loss_is_the_negative_log_probability(reduction, settings):
    scores, target = logits((6, 4)), torch.tensor([0, 2, 1, 3, 2, 0])
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64) if "weight" in settings else None
    options = {**settings, "weight": weight, "reduction": reduction}
    found = StableMaxCrossEntropyLoss(**options)(scores, target)

    smoothing, ignored = settings.get("label_smoothing", 0.0), settings.get("ignore_index", -100)
    weights = [1.0] * 4 if weight is None else weight.tolist()
    losses, total = [], 0.0
    for row, label in zip(scores.tolist(), target.tolist(), strict=True):
        logs = [weights[c] * math.log(p) for c, p in enumerate(by_formula(row))]
        used = label != ignored
        losses.append(used * -((1 - smoothing) * logs[label] + smoothing / 4 * sum(logs)))
        total += used * weights[label]
    expected = {"none": losses, "sum": sum(losses), "mean": sum(losses) / total}[reduction]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_the_loss_takes_probabilities_and_more_dimensions():
    scores = logits((3, 4, 5))
    shares = torch.softmax(logits((3, 4, 5), seed=1), dim=1)
    found = StableMaxCrossEntropyLoss(reduction="none")(scores, shares)
    assert torch.allclose(found, -(shares * log_stablemax(scores, dim=1)).sum(1))
    classes = torch.zeros(3, 5, dtype=torch.int64)
    found = StableMaxCrossEntropyLoss(reduction="none")(scores, classes)
    assert torch.allclose(found, -log_stablemax(scores, dim=1)[:, 0])


def test_it_is_a_module():
    assert not StableMaxCrossEntropyLoss().state_dict()
    loss = StableMaxCrossEntropyLoss(weight=torch.ones(3)).double()
    assert loss.state_dict()["weight"].dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "avg"}, r"reduction='avg' is unknown. Choose 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5 is not in \[0, 1\]"),
    ],
)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        StableMaxCrossEntropyLoss(**settings)


def test_class_weights_in_half_precision():
    """Weights follow the precision in which the logarithms are, as a module in half precision has them."""
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    weight = torch.tensor([1.0, 2.0, 3.0])
    loss = StableMaxCrossEntropyLoss(weight=weight).bfloat16()
    expected = StableMaxCrossEntropyLoss(weight=weight)(logits.bfloat16().float(), target)
    assert torch.allclose(loss(logits.bfloat16(), target), expected)
