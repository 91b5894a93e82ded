"""Rehearsal: which samples stay and which are drawn, by their frequencies over many fixed seeds, and at the ends."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stable.functional.replay import (
    BalancedState,
    balanced_places,
    draw_by_group,
    draw_evenly,
    init_balanced,
    power_law,
    reservoir_places,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def reservoir(batches: list[int], capacity: int, seed: int) -> list[int]:
    """Return the numbers of the samples that a reservoir keeps of a stream in batches of these sizes."""
    chance, kept, seen = generator(seed), {}, 0
    for size in batches:
        sources, places = reservoir_places(seen, size, capacity, chance)
        assert len(set(places)) == len(places)
        kept |= {place: seen + source for source, place in zip(sources, places, strict=True)}
        seen += size
    assert sorted(kept) == list(range(min(capacity, seen)))
    return [kept[place] for place in range(len(kept))]


def balanced(groups: list[int], batch: int, capacity: int, seed: int) -> tuple[list[int], BalancedState]:
    """Return the numbers of the samples that a balanced reservoir keeps of a stream, and its state."""
    chance, kept, state = generator(seed), {}, init_balanced()
    for start in range(0, len(groups), batch):
        (sources, places), state = balanced_places(state, groups[start : start + batch], capacity, chance)
        kept |= {place: start + source for source, place in zip(sources, places, strict=True)}
    numbers = [kept[place] for place in range(len(kept))]
    assert state.groups.tolist() == [groups[number] for number in numbers], "the state is not of what is kept"
    return numbers, state


# ---------------------------------------------------------------------------------------------------- what stays


def test_a_reservoir_keeps_everything_until_it_is_full() -> None:
    assert reservoir([3, 4, 1], 10, seed=1) == list(range(8))
    assert reservoir_places(0, 0, 4, generator()) == ([], [])


@pytest.mark.parametrize("batches", [[60], [7] * 8 + [4], [1] * 60], ids=["at once", "batches", "one by one"])
def test_a_reservoir_keeps_each_sample_with_the_same_probability(batches: list[int]) -> None:
    runs, capacity = 1000, 12
    found = Counter(number for seed in range(runs) for number in reservoir(batches, capacity, seed))
    # Standard error of a frequency: sqrt(0.2 * 0.8 / 1000) = 0.013; 60 of them are looked at.
    assert all(found[number] / runs == pytest.approx(capacity / 60, abs=0.05) for number in range(60))


def test_batches_make_no_difference_to_a_reservoir() -> None:
    """One number is drawn for each sample, so a stream cut in other places keeps the same samples."""
    assert reservoir([4] * 20, 7, seed=3) == reservoir([8] * 10, 7, seed=3) == reservoir([80], 7, seed=3)


def test_where_a_place_is_taken_twice_the_later_sample_stays() -> None:
    for seed in range(20):
        sources, places = reservoir_places(100, 300, 2, generator(seed))
        chance = torch.rand(300, dtype=torch.float64, generator=generator(seed))
        last = {}
        for source, value in enumerate(chance.tolist()):
            place = int(value * (101 + source))
            if place < 2:
                last[place] = source
        assert dict(zip(places, sources, strict=True)) == last


def test_a_balanced_reservoir_keeps_groups_equal() -> None:
    # Groups of very different sizes, one after the other, as tasks come; and mixed.
    ordered = [0] * 100 + [1] * 20 + [2] * 200 + [3] * 5
    mixed = [ordered[place] for place in torch.randperm(len(ordered), generator=generator()).tolist()]
    for groups in (ordered, mixed):
        for capacity in (8, 20, 21):
            _, state = balanced(groups, 16, capacity, seed=2)
            numbers = torch.bincount(state.groups, minlength=4)
            assert numbers.sum() == capacity
            assert numbers[3] == min(5, capacity // 4)
            assert int(numbers[:3].max() - numbers[:3].min()) <= 1
            assert state.seen == {0: 100, 1: 20, 2: 200, 3: 5}


def test_a_balanced_reservoir_keeps_each_sample_of_a_group_with_the_same_probability() -> None:
    groups, capacity, runs = [0] * 24 + [1] * 12 + [0, 1] * 6, 12, 1000
    found = Counter(number for seed in range(runs) for number in balanced(groups, 5, capacity, seed)[0])
    for number, group in enumerate(groups):
        assert found[number] / runs == pytest.approx(6 / groups.count(group), abs=0.06), f"sample {number} of {group}"


def test_a_balanced_reservoir_has_room_for_all_of_a_small_group() -> None:
    numbers, _ = balanced([0] * 50 + [1] * 3, 4, 10, seed=5)
    assert {50, 51, 52} <= set(numbers)
    numbers, _ = balanced([7], 4, 10, seed=5)
    assert numbers == [0]


def test_a_balanced_reservoir_leaves_its_old_state_alone() -> None:
    _, before = balanced([0] * 6 + [1] * 2, 4, 4, seed=0)
    groups, seen = before.groups.clone(), dict(before.seen)
    balanced_places(before, [1, 2, 2], 4, generator())
    assert torch.equal(before.groups, groups)
    assert before.seen == seen


def test_where_many_groups_take_from_many_each_of_the_largest_loses_alike() -> None:
    """New groups grow within one batch, from room for all of the old ones down to the same share."""
    old, new = list(range(10)) * 12, [10 + number % 5 for number in range(200)]
    lost = Counter()
    for seed in range(200):
        chance = generator(seed)
        _, state = balanced_places(init_balanced(), old, 120, chance)
        (sources, places), state = balanced_places(state, new, 120, chance)
        assert torch.bincount(state.groups).tolist() == [8] * 15
        assert state.groups[places].tolist() == [new[source] for source in sources]
        assert state.seen == dict.fromkeys(range(10), 12) | dict.fromkeys(range(10, 15), 40)
        lost.update(place for place in places)
    # 40 of 120 places are taken over; standard error of a frequency: 0.033.
    assert all(lost[place] / 200 == pytest.approx(1 / 3, abs=0.13) for place in range(120))


class Work(TorchDispatchMode):
    """Adds up how many numbers tensor operations have returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            self.numbers += tensor.numel() if isinstance(tensor, Tensor) else 0
        return found


@pytest.mark.parametrize("new", [[1] * 256, [0] * 256, list(range(256))], ids=["one grows", "one stays", "many grow"])
def test_a_batch_costs_a_pass_over_the_places_and_not_one_for_each_sample(new: list[int]) -> None:
    capacity, chance = 5000, generator()
    _, state = balanced_places(init_balanced(), [0] * capacity, capacity, chance)
    with Work() as balancing:
        balanced_places(state, new, capacity, chance)
    assert balancing.numbers < 20 * capacity
    groups = torch.arange(capacity) % 500
    with Work() as drawing:
        draw_by_group(groups, dict.fromkeys(range(500), 1.0), 256, chance)
    assert drawing.numbers < 20 * capacity


# ---------------------------------------------------------------------------------------------------- what is drawn


def test_an_even_draw_takes_each_place_again_only_after_all_others() -> None:
    assert sorted(draw_evenly(8, 8, generator())) == list(range(8))
    assert len(set(draw_evenly(20, 8, generator(1)))) == 8
    assert set(Counter(draw_evenly(3, 7, generator(2))).values()) == {2, 3}
    assert draw_evenly(3, 0, generator()) == []
    found = Counter(place for seed in range(2000) for place in draw_evenly(10, 4, generator(seed)))
    assert all(found[place] / 2000 == pytest.approx(0.4, abs=0.05) for place in range(10))


def test_a_draw_by_group_follows_the_shares_and_is_even_within() -> None:
    groups = torch.tensor([5, 5, 5, 5, 2, 2, 9])
    places = draw_by_group(groups, {5: 2.0, 2: 1.0, 7: 3.0}, 6000, generator(4))
    found = Counter(places)
    assert found[6] == 0, "a group without a share was drawn"
    for place, expected in enumerate([1 / 6] * 6):
        assert found[place] / 6000 == pytest.approx(expected, abs=0.02)


def test_a_draw_without_shares_is_empty() -> None:
    assert draw_by_group(torch.tensor([0, 0]), {1: 1.0}, 4, generator()) == []
    assert draw_by_group(torch.tensor([0, 0]), {0: 1.0}, 0, generator()) == []
    assert draw_by_group(torch.empty(0, dtype=torch.long), {}, 4, generator()) == []


def test_the_power_law() -> None:
    assert power_law(3, [0, 1, 2, 3, 4], 1.0) == pytest.approx({0: 2 / 11, 1: 3 / 11, 2: 6 / 11})
    assert power_law(3, [0, 2], 2.0) == pytest.approx({0: 0.1, 2: 0.9})
    assert power_law(3, [0, 1, 2], 0.0) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})
    assert power_law(0, [0, 1], 1.0) == {}
    assert power_law(400, [0, 399], 50.0)[399] == pytest.approx(1.0)


def test_an_exponent_beyond_all_numbers_leaves_the_latest_task() -> None:
    assert power_law(5000, [0, 4990], 1e6) == {0: 0.0, 4990: 1.0}


def test_global_random_numbers_stay() -> None:
    before = torch.get_rng_state()
    reservoir([5] * 4, 6, seed=0)
    balanced([0, 1] * 10, 4, 6, seed=0)
    draw_evenly(5, 7, generator())
    draw_by_group(torch.tensor([0, 1]), {0: 1.0}, 3, generator())
    assert torch.equal(torch.get_rng_state(), before)
