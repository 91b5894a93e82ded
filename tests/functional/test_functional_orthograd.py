"""Gradients orthogonal to their weights: by hand, in float64, against pytorch_optimizer's wrapper, and at zero."""

import pytest
import torch
from pytorch_optimizer import OrthoGrad

from lightning_stable.functional.orthograd import orthogonal_gradients

SIZES = ((3, 4), (5,), (2,), (2, 3, 2))


def tensors(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype) for size in SIZES]


def projected(gradient, weight):
    """One tensor in float64: the component across the weight, as long as the gradient was."""
    g, w = gradient.double().flatten(), weight.double().flatten()
    across = g - (w @ g) / (w @ w) * w
    return (across * g.norm() / across.norm()).reshape(gradient.shape)


def test_by_hand():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])]
    weights = [torch.tensor([2.0, 0.0]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])]
    kept = gradients[0]
    assert orthogonal_gradients(gradients, weights) is None
    assert kept is gradients[0]
    # Across (2, 0) lies (0, 4), made as long as (3, 4); across the first axis of four (0, 1, 1, 1), made as long as 2.
    assert gradients[0].tolist() == pytest.approx([0.0, 5.0], abs=1e-6)
    side = 2 / 3**0.5
    assert gradients[1].flatten().tolist() == pytest.approx([0.0, side, side, side], abs=1e-6)
    assert weights[0].tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_each_tensor_is_projected_on_its_own(dtype, tolerance, scale):
    gradients, weights = tensors(1, scale, dtype), tensors(2, dtype=dtype)
    expected = [projected(g, w) for g, w in zip(gradients, weights, strict=True)]
    kept = [weight.clone() for weight in weights]
    orthogonal_gradients(gradients, weights)
    for found, wanted, weight, before in zip(gradients, expected, weights, kept, strict=True):
        assert found.dtype == dtype
        assert torch.equal(weight, before)
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def test_the_result_is_orthogonal_and_as_long_as_before():
    gradients, weights = tensors(1, dtype=torch.float64), tensors(2, dtype=torch.float64)
    norms = [gradient.norm().item() for gradient in gradients]
    orthogonal_gradients(gradients, weights)
    for gradient, weight, norm in zip(gradients, weights, norms, strict=True):
        assert (gradient * weight).sum().item() == pytest.approx(0.0, abs=1e-12)
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-12)


def test_an_orthogonal_gradient_stays():
    gradients = [torch.tensor([0.0, 0.3, -0.4])]
    orthogonal_gradients(gradients, [torch.tensor([5.0, 0.0, 0.0])])
    assert gradients[0].tolist() == pytest.approx([0.0, 0.3, -0.4], abs=1e-7)


def test_it_is_what_pytorch_optimizers_wrapper_gives_the_optimizer():
    ours, theirs = tensors(2), [torch.nn.Parameter(weight) for weight in tensors(2)]
    wrapper = OrthoGrad(torch.optim.SGD(theirs, lr=0.1))
    for seed in range(5):
        gradients = tensors(10 + seed)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        wrapper.step()
        orthogonal_gradients(gradients, ours)
        for weight, gradient, parameter in zip(ours, gradients, theirs, strict=True):
            weight -= 0.1 * gradient
            assert torch.allclose(weight, parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_weights_leave_the_gradient_and_a_zero_gradient_stays_zero(dtype):
    gradients, weights = tensors(1, dtype=dtype), [torch.zeros(size, dtype=dtype) for size in SIZES]
    orthogonal_gradients(gradients, weights)
    for found, wanted in zip(gradients, tensors(1, dtype=dtype), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    nothing = [torch.zeros(size, dtype=dtype) for size in SIZES]
    orthogonal_gradients(nothing, tensors(1, dtype=dtype))
    assert not any(bool(value.any()) for value in nothing)
    orthogonal_gradients(nothing, [torch.zeros(size, dtype=dtype) for size in SIZES])
    assert not any(bool(value.any()) for value in nothing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(), (1,), (4,)])
def test_a_gradient_along_its_weight_gives_a_number_no_longer_than_it(dtype, size):
    # What is left across is rounding; it must not become nan or longer than the gradient was.
    gradients = [torch.full(size, 0.7, dtype=dtype)]
    orthogonal_gradients(gradients, [torch.full(size, 0.3, dtype=dtype)])
    assert gradients[0].isfinite().all()
    assert gradients[0].double().norm() <= 0.7 * (4 if size == (4,) else 1) ** 0.5 * 1.01
