"""What the strategies should have done, from the steps that both ranks recorded: whose gradient, and which exchange.

An oracle runs on both ranks at once. Each recomputes its own gradients from its share of every batch, and follows the
weights of both through the exchanges with the method's formula in float64, one vector a rank.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from contract.oracle_checks import Named, _assert_gradients, _assert_step, _descent
from oracles.replay import Replay
from oracles.robust_ddp_twin import robust_mean
from torch import Tensor

from lightning_stable.testing.harness import Run, assert_same, vector
from lightning_stable.testing.workers import of_all_ranks, of_rank_zero

# Takes one outer step: from the shared weights, the workers' mean movement and the rate to the new shared weights.
Outer = Callable[[Tensor, Tensor, float], Tensor]


# ---------------------------------------------------------------------------------------------------- gradients


def assert_gradients(
    run: Run, combine: Callable[[int, list[Named]], list[Named]], what: str, *, descends: bool = True
) -> None:
    """Fail unless each optimizer step was given what is combined from the ranks' own gradients, and took it.

    Args:
        run: The run of this rank.
        combine: Returns, for the number of a step and the gradients of both ranks, what each rank should be given.
        what: The method, for messages.
        descends: Whether the optimizer takes the step itself.
    """
    rank, steps = dist.get_rank(), of_all_ranks(run.steps)
    descent = _descent(run)
    for pair in zip(*(Replay(run, number, steps[number]) for number in range(2)), strict=True):
        number, own = pair[rank].number, pair[rank]
        given = combine(number, [replayed.gradients() for replayed in pair])
        _assert_gradients(own, given[rank], what)
        if descends:
            _assert_step(own, descent)


# ---------------------------------------------------------------------------------------------------- exchanges


def local_update(
    run: Run,
    plugin: Any,
    outer: Outer,
    *,
    local_steps: Sequence[tuple[int, int]] = ((0, 3),),
    delayed: bool = False,
    keep_own: bool = False,
    warmup: int = 0,
) -> None:
    """Fail unless both ranks made steps of their own and exchanged their movements as these settings say."""

    def own_gradients(number: int, gradients: list[Named]) -> list[Named]:
        if number >= warmup:
            return gradients
        return [{name: (value + gradients[1][name]) / 2 for name, value in gradients[0].items()}] * 2

    assert_gradients(run, own_gradients, type(plugin).__name__)
    steps = of_all_ranks(run.steps)
    twin = _Twin(vector(steps[0][0].before).double(), outer, delayed=delayed, keep_own=keep_own)
    begun = warmup
    for number in range(len(run.steps)):
        ends = [vector(each[number].weights).double() for each in steps]
        length = max((start, length) for start, length in local_steps if start <= begun)[1]
        going_on = ends
        if number + 1 == warmup:
            twin.restart(ends[0])
        elif number + 1 - begun == length:
            going_on = twin.finish_round(ends, run.steps[number].rates[0])
            begun = number + 1
        if number + 1 < len(run.steps):
            found = [vector(each[number + 1].before).double() for each in steps]
            assert_same(found, going_on, f"what the ranks go on from after step {number + 1}", 2e-6)
    ended = vector(dict(run.module.named_parameters())).double()
    assert_same(ended, twin.end(going_on, run.steps[-1].rates[0]), "the weights at the end", 2e-6)
    assert_same(ended, of_rank_zero(ended), "the weights of a rank against those of rank 0")
    apart = [vector(one.weights) - vector(other.weights) for one, other in zip(*steps, strict=True)][warmup:]
    assert max(float(difference.abs().max()) for difference in apart) > 1e-4, "the workers never were apart"


class _Twin:
    """The exchanges of two workers, written down from the description."""

    def __init__(self, begin: Tensor, outer: Outer, *, delayed: bool, keep_own: bool) -> None:
        self.outer = outer
        self.delayed = delayed
        self.keep_own = keep_own
        self.restart(begin)

    def restart(self, weights: Tensor) -> None:
        """Let all go on from the same weights."""
        self.anchor = weights
        self.starts = [weights, weights]
        self.travelling: Tensor | None = None

    def finish_round(self, ends: list[Tensor], rate: float) -> list[Tensor]:
        """Return what each worker goes on from."""
        moved = [start - end for start, end in zip(self.starts, ends, strict=True)]
        mean = (moved[0] + moved[1]) / 2
        arrived, self.travelling = (self.travelling, mean) if self.delayed else (mean, None)
        if arrived is not None:
            self.anchor = self.outer(self.anchor, arrived, rate)
        own = moved if self.keep_own and self.delayed else [0.0, 0.0]
        self.starts = [self.anchor - movement for movement in own]
        return self.starts

    def end(self, ends: list[Tensor], rate: float) -> Tensor:
        """Return what is shared when what travels has arrived and what is left of a round is averaged plainly."""
        left = [start - end for start, end in zip(self.starts, ends, strict=True)]
        if self.travelling is not None:
            self.anchor = self.outer(self.anchor, self.travelling, rate)
        return self.anchor - (left[0] + left[1]) / 2


def averaging(anchor: Tensor, mean: Tensor, rate: float) -> Tensor:
    """Take the mean as it is."""
    return anchor - mean


def slow_momentum(outer_lr: float, outer_momentum: float) -> Outer:
    """Return SlowMo's outer step."""
    momentum: list[Tensor] = []

    def step(anchor: Tensor, mean: Tensor, rate: float) -> Tensor:
        before = momentum.pop() if momentum else torch.zeros_like(anchor)
        momentum.append(outer_momentum * before + mean / rate)
        return anchor - outer_lr * rate * momentum[0]

    return step


def nesterov(outer_lr: float, outer_momentum: float) -> Outer:
    """Return DiLoCo's outer step."""
    momentum: list[Tensor] = []

    def step(anchor: Tensor, mean: Tensor, rate: float) -> Tensor:
        before = momentum.pop() if momentum else torch.zeros_like(anchor)
        momentum.append(outer_momentum * before + mean)
        return anchor - outer_lr * (mean + outer_momentum * momentum[0])

    return step


def co2(
    outer_lr: float, outer_momentum: float, momentum_clip: float | None = None, penalty: float | str = 1.0
) -> Outer:
    """Return CO2's outer step."""
    momentum: list[Tensor] = []
    moved: list[float] = []

    def step(anchor: Tensor, mean: Tensor, rate: float) -> Tensor:
        before = momentum.pop() if momentum else torch.zeros_like(anchor)
        largest = max(moved, default=0.0)
        late = 1 + (moved[-1] / largest if largest else 0.0) if penalty == "gap" else float(penalty)
        now = outer_momentum * before + mean / late
        momentum.append(now if momentum_clip is None else now.clamp(-momentum_clip, momentum_clip))
        moved.append(float((outer_lr * momentum[0]).norm()))
        return anchor - outer_lr * momentum[0]

    return step


# ---------------------------------------------------------------------------------------------------- messages


def top_k_with_ef21(run: Run, plugin: Any, ratio: float) -> None:
    """Fail unless what is applied is the mean of what the ranks have sent so far, in steps of a few entries."""
    sent = [{name: torch.zeros_like(value) for name, value in run.steps[0].before.items()} for _ in range(2)]

    def combine(number: int, gradients: list[Named]) -> list[Named]:
        for told, own in zip(sent, gradients, strict=True):
            for name, gradient in own.items():
                left = (gradient - told[name]).flatten()
                chosen = left.abs().topk(math.ceil(ratio * len(left))).indices
                told[name].view(-1)[chosen] += left[chosen]
        return [{name: (value + sent[1][name]) / 2 for name, value in sent[0].items()}] * 2

    assert_gradients(run, combine, type(plugin).__name__)


def robust(run: Run, plugin: Any, aggregator: str) -> None:
    """Fail unless what is applied is the twin's aggregate."""

    def combine(number: int, gradients: list[Named]) -> list[Named]:
        stacked = torch.stack([vector(own) for own in gradients]).double().numpy()
        found = torch.from_numpy(robust_mean(stacked, aggregator, 0))
        parts = found.split([value.numel() for value in gradients[0].values()])
        return [{n: part.view(v.shape) for part, (n, v) in zip(parts, gradients[0].items(), strict=True)}] * 2

    assert_gradients(run, combine, type(plugin).__name__)


def one_bit(run: Run, plugin: Any, freeze: int) -> None:
    """Fail unless it is Adam on the mean gradient, and from the freeze on signs of momentum alone have moved it."""

    def own_gradients(number: int, gradients: list[Named]) -> list[Named]:
        if number >= freeze:
            return gradients
        return [{name: (value + gradients[1][name]) / 2 for name, value in gradients[0].items()}] * 2

    assert_gradients(run, own_gradients, type(plugin).__name__, descends=False)
    steps = of_all_ranks(run.steps)
    sizes = [value.numel() for value in steps[0][0].before.values()]
    first = sum(size for name, size in zip(steps[0][0].before, sizes, strict=True) if name.startswith("body"))
    rates = torch.tensor(run.steps[0].rates).double().repeat_interleave(torch.tensor([first, sum(sizes) - first]))
    twin = _OneBitTwin(sizes)
    for number, pair in enumerate(zip(*steps, strict=True)):
        gradients = [_clipped(vector(step.gradients).double(), run.trainer.gradient_clip_val) for step in pair]
        way = twin.learn(gradients[0]) if number < freeze else twin.follow(gradients)
        expected = vector(pair[0].before).double() - rates * way
        for rank, step in enumerate(pair):
            assert_same(vector(step.weights).double(), expected, f"weights of rank {rank} after step {number}", 1e-4)


class _OneBitTwin:
    """1-bit Adam of two workers on whole vectors, of which each worker serves one half."""

    def __init__(self, sizes: list[int]) -> None:
        total = sum(sizes)
        half = -(-total // 16) * 8
        ends = sorted({*itertools.accumulate(sizes), min(half, total)})
        self.pieces = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        self.momentum, self.variance = torch.zeros(total).double(), torch.zeros(total).double()
        self.errors = [torch.zeros(total).double() for _ in range(3)]  # of both workers, and of what they serve
        self.steps = self.learned = 0

    def learn(self, gradient: Tensor) -> Tensor:
        """Take a step of Adam, and return where it goes."""
        self.learned += 1
        self.variance = 0.999 * self.variance + 0.001 * gradient**2
        return self._way(0.9 * self.momentum + 0.1 * gradient)

    def follow(self, gradients: list[Tensor]) -> Tensor:
        """Take a step with the variance frozen."""
        wanted = [0.9 * self.momentum + 0.1 * gradient for gradient in gradients]
        told = [self._told(worker, values) for worker, values in enumerate(wanted)]
        return self._way(self._told(2, (told[0] + told[1]) / 2))

    def _told(self, who: int, values: Tensor) -> Tensor:
        """Return signs and one size for each piece, and remember the rest."""
        whole = self.errors[who] + values
        told = torch.zeros_like(whole)
        for piece in self.pieces:
            size = whole[piece].norm() / len(whole[piece]) ** 0.5
            told[piece] = torch.where(whole[piece] >= 0, size, -size)
        self.errors[who] = whole - told
        return told

    def _way(self, momentum: Tensor) -> Tensor:
        self.momentum = momentum
        self.steps += 1
        root = (self.variance / (1 - 0.999**self.learned)).sqrt()
        return momentum / (1 - 0.9**self.steps) / (root + 1e-8)


def _clipped(gradient: Tensor, limit: float | None) -> Tensor:
    return gradient if limit is None else gradient * min(1.0, limit / (float(gradient.norm()) + 1e-6))
