"""The shared glue: wraps that come off in any order, weights that always come back."""

import pytest
import torch

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable.callbacks._weights import _CHUNK_BYTES, WeightSwap, _chunks
from lightning_stable.testing.harness import Net


def doubling(original, *args):
    return 2 * original(*args)


class Counts:
    def value(self) -> int:
        return 1


@pytest.mark.parametrize("first", [0, 1])
def test_wraps_come_off_in_any_order(first: int) -> None:
    target = Counts()
    wraps = [MethodWrap(target, "value", doubling), MethodWrap(target, "value", doubling)]
    assert target.value() == 4
    wraps[first].undo()
    assert target.value() == 2
    wraps[1 - first].undo()
    assert target.value() == 1


def test_undoing_the_outer_wrap_last_leaves_nothing_on_the_object() -> None:
    target = Counts()
    inner, outer = MethodWrap(target, "value", doubling), MethodWrap(target, "value", doubling)
    outer.undo()
    inner.undo()
    assert not vars(target)


def test_undoing_the_inner_wrap_first_leaves_nothing_on_the_object() -> None:
    target = Counts()
    wraps = [MethodWrap(target, "value", doubling) for _ in range(3)]
    for wrap in wraps:
        wrap.undo()
    assert not vars(target)


def test_an_attribute_of_the_instance_is_put_back() -> None:
    target = Counts()
    target.value = lambda: 7
    wrap = MethodWrap(target, "value", doubling)
    assert target.value() == 14
    wrap.undo()
    assert target.value() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swapping_keeps_the_tensors_and_both_sets(dtype: torch.dtype) -> None:
    live = list(Net().parameters())
    kept = [value.detach().clone() for value in live]
    other = [torch.randn_like(value, dtype=dtype) for value in kept]
    wanted = [value.clone() for value in other]
    addresses = [value.data_ptr() for value in live]
    swap = WeightSwap()
    swap.swap_in(live, other)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(live, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(swap.live_values(), kept, strict=True))
    assert all(
        torch.equal(a.to(dtype), b.to(a.dtype).to(dtype)) for a, b in zip(swap.other_values(), wanted, strict=True)
    )
    with pytest.raises(RuntimeError, match="in place already"):
        swap.swap_in(live, other)
    swap.swap_out()
    swap.swap_out()
    assert all(torch.equal(a, b) for a, b in zip(live, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other, wanted, strict=True))
    assert [value.data_ptr() for value in live] == addresses


def test_an_exchange_goes_in_bounded_chunks() -> None:
    third = torch.empty(_CHUNK_BYTES // 12, device="meta")
    tensors = [third] * 7 + [torch.empty(_CHUNK_BYTES, device="meta")] + [third]
    slices = list(_chunks(tensors))
    assert [index for part in slices for index in range(part.start, part.stop)] == list(range(9))
    assert [part.stop - part.start for part in slices] == [3, 3, 1, 1, 1]
    assert list(_chunks([])) == []
