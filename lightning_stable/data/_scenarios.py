"""Which samples and classes each task of a stream has. Pure: class numbers in, indices out, randomness from a seed."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plan", "choose_half", "hold_out", "plan_blurry", "plan_classes", "plan_domains", "seed_of"]

_NAMED = 6  # classes that a task's name lists before it only counts them


class Plan(NamedTuple):
    """The tasks of a stream.

    Attributes:
        train: Indices of the samples that each task trains on.
        held_out: Indices of those that it is evaluated on.
        classes: The classes that it is evaluated on, ascending.
        names: What it is called.
    """

    train: list[Tensor]
    held_out: list[Tensor]
    classes: list[list[int]]
    names: list[str]

    def checksum(self) -> int:
        """Return a number that another plan has not, in practice."""
        parts = [repr(self.names).encode(), *(indices.numpy().tobytes() for indices in self.train)]
        return zlib.crc32(b"|".join(parts))


def seed_of(seed: int, purpose: str, number: int = 0) -> int:
    """Return the seed of one purpose, apart from those of all others."""
    return zlib.crc32(f"{seed} {purpose} {number}".encode())


def choose_half(classes: int, first: bool, seed: int) -> list[int]:
    """Return one of two halves of the classes, ascending; of an odd number one class is in neither."""
    order = torch.randperm(classes, generator=_generator(seed, "halves"))
    size = classes // 2
    return sorted((order[:size] if first else order[size : 2 * size]).tolist())


def hold_out(classes: Tensor, share: float, seed: int, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Split samples into those to train on and those to evaluate on: the same share of each class, at least one.

    Args:
        classes: The class of each sample, from 0 without gaps; -1 for samples in neither part.
        share: Share held out.
        seed: Seed of the choice.
        labels: The dataset's label of each class.

    Returns:
        The indices of both parts, ascending.

    Raises:
        ValueError: If a class has a single sample.
    """
    generator = _generator(seed, "held out")
    held = torch.zeros(len(classes), dtype=torch.bool)
    for number in range(int(classes.max()) + 1):
        members = (classes == number).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(
                f"TaskStream: class {labels[number]} has {len(members)} sample(s); each needs two or more, one to "
                "train on and one held out. Leave the class out or give more data."
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return ((classes >= 0) & ~held).nonzero().flatten(), held.nonzero().flatten()


def plan_classes(
    classes: Tensor,
    train: Tensor,
    held_out: Tensor,
    tasks: int,
    order: Sequence[int] | None,
    seed: int,
    labels: Sequence[int],
) -> Plan:
    """Give each task its own classes: consecutive parts of ``order``, whose sizes differ by one at most.

    Without an order it is drawn from the seed. ``labels`` are those of the classes in the names of the tasks.

    Raises:
        ValueError: If there are more tasks than classes, or ``order`` does not name each class once.
    """
    count = _count(classes, tasks)
    if order is None:
        order = torch.randperm(count, generator=_generator(seed, "class order")).tolist()
    elif sorted(order) != list(range(count)):
        raise ValueError(
            f"TaskStream(class_order={list(order)!r}) has to name each of the classes 0..{count - 1} once. Labels "
            "count from 0 in ascending order of those that take part."
        )
    home = torch.empty(count, dtype=torch.int64)
    for task, part in enumerate(torch.tensor(order).tensor_split(tasks)):
        home[part] = task
    return _assigned(classes, train, held_out, home, home[classes[train]], labels, "")


def plan_domains(samples: int, train: Tensor, held_out: Tensor, names: list[str], classes: int) -> Plan:
    """Give each task all samples, each time as samples of their own: those of task t begin at ``t * samples``."""
    starts = [task * samples for task in range(len(names))]
    everything = [list(range(classes)) for _ in names]
    return Plan([train + start for start in starts], [held_out + start for start in starts], everything, names)


def plan_blurry(
    classes: Tensor,
    train: Tensor,
    held_out: Tensor,
    tasks: int,
    disjoint_share: float,
    blurry_share: float,
    seed: int,
    labels: Sequence[int],
) -> Plan:
    """Give each task a random number of classes, and spread samples of some of them over the other tasks.

    ``labels`` are those of the classes in the names of the tasks.

    Si-Blurry; see :mod:`lightning_stable.data.task_stream` for what is the paper's and what is not.

    Raises:
        ValueError: If there are more tasks than classes, or a task ends with no class of which it has the most samples.
    """
    count = _count(classes, tasks)
    generator = _generator(seed, "blurry")
    order = torch.randperm(count, generator=generator)
    # Every task has one class; cuts at random places say how many of the others.
    cuts = torch.randint(0, count - tasks + 1, (tasks - 1,), generator=generator).sort().values
    sizes = 1 + torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([count - tasks])]))
    home = torch.empty(count, dtype=torch.int64)
    home[order] = torch.arange(tasks).repeat_interleave(sizes)
    blurry = torch.ones(count, dtype=torch.bool)
    blurry[torch.randperm(count, generator=generator)[: round(disjoint_share * count)]] = False

    place = home[classes[train]]
    candidates = blurry[classes[train]].nonzero().flatten()
    moved = candidates[torch.randperm(len(candidates), generator=generator)[: round(blurry_share * len(candidates))]]
    if tasks > 1 and len(moved):
        place[moved] = _elsewhere(place[moved], tasks, generator)

    counts = torch.bincount(classes[train] * tasks + place, minlength=count * tasks).view(count, tasks)
    counts = 2 * counts
    counts[torch.arange(count), home] += 1  # among equals a class stays where it was
    most = counts.argmax(1)
    for task in range(tasks):
        if task not in most:
            raise ValueError(
                f"TaskStream(scenario='blurry'): task {task} has the most samples of no class with tasks={tasks}, "
                f"disjoint_share={disjoint_share}, blurry_share={blurry_share} and seed={seed}, so there is nothing to "
                "evaluate it on. Lower blurry_share, or take another seed."
            )
    return _assigned(classes, train, held_out, most, place, labels, "mostly ")


def _elsewhere(home: Tensor, tasks: int, generator: torch.Generator) -> Tensor:
    """Return a task for each sample that is not its own, by chances that are random themselves."""
    points = torch.rand(tasks - 1, generator=generator).sort().values
    chances = torch.diff(torch.cat([torch.zeros(1), points, torch.ones(1)])).clamp(min=1e-6).repeat(len(home), 1)
    chances[torch.arange(len(home)), home] = 0
    return torch.multinomial(chances, 1, generator=generator).flatten()


def _assigned(
    classes: Tensor, train: Tensor, held_out: Tensor, home: Tensor, place: Tensor, labels: Sequence[int], prefix: str
) -> Plan:
    """Return the plan of which ``home`` says the task of each class and ``place`` that of each training sample."""
    tasks = range(int(home.max()) + 1)
    members = [(home == task).nonzero().flatten().tolist() for task in tasks]
    return Plan(
        [train[place == task] for task in tasks],
        [held_out[home[classes[held_out]] == task] for task in tasks],
        members,
        [prefix + _listed([labels[number] for number in part]) for part in members],
    )


def _listed(classes: Sequence[int]) -> str:
    listed = ", ".join(map(str, classes[:_NAMED]))
    more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
    return f"class{'es' if len(classes) > 1 else ''} {listed}{more}"


def _count(classes: Tensor, tasks: int) -> int:
    """Return the number of classes."""
    count = int(classes.max()) + 1
    if tasks > count:
        raise ValueError(
            f"TaskStream(tasks={tasks}) needs a class for each task, there are {count}. Lower tasks, or take "
            "scenario='domain', where every task has all classes."
        )
    return count


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, purpose))
