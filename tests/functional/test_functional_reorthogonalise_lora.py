"""The new form of LoRA's factors against the decomposition of their product, and what becomes of averages."""

import pytest
import torch
from torch import Tensor

from lightning_stable.functional.reorthogonalise_lora import reorthogonalise, turn_average, turn_squares

CASES = [(10, 7, 3), (7, 10, 3), (5, 5, 5), (4, 9, 1)]


def factors(out: int, inner: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    return a, torch.randn(out, rank, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, rank)


@pytest.mark.parametrize(("out", "inner", "rank"), CASES)
def test_the_new_factors_are_those_of_the_product(out: int, inner: int, rank: int) -> None:
    a, b = factors(out, inner, rank)
    u, sigma, vt = torch.linalg.svd(b @ a, full_matrices=False)
    new = reorthogonalise(a, b)
    torch.testing.assert_close(new.b @ new.a, b @ a)
    torch.testing.assert_close(new.a @ new.a.T, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(new.b.T @ new.b, torch.diag(sigma[:rank] ** 2))
    signs = (new.a * vt[:rank]).sum(1, keepdim=True).sign()
    torch.testing.assert_close(new.a, signs * vt[:rank])
    torch.testing.assert_close(new.b, u[:, :rank] * sigma[:rank] * signs.T)
    assert bool((new.a.gather(1, new.a.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_second_time_changes_nothing() -> None:
    first = reorthogonalise(*factors(10, 7, 3))
    second = reorthogonalise(first.a, first.b)
    torch.testing.assert_close(second.a, first.a)
    torch.testing.assert_close(second.b, first.b)
    torch.testing.assert_close(second.turn_a, torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0.0)
    torch.testing.assert_close(second.turn_b, torch.eye(3, dtype=torch.float64), atol=1e-8, rtol=0.0)


@pytest.mark.parametrize(("out", "inner", "rank"), CASES)
def test_gradients_in_the_new_coordinates_are_what_autograd_gives_there(out: int, inner: int, rank: int) -> None:
    a, b = factors(out, inner, rank)
    target = torch.randn(out, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        (torch.tanh(leaves[1] @ leaves[0]) - target).square().sum().backward()
        return leaves[0].grad, leaves[1].grad

    old, new = gradients(a, b), reorthogonalise(a, b)
    there = gradients(new.a, new.b)
    torch.testing.assert_close(turn_average(old[0], new.turn_a, of_a=True), there[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(turn_average(old[1], new.turn_b, of_a=False), there[1], rtol=1e-6, atol=1e-6)


def test_squares_are_exact_where_components_only_change_places_and_sizes() -> None:
    # Orthogonal already, in the wrong order and of other sizes: the change scales, flips and reorders.
    a = torch.diag(torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64))
    b = torch.diag(torch.tensor([1.0, 5.0, 4.0], dtype=torch.float64))
    new = reorthogonalise(a, b)
    gradient = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for of_a, turn in ((True, new.turn_a), (False, new.turn_b)):
        turned = turn_average(gradient, turn, of_a=of_a)
        torch.testing.assert_close(turn_squares(gradient.square(), turn, of_a=of_a), turned.square())


def test_squares_are_those_of_uncorrelated_gradients_and_never_negative() -> None:
    a, b = factors(6, 8, 2)
    new = reorthogonalise(a, b)
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(20000, 6, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0])
    seen = torch.stack([turn_average(sample, new.turn_b, of_a=False) for sample in samples]).square().mean(0)
    squares = turn_squares(samples.square().mean(0), new.turn_b, of_a=False)
    torch.testing.assert_close(squares, seen, rtol=0.05, atol=0.0)
    assert bool((turn_squares(torch.zeros(2, 8), new.turn_a, of_a=True) == 0).all())


@pytest.mark.parametrize("zero", ["a", "b"])
def test_a_factor_of_zeros_keeps_the_product_and_stays_finite(zero: str) -> None:
    a, b = factors(6, 8, 2)
    a, b = (a * 0, b) if zero == "a" else (a, b * 0)
    new = reorthogonalise(a, b)
    assert all(bool(part.isfinite().all()) for part in new)
    assert bool((new.b == 0).all())
    torch.testing.assert_close(new.a @ new.a.T, torch.eye(2, dtype=torch.float64))
    if zero == "b":
        # What A spans is kept, so that B goes on learning there.
        torch.testing.assert_close(new.a.T @ new.a, torch.linalg.pinv(a) @ a)


def test_the_dtype_is_kept_and_the_product_within_its_rounding() -> None:
    a, b = factors(10, 7, 3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        new = reorthogonalise(a.to(dtype), b.to(dtype))
        assert (new.a.dtype, new.b.dtype) == (dtype, dtype)
        product = b.to(dtype).double() @ a.to(dtype).double()
        rest = new.b.double() @ new.a.double() - product
        assert float(rest.norm() / product.norm()) < tolerance


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), "not the factors"),
        (torch.ones(2), torch.ones(4, 2), "not the factors"),
        (torch.ones(3, 2), torch.ones(4, 3), "above 2, the smaller side"),
    ],
)
def test_what_does_not_fit_is_refused(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reorthogonalise(a, b)
