"""Sharpness on logits: the closed form against searches of the box, its values at the ends, and which positions."""

import math
import random
from typing import Any

import pytest
import torch
from oracles import logit_sharpness_twin as twin

from lightning_stable.functional.logit_sharpness import choose_positions, logit_sharpness, worst_logits

EPSILONS = (5e-4, 1e-3, 0.3)


def rows(count: int, classes: int, seed: int, scale: float = 3.0) -> tuple[list[list[float]], list[int]]:
    draw = random.Random(seed)  # noqa: S311  a seeded search
    return [[draw.gauss(0, scale) for _ in range(classes)] for _ in range(count)], [
        draw.randrange(classes) for _ in range(count)
    ]


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_it_is_what_a_search_of_all_corners_finds(epsilon: float) -> None:
    for classes in (2, 3, 6):
        z, t = rows(20, classes, seed=classes)
        found = logit_sharpness(torch.tensor(z, dtype=torch.float64), torch.tensor(t), epsilon)
        corners = worst_logits(torch.tensor(z, dtype=torch.float64), torch.tensor(t), epsilon)
        for number, (row, target) in enumerate(zip(z, t, strict=True)):
            largest, corner = twin.by_corners(row, target, epsilon)
            assert corners[number].tolist() == pytest.approx(corner, rel=1e-12)
            assert float(found[number]) == pytest.approx(twin.sharpness(row, target, largest), rel=1e-9)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_neither_chance_nor_an_optimiser_finds_more(epsilon: float) -> None:
    z, t = rows(8, 10, seed=3)
    found = logit_sharpness(torch.tensor(z, dtype=torch.float64), torch.tensor(t), epsilon).tolist()
    for row, target, value in zip(z, t, found, strict=True):
        assert twin.sharpness(row, target, twin.by_chance(row, target, epsilon, 2000, seed=1)) <= value
        numeric = twin.sharpness(row, target, twin.by_optimiser(row, target, epsilon))
        assert 0.99 * value <= numeric <= value * (1 + 1e-9), "the optimiser reaches it and does not go beyond"


def test_it_has_digits_where_the_loss_is_tiny() -> None:
    # The difference of a logarithm and a logit would be 0 in float32: the loss is about 1e-11.
    z = [[30.0, 4.0, 2.0]]
    exact = twin.sharpness(z[0], 0, twin.by_corners(z[0], 0, 1e-3)[0])
    assert 0 < exact < 1e-8
    assert float(logit_sharpness(torch.tensor(z), torch.tensor([0]))) == pytest.approx(exact, rel=1e-5)
    z = [[-30.0, 400.0, 2.0]]
    exact = twin.sharpness(z[0], 0, 400.0 + 1e-3 * 401 + 30.0 + 1e-3 * 31)
    assert float(logit_sharpness(torch.tensor(z), torch.tensor([0]))) == pytest.approx(
        100 * (1e-3 * (401 + 31)) / 431, rel=1e-4
    )


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_float32_is_as_good_as_float64(epsilon: float) -> None:
    for scale in (1.0, 30.0, 1000.0):
        z, t = rows(50, 12, seed=5, scale=scale)
        narrow, classes = torch.tensor(z), torch.tensor(t)
        wide = logit_sharpness(narrow.double(), classes, epsilon)
        found = logit_sharpness(narrow, classes, epsilon).double()
        assert torch.allclose(found, wide, rtol=1e-3 if scale > 100 else 5e-6, atol=1e-30)


def test_closed_form_at_equal_logits() -> None:
    # Logits of 0 over C classes: the loss is log C, and the corner's is log(1 + (C - 1) exp(2 epsilon)).
    classes, epsilon = 7, 0.1
    expected = 100 * (math.log(1 + 6 * math.exp(0.2)) - math.log(7)) / (1 + math.log(7))
    found = logit_sharpness(torch.zeros(1, classes), torch.tensor([4]), epsilon)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(logit_sharpness(torch.randn(3, 5), torch.tensor([0, 1, 2]), 0.0).abs().max()) == 0


def test_half_precision_is_widened_and_what_is_not_finite_shows() -> None:
    z, t = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])
    half = z.bfloat16()
    assert torch.equal(logit_sharpness(half, t), logit_sharpness(half.float(), t))
    z[1, 3] = math.inf
    assert logit_sharpness(z, t).isnan().tolist() == [False, True, False, False]


def sequence() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    return logits, torch.tensor([[0, 1, 2, -100], [-100, -100, -100, -100]])


def test_the_last_position_with_a_target_is_chosen() -> None:
    logits, targets = sequence()
    chosen, classes, present = choose_positions(logits, targets)
    assert present.tolist() == [True, False]
    assert classes.tolist() == [2, 0]
    assert torch.equal(chosen[0], logits[0, 2])
    whole = torch.tensor([[0, 1, 2, 1], [0, -100, 1, -100]])
    chosen, classes, present = choose_positions(logits, whole)
    assert torch.equal(chosen, torch.stack([logits[0, 3], logits[1, 2]]))
    assert (classes.tolist(), present.tolist()) == ([1, 1], [True, True])


def test_shifted_targets_are_of_the_position_before() -> None:
    logits, targets = sequence()
    chosen, classes, present = choose_positions(logits, targets, shift=True)
    assert torch.equal(chosen[0], logits[0, 1])
    assert (classes[0].item(), present.tolist()) == (2, [True, False])
    chosen, classes, present = choose_positions(logits, targets, "all", shift=True)
    assert chosen.shape == (6, 3)
    assert present.tolist() == [True, True, False, False, False, False]
    assert classes.tolist() == [1, 2, 0, 0, 0, 0]
    none, _, present = choose_positions(logits[:, :1], targets[:, :1], shift=True)
    assert (none.shape, present.shape) == ((0, 3), (0,))


def test_a_classifier_has_one_position() -> None:
    logits, targets = torch.randn(3, 4), torch.tensor([1, 7, 2])
    for position in ("last", "all"):
        chosen, classes, present = choose_positions(logits, targets, position, ignore_index=7)
        assert torch.equal(chosen, logits)
        assert (classes.tolist(), present.tolist()) == ([1, 0, 2], [True, False, True])


@pytest.mark.parametrize(
    ("logits", "targets", "settings", "message"),
    [
        ((3, 4), torch.zeros(3), {}, r"Targets are torch.float32, not numbers of classes"),
        ((3, 4), torch.zeros(4, dtype=torch.long), {}, r"\(4,\) do not fit logits of shape \(3, 4\)"),
        ((3, 4, 5, 6), torch.zeros(3, 4, 5, dtype=torch.long), {}, "Take position='all'"),
    ],
)
def test_what_does_not_fit_is_told(logits: Any, targets: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_positions(torch.zeros(logits), targets, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("function", [logit_sharpness, worst_logits])
def test_whole_numbers_that_are_no_integers_are_refused(function: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"Targets are {dtype}, not numbers of classes"):
        function(torch.zeros(2, 3), torch.tensor([1, 0]).to(dtype))
    assert function(torch.zeros(2, 3), torch.tensor([1, 0], dtype=torch.int32)).shape[0] == 2


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 1\) have no two classes"):
        logit_sharpness(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2,\) do not fit logits of shape \(3, 5\)"):
        worst_logits(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long))
