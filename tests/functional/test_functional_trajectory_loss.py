"""The loss along the trajectory: numbers by hand, explicit sums in float64, torch's own divergence, extreme logits."""

import math

import pytest
import torch
from oracles import trajectory_twin as twin
from torch import nn

from lightning_stable.functional.trajectory_loss import (
    group,
    soften,
    softened_divergence,
    top_k_groups,
    trajectory_loss,
)

SHAPES = ((4, 3), (1, 2), (5, 7, 10), (3, 2, 4, 6))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def logits(shape, seed, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


# ----------------------------------------------------------------------------- soften


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soften_is_the_log_of_explicit_probabilities(dtype, temperature):
    given = logits((4, 5), 1, dtype=dtype)
    found = soften(given, temperature)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The numbers as they were given, not rounded again on the way.
    assert torch.allclose(found.double(), twin.probabilities(given, temperature).log(), rtol=1e-5, atol=1e-6)


def test_soften_by_hand():
    found = soften(torch.tensor([[0.0, 2 * math.log(3)]]), 2.0)
    assert found.exp().tolist() == [pytest.approx([0.25, 0.75])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_soften_of_extreme_logits_is_finite(dtype):
    found = soften(torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, 0.0]], dtype=dtype), 1.0)
    assert found.isfinite().all()
    assert found.exp().sum(-1).tolist() == pytest.approx([1.0] * 3)


def test_soften_of_a_half_has_no_half_step_between():
    # 10000 / 0.1 is no float16 any more.
    assert soften(torch.tensor([1e4, 0.0], dtype=torch.float16), 0.1).isfinite().all()


# ----------------------------------------------------------------------------- divergence


def test_divergence_by_hand():
    past, now = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    past, now = past.clamp_min(1e-38).log(), now.log()
    assert softened_divergence(past, now).tolist() == pytest.approx([0.5 * math.log(4 / 3), math.log(4)], rel=1e-5)
    # The other way round it is another number: the past is what the expectation is over.
    other = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert softened_divergence(now[:1], past[:1]).tolist() == pytest.approx([other])


@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_is_the_twins_and_torchs(shape):
    past, now = soften(logits(shape, 1), 1.0), soften(logits(shape, 2), 1.0)
    found = softened_divergence(past, now)
    assert found.shape == shape[:1]
    by_hand = twin.divergence(past.exp(), now.exp()).reshape(shape[0], -1).mean(1)
    assert torch.allclose(found, by_hand, rtol=1e-9, atol=1e-12)
    torchs = nn.functional.kl_div(now, past, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(found, torchs.reshape(shape[0], -1).mean(1), rtol=1e-9, atol=1e-12)


def test_the_dims_between_are_a_mean_for_each_sample():
    past, now = logits((2, 3, 4), 1), logits((2, 3, 4), 2)
    found = trajectory_loss(past, now, 2.0)
    for sample in range(2):
        each = trajectory_loss(past[sample], now[sample], 2.0)
        assert found[sample].item() == pytest.approx(each.mean().item(), rel=1e-9)


# ----------------------------------------------------------------------------- loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.float16, 2e-5)])
def test_loss_is_the_twins(shape, temperature, dtype, tolerance):
    past, now = logits(shape, 1, dtype=dtype), logits(shape, 2, dtype=dtype)
    found = trajectory_loss(past, now, temperature)
    assert found.shape == shape[:1]
    assert torch.allclose(found.double(), twin.per_sample(past, now, temperature), rtol=tolerance, atol=tolerance)


def test_loss_by_hand():
    # Softened at 2: (1/2, 1/2) and (1/4, 3/4); times 2^2.
    past, now = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2 * math.log(3)]])
    assert trajectory_loss(past, now, 2.0).tolist() == pytest.approx([4 * 0.5 * math.log(4 / 3)], rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_gradient_is_the_temperature_times_the_difference_of_probabilities(temperature):
    past, now = logits((4, 5), 1), logits((4, 5), 2).requires_grad_()
    trajectory_loss(past, now, temperature).sum().backward()
    expected = temperature * (twin.probabilities(now, temperature) - twin.probabilities(past, temperature))
    assert torch.allclose(now.grad, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_logits_or_logits_shifted_by_a_constant_cost_nothing(dtype):
    past = logits((4, 5), 1, dtype=dtype)
    for now in (past.clone().requires_grad_(), (past + 3).requires_grad_()):
        found = trajectory_loss(past, now, 5.0)
        found.sum().backward()
        assert found.abs().max() < 1e-5
        assert now.grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_extreme_logits_give_neither_nan_nor_infinity(dtype, temperature):
    past = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    now = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4], [1e4, -1e4, 0.0], [1e4, -1e4, 0.0]], dtype=dtype)
    now.requires_grad_()
    found = trajectory_loss(past, now, temperature)
    found.sum().backward()
    assert found.isfinite().all()
    assert now.grad.isfinite().all()
    # All of the past on the class that now has e^(-2e4 / T): T^2 (2e4 / T). The logits of a half are whole at 1e4.
    given = 2 * float(now.detach()[0, 1])
    assert found[0].item() == pytest.approx(temperature * given, rel=1e-5)
    assert found[2].item() == pytest.approx(0.0, abs=1e-6)


# ----------------------------------------------------------------------------- groups


def test_groups_by_hand():
    log_probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]).log()
    grouped, indices = top_k_groups(log_probs, 2)
    assert indices.tolist() == [[1, 3], [0, 2]]
    assert grouped.exp().tolist() == [pytest.approx([0.4, 0.3, 0.3]), pytest.approx([0.7, 0.15, 0.15])]
    now = torch.tensor([[0.25, 0.05, 0.1, 0.6], [0.2, 0.3, 0.4, 0.1]]).log()
    assert group(now, indices).exp().tolist() == [pytest.approx([0.05, 0.6, 0.35]), pytest.approx([0.2, 0.4, 0.4])]


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 10), (2, 3, 4, 5)])
def test_groups_are_the_twins(shape, k):
    past, now = soften(logits(shape, 1), 2.0), soften(logits(shape, 2), 2.0)
    grouped, indices = top_k_groups(past, k)
    assert grouped.shape == (*shape[:-1], k + 1)
    assert indices.shape == (*shape[:-1], k)
    assert torch.equal(indices, past.argsort(-1, descending=True)[..., :k])
    for log_probs, found in ((past, grouped), (now, group(now, indices))):
        assert torch.allclose(found.exp(), twin.lumped(log_probs.exp(), indices), rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.exp().sum(-1), torch.ones(shape[:-1], dtype=torch.float64))
    assert torch.equal(group(past, indices), grouped)


def test_lumping_classes_never_shows_a_larger_divergence():
    past, now = soften(logits((50, 8), 1), 2.0), soften(logits((50, 8), 2), 2.0)
    last = softened_divergence(past, now)
    for k in (6, 4, 2, 1):
        grouped, indices = top_k_groups(past, k)
        found = softened_divergence(grouped, group(now, indices))
        assert (found >= -1e-12).all()
        assert (found <= last + 1e-12).all()
        last = found


def test_the_divergence_of_seven_groups_of_eight_classes_is_the_whole_one():
    # With one class left the lump is that class.
    past, now = soften(logits((5, 8), 1), 2.0), soften(logits((5, 8), 2), 2.0)
    grouped, indices = top_k_groups(past, 7)
    assert torch.allclose(softened_divergence(grouped, group(now, indices)), softened_divergence(past, now))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_extreme_logits_are_finite_with_their_gradient(dtype):
    given = torch.tensor([[1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4]], dtype=dtype)
    now = torch.tensor([[-1e4, 1e4, 1e4, 0.0], [1e4, -1e4, -1e4, -1e4]], dtype=dtype).requires_grad_()
    grouped, indices = top_k_groups(soften(given, 1.0), 2)
    found = softened_divergence(grouped, group(soften(now, 1.0), indices))
    found.sum().backward()
    assert grouped.isfinite().all()
    assert found.isfinite().all()
    assert now.grad.isfinite().all()


def test_masked_classes_count_for_nothing():
    """A class at minus infinity on both sides has no difference; value and gradient are those without it."""
    masked = torch.tensor([[1.0, float("-inf"), 2.0]], requires_grad=True)
    past = torch.tensor([[0.5, float("-inf"), 0.1]])
    plain = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found, expected = trajectory_loss(past, masked, 2.0), trajectory_loss(past[:, ::2], plain, 2.0)
    assert torch.allclose(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert torch.allclose(masked.grad, torch.tensor([[plain.grad[0, 0], 0.0, plain.grad[0, 1]]]))
    grouped, indices = top_k_groups(soften(masked.detach(), 1.0), 2)
    log_probs = soften(masked, 1.0)
    softened_divergence(grouped, group(log_probs, indices)).sum().backward()
    assert bool(masked.grad.isfinite().all())
