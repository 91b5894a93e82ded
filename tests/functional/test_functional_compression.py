"""Compressors against what they are defined as, and error feedback by what it has to keep."""

import math

import pytest
import torch
from torch import Tensor

from lightning_stable.functional.compression import (
    ERRORS,
    Memory,
    init_memory,
    pack_signs,
    sign_scale,
    top_k,
    top_k_count,
    unpack_signs,
    update_memory,
    what_to_send,
)


def draw(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def largest(x: Tensor, count: int = 2) -> Tensor:
    values, places = top_k(x, count)
    return torch.zeros_like(x).index_add_(0, places, values)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 1001])
def test_signs_come_back_as_they_went_in(count: int) -> None:
    x = draw(count)
    x[::3] = 0.0
    packed = pack_signs(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(count / 8),)
    assert torch.equal(unpack_signs(packed, count), x >= 0)


def test_the_bits_are_where_the_docstring_says() -> None:
    x = torch.tensor([1.0, -1, -1, 0, -0.5, -2, -3, 4, 5])
    assert pack_signs(x).tolist() == [0b10001001, 0b00000001]


def test_no_entries_make_no_bytes() -> None:
    assert pack_signs(torch.zeros(0)).shape == (0,)
    assert unpack_signs(torch.zeros(0, dtype=torch.uint8), 0).shape == (0,)
    assert float(sign_scale(torch.zeros(0))) == 0.0


def test_the_largest_entries_and_their_places() -> None:
    x = torch.tensor([0.5, -3.0, 2.0, 0.0, -1.0])
    values, places = top_k(x, 2)
    assert places.dtype == torch.int32
    assert dict(zip(places.tolist(), values.tolist(), strict=True)) == {1: -3.0, 2: 2.0}


@pytest.mark.parametrize(
    ("entries", "ratio", "count"),
    [(100, 0.01, 1), (101, 0.01, 2), (100, 0.07, 7), (3, 0.01, 1), (5, 1.0, 5), (0, 0.5, 0), (10**9, 0.001, 10**6)],
)
def test_the_count_is_rounded_up(entries: int, ratio: float, count: int) -> None:
    assert top_k_count(entries, ratio) == count


def test_the_scale_is_the_mean_size() -> None:
    assert float(sign_scale(torch.tensor([1.0, -3.0, 0.0, 2.0]))) == 1.5


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_nothing_is_lost(error: str, eta: float) -> None:
    """What was sent and what is remembered add up to the gradients, at each step."""
    memory = init_memory(error, draw(9))
    gradients, given = torch.zeros(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for step in range(12):
        gradient = draw(9, seed=step)
        own = largest(what_to_send(memory, gradient, eta if error == "econtrol" else 1.0))
        before = None if memory.estimate is None else memory.estimate.clone()
        result = update_memory(memory, gradient, own, own).clone()
        gradients += gradient
        given += result
        if error == "ef":
            torch.testing.assert_close(given + memory.error, gradients)
        if error == "ef21":
            assert memory.error is None
            torch.testing.assert_close(result, before + own)
        if error == "econtrol":
            torch.testing.assert_close(memory.error, gradients - given)
        if memory.estimate is not None:
            torch.testing.assert_close(memory.estimate, memory.mean)  # one worker


@pytest.mark.parametrize("error", ["ef21", "econtrol"])
def test_a_constant_gradient_is_learnt(error: str) -> None:
    gradient, memory = draw(9), init_memory(error, draw(9))
    for _ in range(200):
        own = largest(what_to_send(memory, gradient, 0.1 if error == "econtrol" else 1.0))
        result = update_memory(memory, gradient, own, own)
    torch.testing.assert_close(result, gradient, atol=1e-6, rtol=1e-6)


def test_the_mean_of_the_estimates_is_the_mean() -> None:
    memories = [init_memory("econtrol", draw(9)) for _ in range(3)]
    for step in range(5):
        gradients = [draw(9, seed=10 * step + worker) for worker in range(3)]
        own = [largest(what_to_send(m, g, 0.5)) for m, g in zip(memories, gradients, strict=True)]
        mean = sum(own) / 3
        for memory, gradient, message in zip(memories, gradients, own, strict=True):
            update_memory(memory, gradient, message, mean)
    torch.testing.assert_close(memories[0].mean, sum(memory.estimate for memory in memories) / 3)


@pytest.mark.parametrize("error", ERRORS)
def test_where_a_message_does_not_count_the_memory_stays(error: str) -> None:
    memory = Memory(*(None if part is None else draw(4, seed) for seed, part in enumerate(init_memory(error, draw(4)))))
    before = [None if part is None else part.clone() for part in memory]
    gradient, own, mean = (draw(4, seed) for seed in (5, 6, 7))
    gradient[0] = torch.nan
    whole = Memory(*(None if part is None else part.clone() for part in memory))
    expected = update_memory(whole, gradient, own, mean)
    counts = torch.tensor([False, True, False, True])
    result = update_memory(memory, gradient, own, mean, counts)
    assert torch.equal(result[counts], expected[counts])
    for part, old, new in zip(memory, before, whole, strict=True):
        if part is not None:
            assert torch.equal(part, torch.where(counts, new, old))


def test_half_precision_is_remembered_in_full() -> None:
    memory = init_memory("ef", torch.zeros(9))
    gradient = draw(9, dtype=torch.bfloat16)
    x = what_to_send(memory, gradient)
    assert x.dtype == torch.float32
    own = largest(x)
    assert update_memory(memory, gradient, own, own).dtype == torch.float32
    assert torch.equal(memory.error + own, gradient.float())


def test_an_unknown_feedback_is_refused() -> None:
    with pytest.raises(ValueError, match=r"error='ef22' is unknown. Choose one of 'ef', 'ef21', 'econtrol'"):
        init_memory("ef22", torch.zeros(2))
