"""LoLDU's factors against elimination in plain Python, scipy's decomposition and torch's."""

import pytest
import scipy.linalg
import torch
from oracles.loldu_twin import ldu, residual_form, uniform_bounds
from torch import Tensor

from lightning_stable.functional._diagonal import check_probe, diagonal_delta, diagonal_step, probe_factors
from lightning_stable.functional.loldu import CHANGING_INITS, INITS, initial_diagonal, leading_ldu, loldu_factors

SHAPES = [(6, 6), (9, 5), (5, 9), (1, 4), (4, 1)]


def random(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_those_of_elimination_in_plain_python(shape: tuple[int, int]) -> None:
    weight, rank = random(shape), min(*shape, 3)
    order, lower, diagonal, upper = ldu(weight.tolist())
    left = torch.zeros(shape[0], rank, dtype=torch.float64)
    for place, row in enumerate(order):
        left[row] = torch.tensor(lower[place][:rank], dtype=torch.float64)
    found = leading_ldu(weight, rank)
    torch.testing.assert_close(found.left, left)
    torch.testing.assert_close(found.diagonal, torch.tensor(diagonal[:rank], dtype=torch.float64))
    torch.testing.assert_close(found.right, torch.tensor(upper[:rank], dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_panel_of_columns_gives_the_factors_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    weight = random(shape, seed=1)
    permutation, lower, upper = (torch.from_numpy(part) for part in scipy.linalg.lu(weight.numpy()))
    p, low, up = torch.linalg.lu(weight)
    for rank in range(1, min(shape) + 1):
        found = leading_ldu(weight, rank)
        for left, rows in ((permutation @ lower, upper), (p @ low, up)):
            torch.testing.assert_close(found.left, left[:, :rank])
            torch.testing.assert_close(found.diagonal.unsqueeze(1) * found.right, rows[:rank])
    torch.testing.assert_close(found.left * found.diagonal @ found.right, weight)


def test_the_permuted_left_factor_is_kept_and_no_square_matrix() -> None:
    found = leading_ldu(random((300, 20)), 4)
    assert [tuple(part.shape) for part in found] == [(300, 4), (4,), (4, 20)]
    assert all(part.untyped_storage().nbytes() <= 300 * 4 * 8 for part in (found.left, found.right))


def test_a_pivot_of_zero_leaves_its_row_and_the_product_is_the_leading_block() -> None:
    # The second column is twice the first: after one step of elimination it is 0.
    weight = torch.tensor([[2.0, 4.0, 1.0], [1.0, 2.0, 5.0], [4.0, 8.0, 3.0]], dtype=torch.float64)
    found = leading_ldu(weight, 2)
    _, _, diagonal, upper = ldu(weight.tolist())
    assert all(bool(part.isfinite().all()) for part in found)
    assert diagonal[1] == 1.0
    torch.testing.assert_close(found.diagonal, torch.tensor(diagonal[:2], dtype=torch.float64))
    torch.testing.assert_close(found.right, torch.tensor(upper[:2], dtype=torch.float64))
    p, low, up = torch.linalg.lu(weight)
    torch.testing.assert_close((found.left * found.diagonal) @ found.right, (p @ low)[:, :2] @ up[:2])


def test_a_component_without_a_pivot_or_a_row_adds_nothing() -> None:
    weight = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 5.0, 7.0]))
    left, diagonal, right, residual, _ = loldu_factors(weight, 2, alpha=2.0)
    assert diagonal.tolist() == [3.0, 1.0]
    assert right[1].abs().max() == 0.0
    torch.testing.assert_close(residual, torch.zeros(3, 3))
    vector = diagonal.clone().requires_grad_()
    ((left * vector) @ right).square().sum().backward()
    assert vector.grad is not None
    assert vector.grad[0] != 0.0
    assert vector.grad[1] == 0.0


def test_a_pivot_that_is_only_rounding_counts_as_zero() -> None:
    weight = torch.tensor([[1.0, 3.0, 1.0], [1 / 3, 1.0, 2.0], [0.1, 0.3, 4.0]])
    right = leading_ldu(weight, 2).right
    assert float(right.abs().max()) < 10.0


@pytest.mark.parametrize("init", INITS)
def test_where_the_diagonal_starts(init: str) -> None:
    diagonal = torch.tensor([3.0, -1.0, 0.5, 5.5])
    z, start = initial_diagonal(diagonal, init, torch.Generator().manual_seed(3))
    assert torch.equal(start, diagonal if init in ("lu", *CHANGING_INITS) else z)
    assert torch.equal(z, start) == (init not in CHANGING_INITS)
    assert z.data_ptr() != start.data_ptr()
    many, _ = initial_diagonal(diagonal.repeat(5000), init, torch.Generator().manual_seed(3))
    mean, spread = float(diagonal.mean()), float(diagonal.repeat(5000).std())
    low, high = uniform_bounds(diagonal.tolist())
    expected = {
        "lu": (mean, spread),
        "uniform": (0.0, (high - low) / 12**0.5),
        "normal": (mean, spread),
        "constant": (mean, 0.0),
        "s_uniform": (0.0, 2 / 12**0.5),
        "s_normal": (0.0, 1.0),
        "ones": (1.0, 0.0),
        "zeros": (0.0, 0.0),
    }
    assert float(many.mean()) == pytest.approx(expected[init][0], abs=0.05)
    assert float(many.std()) == pytest.approx(expected[init][1], abs=0.05)
    if init == "uniform":
        assert low <= float(many.min()) <= float(many.max()) <= high


def test_random_starts_follow_their_generator_and_a_single_component_has_no_spread() -> None:
    diagonal = torch.tensor([2.0])
    before = torch.get_rng_state()
    assert float(initial_diagonal(diagonal, "normal")[0]) == 2.0
    draws = [
        float(initial_diagonal(diagonal, "s_normal", torch.Generator().manual_seed(seed))[0]) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_weight_is_residual_plus_block_and_both_forms_are_one(shape: tuple[int, int], init: str) -> None:
    weight, rank, alpha = random(shape, seed=2), 3, 5.0
    factors = loldu_factors(weight, rank, alpha=alpha, init=init)
    block = alpha / rank * (factors.left * factors.start) @ factors.right
    torch.testing.assert_close(factors.residual + block, weight)

    z = factors.diagonal + random((1, rank), seed=5)[0]
    papers = residual_form(weight.tolist(), rank, alpha / rank, factors.start.tolist(), z.tolist())
    step = diagonal_step(z, factors.start, alpha / rank, alpha / rank)
    ours = weight + diagonal_delta(factors.left, step, factors.right)
    torch.testing.assert_close(ours, torch.tensor(papers, dtype=torch.float64))
    starts = weight + diagonal_delta(
        factors.left, diagonal_step(factors.diagonal, factors.start, alpha / rank, alpha / rank), factors.right
    )
    assert torch.equal(starts, weight) == (init not in CHANGING_INITS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_decomposed_in_single(dtype: torch.dtype, tolerance: float) -> None:
    weight = random((24, 16)).to(dtype)
    left, diagonal, right, residual, _ = loldu_factors(weight, 4, alpha=4.0)
    assert {left.dtype, diagonal.dtype, right.dtype} == {torch.float32}
    assert residual.dtype == dtype
    rest = residual.float() + (left * diagonal) @ right - weight.float()
    assert float(rest.norm() / weight.float().norm()) < tolerance


def test_a_scale_that_moves_counts_from_where_it_was() -> None:
    vector, start = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0])
    step = diagonal_step(vector, start, torch.tensor([4.0]), torch.tensor([3.0]))
    assert step.tolist() == [4 * 2.0 - 3 * 1.0, 4 * 3.0 - 3 * 3.0]


def test_the_probe_tells_other_factors_and_does_not_mind_signs() -> None:
    left, right = random((30, 2)), random((2, 20), seed=1)
    probe = probe_factors(left, right)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert check_probe(probe, left * signs, signs.unsqueeze(1) * right)
    assert check_probe(probe, 3 * left, right), "sizes are the diagonal's matter"
    assert check_probe(probe, left.bfloat16(), right.bfloat16())
    assert not check_probe(probe, left.flip(1), right)
    assert not check_probe(probe, left, random((2, 20), seed=7))
    assert not check_probe(probe, left[:, :1], right[:1])


@pytest.mark.parametrize(
    ("weight", "rank", "settings", "words"),
    [
        (torch.ones(3, 2), 3, {}, "above 2, the smaller side"),
        (torch.ones(3, 2), 0, {}, "rank=0"),
        (torch.ones(3), 1, {}, "not \\(out, in\\)"),
        (torch.ones(3, 2, dtype=torch.int8), 1, {}, "int8"),
        (torch.tensor([[1.0, torch.nan]]), 1, {}, "not finite"),
        (torch.ones(3, 2), 1, {"alpha": 0.0}, "scaling=0.0"),
        (torch.ones(3, 2), 1, {"init": "svd"}, "init='svd'"),
    ],
)
def test_what_does_not_fit_is_refused(weight: Tensor, rank: int, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loldu_factors(weight, rank, **{"alpha": 1.0, **settings})
