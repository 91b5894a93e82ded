"""Sharpness-aware minimisation: numbers worked by hand, the flat twin, invariances, and what must not become nan."""

import math

import pytest
import torch
from oracles import sam_twin

from lightning_stable.functional.sam import gsam_gradient, looksam_component, looksam_gradient, sam_perturbation

SIZES = ((3, 4), (5,), (1,), (), (2, 3, 2))


def tensors(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype) for size in SIZES]


def flat(values):
    return sam_twin.flat(dict(enumerate(values)))


def finite(values):
    return all(bool(value.isfinite().all()) for value in values)


# ----------------------------------------------------------------------------- perturbation


def test_perturbation_by_hand():
    weights = [torch.tensor([7.0]), torch.tensor([[-2.0]])]
    gradients = [torch.tensor([3.0]), torch.tensor([[-4.0]])]
    # One norm over both tensors, 5.
    found = sam_perturbation(weights, gradients, 0.5)
    assert [value.tolist() for value in found] == [[pytest.approx(0.3)], [[pytest.approx(-0.4)]]]


def test_adaptive_perturbation_by_hand():
    weights = [torch.tensor([2.0]), torch.tensor([[-1.0]])]
    gradients = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    # |w| g is (6, 4), of norm sqrt(52); w^2 g is (12, 4).
    found = sam_perturbation(weights, gradients, 0.1, adaptive=True)
    assert found[0].item() == pytest.approx(0.1 * 12 / math.sqrt(52), rel=1e-6)
    assert found[1].item() == pytest.approx(0.1 * 4 / math.sqrt(52), rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [0.05, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_perturbation_is_the_twins(rho, adaptive, dtype, tolerance):
    weights, gradients = tensors(1, dtype=dtype), tensors(2, 0.01, dtype)
    found = sam_perturbation(weights, gradients, rho, adaptive)
    assert [(value.shape, value.dtype) for value in found] == [(value.shape, dtype) for value in weights]
    expected = sam_twin.perturbation(flat(weights), flat(gradients), rho, adaptive)
    assert torch.allclose(flat(found), expected, rtol=tolerance, atol=tolerance * rho)


@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation_changes_nothing_it_is_given(adaptive):
    weights, gradients = tensors(1), tensors(2)
    kept = [value.clone() for value in (*weights, *gradients)]
    sam_perturbation(weights, gradients, 0.5, adaptive)
    assert all(torch.equal(a, b) for a, b in zip((*weights, *gradients), kept, strict=True))


def test_perturbation_has_the_length_rho_whatever_the_gradient_is():
    for scale in (1e-6, 1.0, 1e6):
        found = sam_perturbation(tensors(1), tensors(2, scale), 0.7)
        assert sam_twin.length(flat(found)) == pytest.approx(0.7, rel=1e-5)


def test_adaptive_perturbation_follows_a_rescaling_of_the_weights():
    # With w -> c w the gradient of the same function is g / c, and the perturbation c e.
    weights, gradients = tensors(1, dtype=torch.float64), tensors(2, dtype=torch.float64)
    scales = [10.0 ** (index - 2) for index in range(len(SIZES))]
    scaled = [scale * weight for scale, weight in zip(scales, weights, strict=True)]
    divided = [gradient / scale for scale, gradient in zip(scales, gradients, strict=True)]
    expected = sam_perturbation(weights, gradients, 0.5, adaptive=True)
    found = sam_perturbation(scaled, divided, 0.5, adaptive=True)
    for value, plain, scale in zip(found, expected, scales, strict=True):
        assert torch.allclose(value, scale * plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_gradients_and_zero_weights_perturb_nothing(dtype, adaptive):
    nothing = [torch.zeros(size, dtype=dtype) for size in SIZES]
    assert not flat(sam_perturbation(tensors(1, dtype=dtype), nothing, 0.5, adaptive)).any()
    if adaptive:
        assert not flat(sam_perturbation(nothing, tensors(1, dtype=dtype), 0.5, adaptive=True)).any()


@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation_of_one_parameter_does_not_leave_the_others_behind(adaptive):
    # The norm is one over all tensors: a second tensor makes the perturbation of the first one smaller.
    weights, gradients = [torch.ones(1), torch.ones(1)], [torch.ones(1), torch.full((1,), 3.0)]
    alone = sam_perturbation(weights[:1], gradients[:1], 0.5, adaptive)[0].item()
    together = sam_perturbation(weights, gradients, 0.5, adaptive)[0].item()
    assert alone == pytest.approx(0.5)
    assert together == pytest.approx(0.5 / math.sqrt(10))


# ----------------------------------------------------------------------------- GSAM


def test_gsam_by_hand():
    gradients, clean = [torch.tensor([2.0]), torch.tensor([0.0])], [torch.tensor([1.0]), torch.tensor([3.0])]
    kept = gradients[1]
    assert gsam_gradient(gradients, clean, 0.5) is None
    # Orthogonal to (2, 0) the clean gradient is (0, 3), over both tensors as one vector.
    assert [value.item() for value in gradients] == pytest.approx([2.0, -1.5])
    assert [value.item() for value in clean] == [1.0, 3.0]
    assert kept is gradients[1]


@pytest.mark.parametrize("alpha", [0.1, 0.4, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gsam_is_the_twins(alpha, dtype, tolerance):
    gradients, clean = tensors(3, dtype=dtype), tensors(4, dtype=dtype)
    sharp, plain = flat(gradients), flat(clean)
    gsam_gradient(gradients, clean, alpha)
    expected = sharp - alpha * sam_twin.perpendicular(plain, to=sharp)
    assert torch.allclose(flat(gradients), expected, rtol=tolerance, atol=tolerance)
    assert all(value.dtype == dtype for value in gradients)


def test_gsam_keeps_the_part_along_the_perturbed_gradient():
    gradients, clean = tensors(3, dtype=torch.float64), tensors(4, dtype=torch.float64)
    sharp, plain = flat(gradients), flat(clean)
    gsam_gradient(gradients, clean, 0.4)
    found = flat(gradients)
    assert sam_twin.dot(found, sharp) == pytest.approx(sam_twin.dot(sharp, sharp), rel=1e-12)
    # What is taken off lowers the clean loss's surrogate gap: it points against the clean gradient.
    assert sam_twin.dot(found - sharp, plain) < 0


def test_gsam_without_alpha_or_with_a_parallel_gradient_changes_nothing():
    for clean, alpha in ((tensors(4), 0.0), ([3 * value for value in tensors(3)], 0.7)):
        gradients = tensors(3)
        gsam_gradient(gradients, clean, alpha)
        assert torch.allclose(flat(gradients), flat(tensors(3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gsam_of_zero_gradients_is_finite(dtype):
    nothing = [torch.zeros(size, dtype=dtype) for size in SIZES]
    for gradients, clean in (
        (nothing, tensors(1, dtype=dtype)),
        (tensors(1, dtype=dtype), nothing),
        (nothing, nothing),
    ):
        changed = [value.clone() for value in gradients]
        gsam_gradient(changed, clean, 0.4)
        assert finite(changed)


# ----------------------------------------------------------------------------- LookSAM


def test_looksam_by_hand():
    sharp, clean = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([2.0]), torch.tensor([0.0])]
    component = looksam_component(sharp, clean)
    assert [value.item() for value in component] == pytest.approx([0.0, 1.0])
    gradients = [torch.tensor([-3.0]), torch.tensor([4.0])]
    kept = gradients[0]
    assert looksam_gradient(gradients, component, 0.7) is None
    assert [value.item() for value in gradients] == pytest.approx([-3.0, 4 + 0.7 * 5])
    assert kept is gradients[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_looksam_is_the_twins(dtype, tolerance):
    sharp, clean, gradients = (tensors(seed, dtype=dtype) for seed in (3, 4, 5))
    kept = [value.clone() for value in (*sharp, *clean)]
    component = looksam_component(sharp, clean)
    assert all(torch.equal(a, b) for a, b in zip((*sharp, *clean), kept, strict=True))
    across = sam_twin.perpendicular(flat(sharp), to=flat(clean))
    unit = across / sam_twin.length(across)
    assert torch.allclose(flat(component), unit, rtol=tolerance, atol=tolerance)
    assert [value.shape for value in component] == [value.shape for value in sharp]
    now = flat(gradients)
    looksam_gradient(gradients, component, 0.7)
    assert torch.allclose(flat(gradients), now + 0.7 * sam_twin.length(now) * unit, rtol=tolerance, atol=tolerance)


def test_looksam_component_has_length_one_and_is_orthogonal_to_the_clean_gradient():
    for scale in (1e-4, 1.0, 1e4):
        clean = tensors(4, scale, torch.float64)
        component = flat(looksam_component(tensors(3, scale, torch.float64), clean))
        assert sam_twin.length(component) == pytest.approx(1.0, rel=1e-6)
        assert sam_twin.dot(component, flat(clean)) == pytest.approx(0.0, abs=1e-9 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_looksam_of_zero_and_of_parallel_gradients_is_finite_and_not_long(dtype):
    nothing = [torch.zeros(size, dtype=dtype) for size in SIZES]
    some = tensors(1, dtype=dtype)
    for sharp, clean in ((nothing, some), (some, nothing), (nothing, nothing), (some, some)):
        component = looksam_component(sharp, clean)
        assert finite(component)
        assert sam_twin.length(flat(component)) < 1.1
        gradients = [value.clone() for value in some]
        looksam_gradient(gradients, component, 0.7)
        assert finite(gradients)
    gradients = [value.clone() for value in nothing]
    looksam_gradient(gradients, looksam_component(some, tensors(2, dtype=dtype)), 0.7)
    assert not flat(gradients).any()
