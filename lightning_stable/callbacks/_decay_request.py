"""Tells when a decay is asked for from outside the program: by a file, or by the Trainer's ``max_time`` coming near."""

import math
import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lightning_stable.functional.wsd import decay_length

__all__ = ["OutsideRequest"]

# The measured step time is taken this much longer, so that a decay that has to end at max_time ends before it.
_TIME_MARGIN = 1.1
# Seconds kept free besides: a tenth of a short decay is no margin.
_TIME_RESERVE = 1.0


class OutsideRequest:
    """Looks for the file and at the clock.

    The pace is the mean time of an optimizer step since the first one of the fit, with a margin. Where the time left is
    too short for the whole decay, it is as long as there is time for.

    Args:
        decay: Length of a decay, in optimizer steps (int) or as a share of all steps when it is over (float).
        decay_on: Path of the file, if any.
    """

    def __init__(self, decay: float, decay_on: str | None) -> None:
        self._decay = decay
        self._decay_on = decay_on
        self._first: tuple[float, int] | None = None

    def begin(self) -> None:
        """Begin to measure anew, for a fit."""
        self._first = None

    def note_step(self, step: int) -> None:
        """Note that optimizer step ``step`` is done; the first one pays for start-up and is not part of the pace."""
        if self._first is None:
            self._first = (time.monotonic(), step)

    def length(self, trainer: Trainer, step: int, start: int) -> int | None:
        """Return the length of a decay from optimizer step ``start`` that is asked for, as the first process sees it.

        Args:
            trainer: Asked for its timers. Every process has to come here at the same steps.
            step: The next optimizer step.
            start: Where the decay would begin, later than ``step`` during a warmup.
        """
        timers = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, Timer)]
        if self._decay_on is None and not timers:
            return None
        whole = decay_length(self._decay, start)
        length = whole if self._decay_on is not None and Path(self._decay_on).exists() else None
        remaining = min((left for timer in timers if (left := timer.time_remaining()) is not None), default=None)
        # In a warmup there is nothing to decide yet, and the pace gets better known.
        if remaining is not None and self._first is not None and step > self._first[1] and step == start:
            pace = _TIME_MARGIN * (time.monotonic() - self._first[0]) / (step - self._first[1])
            room = math.floor((remaining - _TIME_RESERVE) / pace) - 1 if pace > 0 else whole + 1
            if room <= whole:
                length = max(min(whole, room), 1)
        if trainer.world_size == 1:
            return length
        agreed: int | None = trainer.strategy.broadcast(length)
        return agreed
