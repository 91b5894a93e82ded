r"""How many local steps a round has, for the methods that exchange once a round.

A round of :math:`\tau` local optimizer steps hides an exchange of :math:`T` seconds, with steps of :math:`s` seconds,
where

.. math:: \tau\, s \ge \kappa\, T \quad\Rightarrow\quad \tau = \max\bigl(1, \lceil \kappa\, T / s \rceil\bigr)

:math:`\kappa` (``margin``, no unit) leaves room for a link that is slower at times. The rule is ours: the paper of CO2
(arXiv 2401.16265) gives none that we know of, it searched a small set.

A schedule of rounds is a list of pairs (first step, local steps). With an equal budget of exchanges, late ones are
worth more than early ones in A Single Merging Suffices (arXiv 2507.06542), where random neighbours exchange now and
then and all workers merge once at the end; here every exchange is over all workers.
"""

import itertools
import math
from collections.abc import Sequence
from typing import cast

from lightning_stable.functional._settings import check_count, check_not_negative, check_positive

__all__ = ["check_local_steps", "round_length", "steps_that_hide"]


def check_local_steps(local_steps: int | Sequence[Sequence[int]]) -> None:
    """Raise ``ValueError`` unless ``local_steps`` is a count from 1 on, or a schedule of them.

    A schedule is a list of pairs (first step, local steps). The first begins at step 0, the later ones at rising
    steps.
    """
    if not isinstance(local_steps, (list, tuple)):
        check_count("local_steps", cast("int", local_steps), 1, "optimizer steps")
        return
    if not local_steps:
        raise ValueError(
            "local_steps=[] has no entry. Give a count, or pairs (first step, local steps) from step 0 on."
        )
    firsts = []
    for pair in local_steps:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(
                f"local_steps has {pair!r}, which is not a pair of whole numbers (first step, local steps)."
            )
        check_count("the first step of a pair of local_steps", pair[0], 0, "optimizer steps")
        check_count("the local steps of a pair of local_steps", pair[1], 1, "optimizer steps")
        firsts.append(pair[0])
    if firsts[0] != 0:
        raise ValueError(
            f"local_steps={list(local_steps)!r} begins at step {firsts[0]}: the first pair must begin at step 0, "
            "so that every round has a length."
        )
    if any(later <= earlier for earlier, later in itertools.pairwise(firsts)):
        raise ValueError(
            f"local_steps={list(local_steps)!r}: the first steps {firsts} do not rise. Order the pairs by step."
        )


def round_length(local_steps: int | Sequence[Sequence[int]], step: int) -> int:
    """Return the local steps of a round that begins at ``step``.

    Args:
        local_steps: A count, or pairs (first step, local steps); the last pair whose first step is reached holds.
        step: Optimizer steps done when the round begins, from 0 on.

    Raises:
        ValueError: If ``local_steps`` is neither a count from 1 on nor such a schedule.
    """
    check_local_steps(local_steps)
    if isinstance(local_steps, int):
        return local_steps
    return next(steps for first, steps in reversed(local_steps) if first <= step)


def steps_that_hide(transfer_seconds: float, step_seconds: float, margin: float = 1.25) -> int:
    """Return the fewest local steps a round that take ``margin`` times as long as its exchange.

    Args:
        transfer_seconds: Duration of one exchange, from 0 on.
        step_seconds: Duration of one local step, above 0.
        margin: Factor on the exchange, above 0.

    Raises:
        ValueError: If a duration or the margin is outside its range.
    """
    check_not_negative("transfer_seconds", transfer_seconds, "the duration of one exchange")
    check_positive("step_seconds", step_seconds, "the duration of one local step")
    check_positive("margin", margin, "how many times the exchange a round must last")
    return max(1, math.ceil(margin * transfer_seconds / step_seconds))
