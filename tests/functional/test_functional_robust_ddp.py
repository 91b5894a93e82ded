"""Robust aggregation against slow twins on whole gradients, against closed forms, and against faults of every kind."""

import math

import numpy as np
import pytest
import torch
from oracles.robust_ddp_twin import robust_mean

from lightning_stable.functional._sorting import sort_rows
from lightning_stable.functional.robust_ddp import (
    AGGREGATORS,
    RobustPlan,
    RobustRule,
    aggregate,
    apply_plan,
    check_rule,
    check_workers,
    finite_workers,
    gram_matrix,
    needs_pairs,
    plan_aggregation,
)

VARIANTS = {
    "flag": {},
    "flag, rank 1": {"flag_rank": 1, "flag_iterations": 1},
    "flag, many steps": {"flag_rank": 2, "flag_iterations": 9},
    "median": {},
    "krum": {},
    "krum, 2": {"krum_m": 2},
    "nna": {},
    "nna, median": {"nna_rule": "median"},
    "nna, krum": {"nna_rule": "krum"},
    "nna, geometric median": {"nna_rule": "geometric_median"},
    "trimmed_mean": {},
    "geometric_median": {},
}
FAULTS = {
    "garbage": lambda g: 1e3 * torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(9)),
    "nan": lambda g: torch.where(torch.arange(len(g)) == 3, torch.nan, g),
    "infinity": lambda g: g / 0,
    "flipped": lambda g: -10 * g,
    "huge": lambda g: torch.full_like(g, 1e30),
    "nothing": torch.zeros_like,
}


def _rule(variant, f):
    return RobustRule(variant.partition(",")[0], f, **VARIANTS[variant])


def _gradients(workers, seed=0, length=60, noise=0.4, dtype=torch.float64):
    """Return gradients that agree but for noise, and what they agree in."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(length, generator=generator, dtype=dtype)
    return common + noise * torch.randn(workers, length, generator=generator, dtype=dtype), common


# ------------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize(("workers", "f", "faulty"), [(5, 1, (2,)), (7, 2, (0, 4)), (8, 2, (7,))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_rule_is_its_twin_on_whole_gradients(variant, workers, f, faulty, fault):
    gradients, _ = _gradients(workers, seed=workers)
    for worker in faulty if fault else ():
        gradients[worker] = FAULTS[fault](gradients[worker])
    expected = robust_mean(gradients.numpy(), variant.partition(",")[0], f, **VARIANTS[variant])
    # Where the median is one of the gradients, Weiszfeld's steps come near it by little and little.
    tolerance = 1e-4 if "geometric" in variant else 1e-9
    np.testing.assert_allclose(
        aggregate(gradients, _rule(variant, f)).numpy(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_gradients_give_the_pieces_of_the_aggregate(variant):
    gradients, _ = _gradients(5, length=70)
    rule = _rule(variant, 1)
    pieces = gradients.split([30, 1, 39], dim=1)
    plan = plan_aggregation(sum(gram_matrix(piece, pairs=needs_pairs(rule)) for piece in pieces), rule)
    together = torch.cat([apply_plan(piece, plan) for piece in pieces])
    torch.testing.assert_close(together, aggregate(gradients, rule), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_change_nothing(variant, monkeypatch):
    gradients, _ = _gradients(5)
    whole = aggregate(gradients, _rule(variant, 1))
    monkeypatch.setattr("lightning_stable.functional.robust_ddp._CHUNK", 35)
    torch.testing.assert_close(aggregate(gradients, _rule(variant, 1)), whole, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- robustness


@pytest.mark.parametrize("fault", ["garbage", "nan", "infinity", "flipped", "huge"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_faulty_workers_move_it_no_further_than_right_ones_differ(variant, fault):
    gradients, common = _gradients(7, noise=0.3)
    clean = aggregate(gradients, _rule(variant, 2))
    spread = (gradients - common).norm(dim=1).max()
    for worker in (1, 5):
        gradients[worker] = FAULTS[fault](gradients[worker])
    found = aggregate(gradients, _rule(variant, 2))
    # The flag rule keeps what a fault has in the subspace: at most its share of a gradient's length.
    bound = 2 * spread + (4 / 7 * common.norm() if variant.startswith("flag") else 0)
    assert (found - clean).norm() < bound
    assert torch.dot(found, common) > 0.4 * torch.dot(common, common)
    mean = gradients.mean(0)
    assert not ((mean - clean).norm() < bound and torch.dot(mean, common) > 0), "the mean would have done as well"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_worker_that_is_not_finite_counts_as_if_it_were_not_there(variant):
    gradients, _ = _gradients(7)
    gradients[3, 5] = -math.inf
    rest = torch.cat([gradients[:3], gradients[4:]])
    without = aggregate(rest, _rule(variant, 1))
    torch.testing.assert_close(aggregate(gradients, _rule(variant, 2)), without, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_such_workers_than_tolerated_are_an_error(variant):
    gradients, _ = _gradients(5)
    gradients[1, 0], gradients[4, 7] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of 5 gradients are not finite, which is more than f=1"):
        aggregate(gradients, _rule(variant, 1))


def test_a_gradient_too_long_for_its_square_counts_as_not_finite():
    gradients, _ = _gradients(5)
    gradients[2] *= 1e200
    assert finite_workers(gram_matrix(gradients)) == [0, 1, 3, 4]


# ------------------------------------------------------------------------------------------------------- sorting


@pytest.mark.parametrize("count", [*range(1, 18), 33, 64])
def test_rows_are_sorted_at_each_place(count):
    rows = torch.randn(count, 200, generator=torch.Generator().manual_seed(count)).round(decimals=1)
    rows[0, 0], rows[-1, 1], rows[count // 2, 2] = math.inf, -math.inf, math.nan
    expected = rows.sort(dim=0).values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    assert torch.equal(torch.stack(sort_rows(rows.unbind(0))), expected)


@pytest.mark.parametrize("count", range(2, 11))
def test_zeros_and_ones_in_any_order_are_sorted(count):
    # A network that sorts these sorts everything.
    rows = torch.tensor([[float(number >> bit & 1) for number in range(2**count)] for bit in range(count)])
    assert torch.equal(torch.stack(sort_rows(rows.unbind(0))), rows.sort(dim=0).values)


# ------------------------------------------------------------------------------------------------------- closed forms


def test_distances_of_nearly_equal_gradients_are_not_lost_in_single_precision():
    common = 100 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    # Worker 1 is nearest to the rest, by differences far below what float32 resolves of a squared length.
    gradients = torch.stack([common + shift for shift in (0.0, 0.01, 0.019, 0.03, 0.045)])
    found = aggregate(gradients, RobustRule("krum", 1))
    assert torch.equal(found, gradients[1])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("flag")])
def test_workers_that_agree_are_followed_exactly(variant):
    gradient = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(aggregate(gradient.expand(5, -1), _rule(variant, 1)), gradient)


@pytest.mark.parametrize("variant", ["flag", "flag, rank 1"])
def test_the_flag_rule_follows_workers_that_agree_up_to_length_at_their_median_length(variant):
    direction = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64) / 5
    gradients = torch.stack([length * direction for length in (1.0, 2.0, 4.0, 7.0, 9.0)])
    torch.testing.assert_close(aggregate(gradients, _rule(variant, 1)), 4 * direction)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_gradients_give_zero(variant):
    assert torch.equal(aggregate(torch.zeros(5, 4), _rule(variant, 1)), torch.zeros(4))


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "nna", "geometric_median"])
def test_two_workers_without_faults_are_averaged(aggregator):
    gradients, _ = _gradients(2)
    torch.testing.assert_close(aggregate(gradients, RobustRule(aggregator, 0)), gradients.mean(0))


def test_one_worker_is_followed():
    gradients, _ = _gradients(1)
    for aggregator in set(AGGREGATORS) - {"krum"}:
        torch.testing.assert_close(aggregate(gradients, RobustRule(aggregator, 0)), gradients[0])


def test_rules_by_coordinate_drop_the_right_numbers():
    gradients = torch.tensor([[5.0, -100.0], [1.0, 1.0], [2.0, 2.0], [100.0, 4.0], [3.0, 3.0]])
    assert aggregate(gradients, RobustRule("median", 1)).tolist() == [3.0, 2.0]
    assert aggregate(gradients, RobustRule("trimmed_mean", 1)).tolist() == pytest.approx([10 / 3, 2.0])
    assert aggregate(gradients[:4], RobustRule("median", 1)).tolist() == [3.5, 1.5]


def test_the_geometric_median_of_points_on_a_line_is_the_middle_one():
    gradients = torch.tensor([[0.0], [1.0], [2.0], [50.0], [1e6]], dtype=torch.float64)
    torch.testing.assert_close(aggregate(gradients, RobustRule("geometric_median", 2)), gradients[2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_precisions_are_kept(variant, dtype):
    gradients = _gradients(5)[0].to(dtype)
    found = aggregate(gradients, _rule(variant, 1))
    assert found.dtype == dtype
    exact = aggregate(gradients.double(), _rule(variant, 1)).to(dtype)
    torch.testing.assert_close(found, exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_a_plan_leaves_out_rows_without_reading_them():
    gradients = torch.tensor([[1.0, 2.0], [math.nan, math.inf], [3.0, 4.0]])
    assert apply_plan(gradients, RobustPlan([0, 2], None, 0)).tolist() == [2.0, 3.0]


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (RobustRule("mean"), "aggregator='mean' is unknown. Choose one of 'flag', 'median', 'krum', 'nna'"),
        (RobustRule("nna", nna_rule="flag"), "nna_rule='flag' is unknown"),
        (RobustRule("median", -1), "f=-1 is not a whole number of faulty workers from 0 on"),
        (RobustRule("median", 0.5), "f=0.5 is not a whole number"),
        (RobustRule("krum", krum_m=0), "krum_m=0 is not a whole number of gradients from 1 on"),
        (RobustRule("flag", flag_iterations=0), "flag_iterations=0 is not a whole number"),
        (RobustRule("flag", flag_rank=0), "flag_rank=0 is not a whole number of dimensions from 1 on"),
    ],
)
def test_wrong_settings_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        check_rule(rule)


@pytest.mark.parametrize(
    ("rule", "workers", "message"),
    [
        (RobustRule("median", 1), 2, "f=1 faulty workers of 2 are half or more.* at least 3 workers, or f=0 at most"),
        (RobustRule("flag", 2), 4, "f=2 faulty workers of 4"),
        (RobustRule("krum", 1), 4, "krum with f=1 needs at least 2 f \\+ 3 = 5 workers, and there are 4"),
        (RobustRule("nna", 1, nna_rule="krum"), 4, "krum with f=1 needs at least"),
        (RobustRule("krum", 1, krum_m=3), 5, "krum_m=3 gradients are too many for 5 workers and f=1.* 2 at most"),
        (RobustRule("flag", 1, flag_rank=4), 3, "flag_rank=4 is above the number of workers, which is 3"),
    ],
)
def test_settings_that_do_not_fit_the_workers_are_refused(rule, workers, message):
    check_rule(rule)
    with pytest.raises(ValueError, match=message):
        check_workers(rule, workers)
    with pytest.raises(ValueError, match=message):
        aggregate(torch.zeros(workers, 3), rule)


def test_the_fewest_workers_are_enough():
    for aggregator in AGGREGATORS:
        check_workers(RobustRule(aggregator, 2), 7 if aggregator == "krum" else 5)
