r"""Rehearsal: which samples of a stream to keep, and which of those kept to train on again.

A reservoir of capacity :math:`m` keeps sample number :math:`t` (from 0) at place :math:`t` while :math:`t < m`, and
after that at place :math:`j \sim \mathrm{U}\{0, \dots, t\}` if :math:`j < m` (Algorithm R). So after :math:`n` samples
each is kept with probability :math:`\min(1, m / n)`.

A balanced reservoir keeps the groups (classes, tasks) equal. With :math:`m_c` samples kept of the :math:`n_c` seen of
group :math:`c`, a new one of :math:`c` takes, once there is no room, the place of

- any sample of a largest group, if :math:`c` is smaller than that and never lost a sample (:math:`m_c = n_c`);
- otherwise any sample of :math:`c`, with probability :math:`m_c / n_c`, :math:`n_c` counting the new one.

So each sample of a group is kept with the same probability, :math:`m_c / n_c`.

Drawing by a power law (arXiv 2401.10393) gives task :math:`i`, while task :math:`k` is learned, the probability

.. math:: p_i \propto (k - i)^{-a}, \qquad i < k

and each sample of a task the same share of that. Symbols: :math:`m, n, t` counts of samples, :math:`a \ge 0` without
unit.

Unverified: the exponent and the number of replayed samples that arXiv 2401.10393 uses, and whether it spreads a task's
probability over its samples like this; only its abstract was read. Reservoir sampling for replay is that of arXiv
1902.10486 and the balanced reservoir that of Chrysakis and Moens (ICML 2020), both from memory; ours decides from the
counts alone whether a group has ever been a largest one, which comes to the same.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

__all__ = [
    "BalancedState",
    "Placing",
    "balanced_places",
    "draw_by_group",
    "draw_evenly",
    "init_balanced",
    "power_law",
    "reservoir_places",
]

# Which samples of a batch are kept, and where: a place comes once, with the sample that is there in the end.
Placing = tuple[list[int], list[int]]


def reservoir_places(seen: int, count: int, capacity: int, generator: Generator) -> Placing:
    """Decide which of the next samples of a stream are kept, by Algorithm R over a whole batch.

    Args:
        seen: How many samples came before.
        count: How many come now.
        capacity: How many are kept at most.
        generator: Draws one number for each sample.

    Returns:
        The kept samples as positions within the batch, and the place of each.
    """
    number = torch.arange(seen, seen + count)
    chance = torch.rand(count, dtype=torch.float64, generator=generator)
    drawn = torch.minimum((chance * (number + 1)).long(), number)
    place = torch.where(number < capacity, number, drawn)
    kept = torch.nonzero(place < capacity).flatten()
    last = dict(zip(place[kept].tolist(), kept.tolist(), strict=True))
    return list(last.values()), list(last)


class BalancedState(NamedTuple):
    """What a balanced reservoir knows.

    Attributes:
        groups: The group of the sample at each place, int64 of shape (kept,).
        seen: How many samples of each group came so far.
    """

    groups: Tensor
    seen: dict[int, int]


def init_balanced() -> BalancedState:
    """Return the state before the first sample."""
    return BalancedState(torch.empty(0, dtype=torch.long), {})


def balanced_places(
    state: BalancedState, new: list[int], capacity: int, generator: Generator
) -> tuple[Placing, BalancedState]:
    """Decide which of the next samples are kept so that groups are equal, and uniform within each.

    Args:
        state: The state so far.
        new: The group of each sample that comes now.
        capacity: How many are kept at most. With less than one for each group, groups are lost.
        generator: Draws two numbers for each sample.

    Returns:
        The kept samples as positions within the batch with the place of each, and the state after them.
    """
    seen, members = dict(state.seen), _Members(state.groups)
    size = len(state.groups)
    chances = torch.rand(len(new), 2, dtype=torch.float64, generator=generator).tolist()
    last: dict[int, int] = {}
    for source, (group, (accept, where)) in enumerate(zip(new, chances, strict=True)):
        kept = members.count(group)
        complete = kept == seen.get(group, 0)
        seen[group] = seen.get(group, 0) + 1
        if size < capacity:
            place, size = size, size + 1
            members.add(group, place)
        elif complete and kept < members.most():
            place = members.take_over(group, where)
        elif accept * seen[group] < kept:
            place = members.any_of(group, where)
        else:
            continue
        last[place] = source
    groups = torch.cat([state.groups, state.groups.new_empty(size - len(state.groups))])
    groups[list(last)] = torch.tensor([new[source] for source in last.values()], dtype=torch.long)
    return (list(last.values()), list(last)), BalancedState(groups, seen)


class _Members:
    """The places of each group: each is found, and changes hands, without a look at the others."""

    def __init__(self, groups: Tensor) -> None:
        order = torch.argsort(groups, stable=True)
        names, numbers = torch.unique_consecutive(groups[order], return_counts=True)
        ordered, ends = order.tolist(), numbers.cumsum(0).tolist()
        self._places: dict[int, list[int]] = {
            name: ordered[end - number : end]
            for name, number, end in zip(names.tolist(), numbers.tolist(), ends, strict=True)
        }
        # All groups with the most places, and how many those are; no group if it has to be found out again.
        self._largest: list[int] = []
        self._most = 0

    def count(self, group: int) -> int:
        """Return how many places a group has."""
        return len(self._places.get(group, ()))

    def most(self) -> int:
        """Return how many places a largest group has."""
        if not self._largest:
            self._most = max(map(len, self._places.values()))
            self._largest = [group for group, places in self._places.items() if len(places) == self._most]
        return self._most

    def add(self, group: int, place: int) -> None:
        """Give a new place to a group."""
        self._places.setdefault(group, []).append(place)
        self._largest = []

    def any_of(self, group: int, where: float) -> int:
        """Return a place of a group, chosen by a number in [0, 1)."""
        return self._places[group][int(where * self.count(group))]

    def take_over(self, group: int, where: float) -> int:
        """Give a smaller group a place of any of the largest, chosen by a number in [0, 1), and return it."""
        most = self.most()
        which, row = divmod(int(where * most * len(self._largest)), most)
        place = _remove(self._places[_remove(self._largest, which)], row)
        own = self._places.setdefault(group, [])
        own.append(place)
        if len(own) == most:
            self._largest.append(group)
        return place


def _remove(items: list[int], index: int) -> int:
    """Take an item out of a list without moving the others: the last one goes to its place."""
    items[index], items[-1] = items[-1], items[index]
    return items.pop()


def draw_evenly(kept: int, count: int, generator: Generator) -> list[int]:
    """Draw places uniformly, each again only after all others came.

    Args:
        kept: How many samples there are to draw from, at least 1.
        count: How many to draw.
        generator: Draws the order.
    """
    rounds = [torch.randperm(kept, generator=generator) for _ in range(-(-count // kept))]
    return torch.cat(rounds)[:count].tolist() if rounds else []


def draw_by_group(groups: Tensor, shares: Mapping[int, float], count: int, generator: Generator) -> list[int]:
    """Draw places independently: a group by its share, then any of its samples.

    Args:
        groups: The group of the sample at each place, int64 of shape (kept,).
        shares: Weight of each group, at least 0; groups that are not named have none.
        count: How many to draw.
        generator: Draws the places.

    Returns:
        The places; none if no sample has a share.
    """
    names, which, numbers = torch.unique(groups, return_inverse=True, return_counts=True)
    shared = torch.tensor([shares.get(group, 0.0) for group in names.tolist()], dtype=torch.float64)
    weights = (shared / numbers)[which]
    if count == 0 or not bool(weights.sum() > 0):
        return []
    return torch.multinomial(weights, count, replacement=True, generator=generator).tolist()


def power_law(task: int, others: Iterable[int], exponent: float) -> dict[int, float]:
    """Return the probability of each task below ``task``, falling as a power of how long ago it was learned.

    Args:
        task: Number of the task that is learned now.
        others: Numbers of the tasks to draw from; those from ``task`` on get no share.
        exponent: The power; 0 makes all past tasks equally probable.
    """
    ages = {other: task - other for other in others if other < task}
    latest = min(ages.values(), default=1)
    # Relative to the latest, whose weight is 1 however large the exponent is.
    weights = {other: (age / latest) ** -exponent for other, age in ages.items()}
    total = sum(weights.values())
    return {other: weight / total for other, weight in weights.items()}
