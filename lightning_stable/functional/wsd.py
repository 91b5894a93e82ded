r"""Warmup-stable-decay (WSD) learning rate schedules, for one horizon or for many budgets (WSD-S).

With the optimizer step :math:`s` (0 for the first update), the warmup :math:`W`, the decay :math:`D` and the end
:math:`T`, all in optimizer steps, the factor on the peak learning rate is

.. math::

    m(s) = s / W \;(s < W), \qquad 1 \;(W \le s < T - D), \qquad
    f(x),\; x = (s - (T - D)) / D \;(T - D \le s < T), \qquad f(1) \;(s \ge T)

where :math:`f` falls from 1 to the floor :math:`r` (``min_ratio``):

* ``linear``: :math:`r + (1 - r)(1 - x)`
* ``cosine``: :math:`r + (1 - r)(1 + \cos \pi x) / 2`
* ``1-sqrt``: :math:`r + (1 - r)(1 - \sqrt x)` (arXiv 2405.18392)
* ``exponential``: :math:`r^x`, MiniCPM's halving every :math:`T_{half} = D \ln 2 / \ln(1/r)` steps (arXiv 2404.06395)
* ``inverse``: :math:`1 / (x / r + 1 - x)`, the inverse-proportional decay of WSD-S (arXiv 2410.05192)

WSD-S (arXiv 2410.05192) repeats stable and decay phases: each budget ends a cycle at the floor and the next cycle
starts at the peak again, from the decayed weights. Shares are of the cycle; only the first cycle warms up.

Conventions that differ between implementations: the update at step :math:`s` uses :math:`m(s)`, so the first update
of a warmup has rate 0 and the last one of a decay is one :math:`1/D` short of the floor (as in transformers and
Levanter). The inverse form was checked against Levanter's code, not against the paper's text.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

__all__ = [
    "SHAPES",
    "Cycle",
    "WarmupStableDecayLR",
    "check_length",
    "check_shape",
    "cycle_at",
    "decay_length",
    "decay_multiplier",
    "end_with_decay",
    "plan_cycles",
    "plan_multiplier",
    "set_rate",
    "wsd_multiplier",
]

SHAPES = ("linear", "cosine", "1-sqrt", "exponential", "inverse")


class Cycle(NamedTuple):
    """One warmup, stable and decay phase, in absolute optimizer steps.

    Attributes:
        start: First step of the cycle.
        warmup_end: First step after the warmup.
        decay_start: First step of the decay, ``None`` while no end is known.
        end: First step after the decay, ``None`` while no end is known.
    """

    start: int
    warmup_end: int
    decay_start: int | None
    end: int | None


def check_shape(shape: str, min_ratio: float) -> None:
    """Raise ``ValueError`` unless ``shape`` is one of :data:`SHAPES` and ``min_ratio`` a floor it can reach."""
    if isinstance(min_ratio, bool) or not isinstance(min_ratio, (int, float)):
        message = f"min_ratio={min_ratio!r} is not a number: it is the floor as a share of the peak rate, in [0, 1]."
        raise ValueError(message)  # noqa: TRY004  one error class for every setting out of range
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown. Choose one of {', '.join(map(repr, SHAPES))}.")
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio={min_ratio!r} is not in [0, 1]: it is the floor as a share of the peak rate.")
    if min_ratio == 0 and shape in ("exponential", "inverse"):
        raise ValueError(
            f"min_ratio=0 with shape={shape!r}: this decay never reaches zero. "
            "Set min_ratio above 0 (0.1 is usual) or choose 'linear', 'cosine' or '1-sqrt'."
        )


def check_length(name: str, length: float) -> None:
    """Raise ``ValueError`` unless ``length`` is a number of steps (int, from 0) or a share (float in [0, 1))."""
    if isinstance(length, bool) or not isinstance(length, (int, float)):
        message = f"{name}={length!r} is not a number: give optimizer steps (int) or a share (float in [0, 1))."
        raise ValueError(message)  # noqa: TRY004  one error class for every setting out of range
    if isinstance(length, int) and length < 0:
        raise ValueError(f"{name}={length!r} is negative: give a number of optimizer steps from 0 on.")
    if isinstance(length, float) and not 0 <= length < 1:
        raise ValueError(
            f"{name}={length!r} is a float outside [0, 1): a float is a share of the run (of the cycle, with budgets). "
            f"For optimizer steps give an int, such as {name}=100."
        )


def decay_multiplier(progress: float, shape: str, min_ratio: float) -> float:
    """Return the factor at ``progress`` through a decay, from 1 at 0 to ``min_ratio`` at 1.

    Args:
        progress: Share of the decay that is over; clamped to [0, 1].
        shape: One of :data:`SHAPES`.
        min_ratio: Floor, as a share of the peak.

    Raises:
        ValueError: If the shape is unknown or cannot reach the floor.
    """
    check_shape(shape, min_ratio)
    x = min(max(progress, 0.0), 1.0)
    if shape == "exponential":
        return float(min_ratio**x)
    if shape == "inverse":
        return 1.0 / (x / min_ratio + (1.0 - x))
    falling = {"linear": 1.0 - x, "cosine": 0.5 * (1.0 + math.cos(math.pi * x)), "1-sqrt": 1.0 - math.sqrt(x)}[shape]
    return min_ratio + (1.0 - min_ratio) * falling


def plan_cycles(
    total_steps: int | None,
    warmup: float,
    decay: float,
    budgets: Sequence[int] | None = None,
) -> tuple[Cycle, ...]:
    """Lay out the cycles of a run.

    Args:
        total_steps: Optimizer steps of the whole run, an implicit last budget; ``None`` for an open horizon, which
            leaves the last cycle without an end.
        warmup: Length of the warmup: optimizer steps (int) or a share of the first cycle (float).
        decay: Length of each decay: optimizer steps (int) or a share of its cycle (float).
        budgets: Increasing step counts at which a decay ends.

    Returns:
        One :class:`Cycle` for each budget and one for what follows the last.

    Raises:
        ValueError: If a length or a budget cannot be met; the message names it.
    """
    check_length("warmup", warmup)
    check_length("decay", decay)
    ends: list[int | None] = [*_checked_budgets(budgets, total_steps)]
    if not ends or ends[-1] != total_steps:
        ends.append(total_steps)
    cycles = []
    start = 0
    for end in ends:
        cycles.append(_plan_cycle(start, end, warmup if start == 0 else 0, decay))
        start = end if end is not None else start
    return tuple(cycles)


def plan_multiplier(step: int, cycles: Sequence[Cycle], shape: str, min_ratio: float) -> float:
    """Return the factor on the peak learning rate for optimizer step ``step`` of a plan."""
    cycle = cycle_at(step, cycles)
    if step < cycle.warmup_end:
        return (step - cycle.start) / (cycle.warmup_end - cycle.start)
    if cycle.end is None or cycle.decay_start is None or step < cycle.decay_start or cycle.decay_start == cycle.end:
        return 1.0
    return decay_multiplier((step - cycle.decay_start) / (cycle.end - cycle.decay_start), shape, min_ratio)


def cycle_at(step: int, cycles: Sequence[Cycle]) -> Cycle:
    """Return the cycle of optimizer step ``step``, the last one after the end."""
    return next((cycle for cycle in cycles if cycle.end is None or step < cycle.end), cycles[-1])


def decay_length(decay: float, start: int) -> int:
    """Return the length in optimizer steps, at least 1, of a decay that was not planned and begins at ``start``.

    A share is of all steps when the decay is over: :math:`d` of them for :math:`D = s d / (1 - d)` after :math:`s`.
    """
    if isinstance(decay, int):
        return max(decay, 1)
    return max(math.floor(start * decay / (1 - decay) + 1e-9), 1)


def end_with_decay(cycles: Sequence[Cycle], step: int, length: int) -> tuple[Cycle, ...]:
    """Return the plan that ends as soon as it can with a decay, asked for at optimizer step ``step``.

    During a warmup the decay waits for its end. A decay that is under way is kept, whatever the length. A known end
    of the plan is not moved back.

    Args:
        cycles: The plan so far.
        step: The next optimizer step.
        length: Optimizer steps that the decay takes.
    """
    kept = [cycle for cycle in cycles if cycle.end is not None and cycle.end <= step]
    if len(kept) == len(cycles):
        return tuple(cycles)
    current = cycles[len(kept)]
    if current.decay_start is not None and step >= current.decay_start:
        return (*kept, current)
    start = max(step, current.warmup_end)
    last = cycles[-1].end
    end = start + length if last is None else min(start + length, last)
    return (*kept, Cycle(current.start, current.warmup_end, start, end))


def set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set a parameter group's learning rate, in place where it is a tensor that compiled steps read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def wsd_multiplier(
    step: int,
    total_steps: int | None,
    warmup: float = 0.01,
    decay: float = 0.1,
    shape: str = "inverse",
    min_ratio: float = 0.1,
    budgets: Sequence[int] | None = None,
) -> float:
    """Return the factor on the peak learning rate for optimizer step ``step`` (0 for the first update).

    The arguments are those of :func:`plan_cycles` and :func:`decay_multiplier`. After ``total_steps`` the factor
    stays at the floor.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """
    check_shape(shape, min_ratio)
    return plan_multiplier(step, plan_cycles(total_steps, warmup, decay, budgets), shape, min_ratio)


class WarmupStableDecayLR(LRScheduler):
    """The same numbers as a torch scheduler, for those who configure their own (``interval="step"`` in Lightning).

    On resume the arguments given now win and only the step count is taken from the checkpoint, so a longer or
    shorter horizon takes effect (torch's own schedulers restore the old one).

    Args:
        optimizer: The optimizer; each parameter group keeps its own peak, its ``initial_lr``.
        total_steps: Optimizer steps of the run, or ``None`` for an open horizon.
        warmup: As in :func:`plan_cycles`.
        decay: As in :func:`plan_cycles`.
        shape: One of :data:`SHAPES`.
        min_ratio: Floor, as a share of the peak.
        budgets: As in :func:`plan_cycles`.
        last_epoch: Index of the last step done, -1 to begin.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None,
        warmup: float = 0.01,
        decay: float = 0.1,
        shape: str = "inverse",
        min_ratio: float = 0.1,
        budgets: Sequence[int] | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_shape(shape, min_ratio)
        self._cycles = plan_cycles(total_steps, warmup, decay, budgets)
        self._shape = shape
        self._min_ratio = min_ratio
        super().__init__(optimizer, last_epoch)

    @override
    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group for the next update."""
        factor = plan_multiplier(self.last_epoch, self._cycles, self._shape, self._min_ratio)
        return [peak * factor for peak in self.base_lrs]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the step count; the schedule and the peaks are the constructor's."""
        return {"last_epoch": self.last_epoch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the step count and set the rates that the present settings give for it."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            set_rate(group, rate)


def _checked_budgets(budgets: Sequence[int] | None, total_steps: int | None) -> list[int]:
    """Return the budgets as a list, after checking them against each other and the end of the run."""
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise ValueError(f"total_steps={total_steps!r} is not a positive number of optimizer steps (int).")
    if budgets is not None and not isinstance(budgets, Sequence):
        raise ValueError(f"budgets={budgets!r} is not a list of step counts, such as [1000, 2000].")
    values = list(budgets or ())
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"budgets={values!r} holds {value!r}: give positive step counts (int).")
    if any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError(f"budgets={values!r} is not increasing: list the step counts in increasing order, each once.")
    if total_steps is not None and values and values[-1] > total_steps:
        raise ValueError(
            f"budgets={values!r} holds {values[-1]}, beyond the end of the run at {total_steps} optimizer steps. "
            "Train longer (max_steps, max_epochs) or drop that budget."
        )
    return values


def _plan_cycle(start: int, end: int | None, warmup: float, decay: float) -> Cycle:
    """Lay out the cycle from ``start`` to ``end``."""
    if end is None:
        if isinstance(warmup, float) and warmup > 0:
            raise ValueError(
                f"warmup={warmup!r} is a share of a run whose length is not known. Give the warmup in optimizer steps "
                "(an int), or the length by total_steps, max_steps or a sized train dataloader with max_epochs."
            )
        return Cycle(start, start + int(warmup), None, None)
    length = end - start
    warmup_steps, decay_steps = _steps(warmup, length), _steps(decay, length)
    if warmup_steps + decay_steps > length:
        raise ValueError(
            f"warmup={warmup!r} and decay={decay!r} take {warmup_steps} + {decay_steps} optimizer steps, more than the "
            f"{length} between steps {start} and {end}. Shorten them, or give that stretch more steps."
        )
    return Cycle(start, start + warmup_steps, end - decay_steps, end)


def _steps(length: float, cycle: int) -> int:
    """Return a length in steps; a share is rounded down, after undoing the last bits that 0.29 * 100 loses."""
    return length if isinstance(length, int) else math.floor(length * cycle + 1e-9)
