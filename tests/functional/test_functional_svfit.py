"""SVFit's factors against torch's singular value decomposition."""

import pytest
import torch
from torch import Tensor

from lightning_stable.functional.svfit import svfit_factors, top_singular

SHAPES = [(12, 12), (20, 7), (7, 20), (1, 5)]


def random(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_the_largest_singular_triplets(shape: tuple[int, int]) -> None:
    weight = random(shape)
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    for rank in range(1, min(shape) + 1):
        left, values, right, residual = svfit_factors(weight, rank)
        torch.testing.assert_close(values, sigma[:rank])
        # Vectors have no sign of their own, their outer products have.
        torch.testing.assert_close((left * values) @ right, (u[:, :rank] * sigma[:rank]) @ vt[:rank])
        torch.testing.assert_close(residual, (u[:, rank:] * sigma[rank:]) @ vt[rank:])
        torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
        torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))


def test_the_randomised_search_finds_them_and_hangs_on_its_seed_alone() -> None:
    weight = random((60, 40))
    _, sigma, _ = torch.linalg.svd(weight)
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = svfit_factors(weight, 6, iterations=8)
    torch.manual_seed(2)
    second = svfit_factors(weight, 6, iterations=8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.set_rng_state(before)
    torch.testing.assert_close(first.values, sigma[:6], rtol=1e-3, atol=0.0)
    torch.testing.assert_close((first.left * first.values) @ first.right + first.residual, weight)
    third = svfit_factors(weight, 6, iterations=8, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first.left, third.left)


def test_values_that_are_equal_still_give_the_weight() -> None:
    weight = 2.0 * torch.eye(6)
    left, values, right, residual = svfit_factors(weight, 3)
    torch.testing.assert_close(values, torch.full((3,), 2.0))
    torch.testing.assert_close((left * values) @ right + residual, weight)
    zero = svfit_factors(torch.zeros(4, 3), 2)
    assert all(bool(part.isfinite().all()) for part in zero)
    assert zero.values.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_decomposed_in_single(dtype: torch.dtype, tolerance: float) -> None:
    weight = random((24, 16)).to(dtype)
    left, values, right, residual = svfit_factors(weight, 4)
    assert {left.dtype, values.dtype, right.dtype} == {torch.float32}
    assert residual.dtype == dtype
    rest = residual.float() + (left * values) @ right - weight.float()
    assert float(rest.norm() / weight.float().norm()) < tolerance


@pytest.mark.parametrize(
    ("weight", "rank", "settings", "words"),
    [
        (torch.ones(3, 2), 3, {}, "above 2, the smaller side"),
        (torch.ones(2, 3, 3), 1, {}, "not \\(out, in\\)"),
        (torch.ones(3, 2, dtype=torch.int8), 1, {}, "int8"),
        (torch.tensor([[1.0, torch.inf]]), 1, {}, "not finite"),
        (torch.ones(3, 2), 1, {"iterations": -1}, "iterations=-1"),
        (torch.ones(3, 2), 1, {"oversampling": -1}, "oversampling=-1"),
    ],
)
def test_what_does_not_fit_is_refused(weight: Tensor, rank: int, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        top_singular(weight, rank, **settings)
