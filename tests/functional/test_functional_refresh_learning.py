"""Refresh learning's maths: against a slow twin, and where its result is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.refresh_twin import accumulated, refreshed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stable.functional.refresh_learning import add_importance, ascend, refresh_weights

SHAPES = [(5, 3), (7,), (1,), (2, 2, 2)]


def tensors(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def named(values: list[Tensor]) -> dict[str, Tensor]:
    return {str(place): value for place, value in enumerate(values)}


def refresh(weights: list[Tensor], walked: list[Tensor], **changed: object) -> list[Tensor]:
    """Refresh copies of the weights."""
    done = [weight.clone() for weight in weights]
    given = {"importance": [None] * len(done), "strength": 0.1, "noise": 0.0, "damping": 2.0, **changed}
    refresh_weights(done, walked, **given)  # type: ignore[arg-type]
    return done


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
    strength=st.floats(0, 1),
    damping=st.floats(0, 10),
    known=st.booleans(),
)
def test_against_the_twin(seed: int, scale: float, strength: float, damping: float, known: bool) -> None:
    weights, gradients = tensors(seed), tensors(seed + 1, scale)
    important = [value.square() for value in tensors(seed + 2)]
    found = refresh(
        weights,
        ascend([], gradients, 0.01),
        strength=strength,
        damping=damping,
        importance=important if known else [None] * len(weights),
    )
    importance = named(important) if known else None
    expected = refreshed(named(weights), named(gradients), strength, damping, importance)
    for value, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(value.double(), other, rtol=1e-5, atol=1e-6)


def test_a_tensor_moves_by_a_share_of_its_length_up_the_loss() -> None:
    weights, gradients = tensors(1), tensors(2)
    for before, after, gradient in zip(weights, refresh(weights, gradients, strength=0.01), gradients, strict=True):
        torch.testing.assert_close((after - before).norm(), 0.01 * before.norm(), rtol=1e-4, atol=0)
        assert ((after - before) * gradient).sum() > 0


def test_several_steps_add_up_to_one_way() -> None:
    first, second = tensors(1), tensors(2)
    way = ascend(ascend([], first, 0.5), second, 0.5)
    for step, one, two in zip(way, first, second, strict=True):
        torch.testing.assert_close(step, 0.5 * (one + two))


def test_noise_is_the_generators_and_importance_shrinks_it_too() -> None:
    weights = tensors(1)
    important = [torch.full_like(weight, 3.0) for weight in weights]
    still = [torch.zeros_like(weight) for weight in weights]
    found = refresh(
        weights, still, noise=0.5, damping=1.0, importance=important, generator=torch.Generator().manual_seed(4)
    )
    generator = torch.Generator().manual_seed(4)
    for value, weight in zip(found, weights, strict=True):
        noise = torch.randn(weight.shape, generator=generator)
        torch.testing.assert_close(value, weight + 0.1 * 0.5 * noise / 4)


def test_no_noise_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    refresh(tensors(1), tensors(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("gradient", [0.0, 1e-9, torch.nan, torch.inf])
def test_without_a_direction_a_tensor_stays(gradient: float) -> None:
    """A gradient as long as the rounding of its tensor is none."""
    weights, gradients = tensors(1), tensors(2)
    gradients[0] = gradient * gradients[0]
    found = refresh(weights, gradients)
    assert torch.equal(found[0], weights[0])
    assert not torch.equal(found[1], weights[1])


def test_weights_of_length_0_have_no_share_to_move() -> None:
    assert torch.equal(refresh([torch.zeros(3)], [torch.ones(3)])[0], torch.zeros(3))


def test_half_precision_is_rounded_once() -> None:
    weights, gradients = tensors(1, dtype=torch.bfloat16), tensors(2, dtype=torch.bfloat16)
    expected = refreshed(named(weights), named([value.double() for value in gradients]), 0.1, 2.0, None)
    for value, other in zip(refresh(weights, gradients), expected.values(), strict=True):
        torch.testing.assert_close(value, other.to(torch.bfloat16), rtol=0.01, atol=0)


class Counts(TorchDispatchMode):
    """Counts the operations that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operations_are_on_lists_of_tensors() -> None:
    """Each further tensor by itself has its noise drawn, and is asked whether it has a direction."""
    counts = []
    for number in (1, 5):
        weights, gradients, important = ([*map(torch.clone, number * tensors(seed))] for seed in (1, 2, 3))
        with Counts() as counted:
            walked = ascend(ascend([], gradients, 0.1), gradients, 0.1)
            refresh_weights(weights, walked, important, 0.1, 0.2, 2.0)
        counts.append(counted.count)
    assert counts[1] - counts[0] == 2 * 4 * len(SHAPES)


def test_precisions_mixed_and_importance_of_some() -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float16]
    weights, gradients = (
        [value.to(kind) for value, kind in zip(tensors(seed), dtypes, strict=True)] for seed in (1, 2)
    )
    important = [None, torch.ones(7), None, torch.ones(2, 2, 2, dtype=torch.float16)]
    found = refresh(weights, ascend([], gradients, 0.1), importance=important)
    known = {str(place): 0.0 if value is None else value.double() for place, value in enumerate(important)}
    expected = refreshed(named(weights), named([value.double() for value in gradients]), 0.1, 2.0, known)
    for value, other, kind in zip(found, expected.values(), dtypes, strict=True):
        assert value.dtype == kind
        torch.testing.assert_close(value, other.to(kind), rtol=0.01 if kind.itemsize == 2 else 1e-5, atol=1e-6)


def test_no_weights_and_weights_without_entries() -> None:
    refresh_weights([], [], [], 0.1, 0.1, 1.0)
    empty = refresh([torch.ones(0), torch.ones(2)], [torch.ones(0), torch.ones(2)], noise=0.0)
    assert empty[0].shape == (0,)
    torch.testing.assert_close(empty[1], torch.full((2,), 1.1))


def test_importance_adds_up() -> None:
    old, new = named(tensors(1)), named(tensors(2))
    total = add_importance(old, new, 0.25)
    for name, value in accumulated(old, new, 0.25).items():
        torch.testing.assert_close(total[name], value)
    assert add_importance({}, new, 0.25).keys() == new.keys()
    # What no longer trains loses importance with each task, what begins to has none before.
    mixed = add_importance({"old": torch.ones(2)}, {"new": torch.ones(2)}, 0.25)
    assert mixed["old"].tolist() == [0.25, 0.25]
    assert mixed["new"].tolist() == [1.0, 1.0]
