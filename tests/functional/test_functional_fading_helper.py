"""The fading low-rank helper: its phases, its factors against eigenvectors, and layers that have one."""

import copy

import pytest
import torch
from functional.simulated_nets import INT4
from oracles.fading_helper_twin import helper, phases, weight_of
from oracles.simulated_twin import quantized
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_stable.functional.fading_helper import (
    Helper,
    helper_alphas,
    helper_factors,
    helper_matrix,
    helper_ranks,
)
from lightning_stable.functional.quantize import Quantizer
from lightning_stable.functional.simulated import convert, quantized_layers


def made(error, rank, progress):
    left, right = helper_factors(error, rank)
    return Helper(left, right, torch.tensor(helper_alphas(rank, progress), dtype=left.dtype)[: len(right)])


@pytest.mark.parametrize("rank", [1, 2, 5, 32])
def test_the_rank_is_halved_down_to_one(rank):
    assert helper_ranks(rank) == phases(rank)
    assert helper_ranks(32) == [32, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValueError, match=f"helper_rank={rank!r}"):
        helper_ranks(rank)


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_the_weaker_half_fades(rank, progress):
    assert helper_alphas(rank, progress) == pytest.approx([weight_of(i, rank, progress) for i in range(rank)])


def test_at_the_end_of_a_phase_the_weaker_half_is_gone():
    assert helper_alphas(5, 1.0) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert helper_alphas(1, 0.0) == [1.0]
    assert helper_alphas(1, 1.0) == [0.0]
    with pytest.raises(ValueError, match=r"progress=1.5 is not in \[0, 1\]"):
        helper_alphas(4, 1.5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("rank", [1, 3, 4, 20])
def test_the_helper_is_that_of_eigenvectors(shape, rank):
    error = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    found = helper_matrix(made(error, rank, 0.3), error)
    assert found.shape == error.shape
    torch.testing.assert_close(found, helper(error, rank, 0.3))


def test_no_other_matrix_of_the_rank_is_nearer():
    error = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(error)
    rest = (error - helper_matrix(made(error, 3, 0.0), error)).norm()
    torch.testing.assert_close(rest, values[3:].norm())


def test_an_error_that_is_not_finite_has_no_helper():
    error = torch.randn(4, 4)
    error[1, 2] = float("nan")
    left, right = helper_factors(error, 2)
    assert left.shape == (4, 2)
    assert not (left @ right).any()


def test_factors_of_half_precision_are_of_single():
    left, right = helper_factors(torch.randn(4, 6).bfloat16(), 2)
    assert left.dtype is right.dtype is torch.float32


# ----------------------------------------------------------------------------- layers with a helper


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), Conv1D(5, 6), nn.Conv1d(6, 5, 1)], ids=["linear", "transposed", "convolution"]
)
def test_products_see_the_weight_with_its_helper(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        layer.weight.normal_()
    turned = isinstance(layer, Conv1D)
    weight = (layer.weight.t() if turned else layer.weight).detach().clone().reshape(5, 6)
    low = quantized(weight, ("int4", "row"))
    both = low + helper(weight - low, 2, 0.5).float()
    convert(layer, weights=INT4)
    state = quantized_layers(layer)[""]
    torch.testing.assert_close(
        (layer.weight_error().t() if turned else layer.weight_error()).reshape(5, 6), weight - low
    )
    state.helper = made(layer.weight_error(), 2, 0.5)
    x = torch.randn(7, 6, 1 if isinstance(layer, nn.Conv1d) else 6)
    x = x if isinstance(layer, nn.Conv1d) else x[..., 0]
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y.reshape(7, 5), x.reshape(7, 6) @ both.t() + layer.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad.reshape(7, 6), both.sum(0).expand(7, 6))
    gradient = layer.weight.grad.t() if turned else layer.weight.grad
    torch.testing.assert_close(gradient.reshape(5, 6), x.detach().reshape(7, 6).sum(0).expand(5, 6))  # straight through


def test_a_helper_of_full_rank_makes_up_for_all():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    expected = layer(x)
    convert(layer, weights=INT4)
    assert not torch.allclose(layer(x), expected, atol=1e-4)
    state = quantized_layers(layer)[""]
    state.helper = made(layer.weight_error(), 32, 0.0)
    torch.testing.assert_close(layer(x), expected)
    with torch.autocast("cpu", torch.bfloat16):  # where it would not make up for all in bfloat16
        matrix = helper_matrix(state.helper, layer.weight)
    torch.testing.assert_close(matrix, layer.weight_error())
    state.enabled = False
    assert torch.equal(layer(x), expected)


def test_columns_of_outliers_have_no_helper():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    x[1, 4] = 50.0
    convert(layer, weights=INT4, activations=Quantizer("int8", scaling="row"), outlier_threshold=6.0)
    quantized_layers(layer)[""].helper = Helper(torch.ones(5, 1), torch.ones(1, 6), torch.ones(1))
    plain = copy.deepcopy(layer)
    quantized_layers(plain)[""].helper = None
    rest = [0, 1, 2, 3, 5]
    low = quantized(x[:, rest], ("int8", "row"))
    torch.testing.assert_close(layer(x) - plain(x), low.sum(1, keepdim=True).expand(3, 5), rtol=1e-4, atol=1e-4)


def test_observers_are_shown_the_quantized_weight_alone():
    layer, seen = nn.Linear(6, 5), {}
    convert(layer, weights=INT4)
    state = quantized_layers(layer)[""]
    state.observers.append(lambda name, operand, exact, low: seen.update({operand: low}))
    layer(torch.randn(3, 6))
    expected = seen.pop("weights")
    state.helper = made(layer.weight_error(), 2, 0.0)
    layer(torch.randn(3, 6))
    assert torch.equal(seen["weights"], expected)


def test_stochastic_rounding_leaves_a_helper_that_is_the_same_each_time():
    layer = nn.Linear(6, 5)
    convert(layer, weights=Quantizer("int4", scaling="row", rounding="stochastic"), generator=torch.Generator())
    expected = layer.weight_error()
    assert torch.equal(layer.weight_error(), expected)
    convert(layer, weights=INT4)
    assert torch.equal(layer.weight_error(), expected)
    convert(layer, activations=INT4)
    assert not layer.weight_error().any()
