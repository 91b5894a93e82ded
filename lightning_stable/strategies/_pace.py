"""How many local steps hide one exchange, measured at the start of a run."""

import time

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_stable.functional.local_update import steps_that_hide
from lightning_stable.strategies._expectations import warn_of_checkpoints
from lightning_stable.strategies._flat import FlatBuffers
from lightning_stable.strategies._workers import Workers

__all__ = ["MEASURED_STEPS", "Pace"]

# The first steps pay for start-up; the median of the rest does not see a single pause.
_IGNORED_STEPS = 3
MEASURED_STEPS = 12
_MARGIN = 1.25


class Pace:
    """Times one exchange of the weights, and the first steps of a run, which are synchronous.

    Args:
        parameters: What is exchanged.
        workers: The groups to exchange over.
        message_dtype: Precision of what is sent; ``None`` for that of the weights.
    """

    def __init__(self, parameters: list[torch.Tensor], workers: Workers, message_dtype: torch.dtype | None) -> None:
        self._steps: list[float] = []
        buffers = FlatBuffers(parameters, multiple=workers.slices, dtype=message_dtype)
        # Once to open the connections, and once more for the time it takes.
        for _ in range(2):
            begun = _now()
            workers.launch(buffers).wait()
            self._transfer = _now() - begun
        self.begin_step()

    def begin_step(self) -> None:
        """Note that a step begins, or goes on after it has waited for others."""
        self._begun = _now()

    def end_step(self) -> None:
        """Note that a step has ended."""
        self._steps.append(_now() - self._begun)

    def choose(self, workers: Workers, trainer: Trainer) -> int:
        """Return and tell the fewest steps that hide an exchange, with a margin, the same on every rank."""
        timed = sorted(self._steps[_IGNORED_STEPS:])
        # The largest of the negative is the shortest step: where workers differ, the fastest has the least to hide in.
        transfer, step = workers.largest([self._transfer, -timed[len(timed) // 2]])
        steps = steps_that_hide(transfer, -step, _MARGIN)
        rank_zero_info(
            f"{workers.owner}: an exchange takes {1e3 * transfer:.1f} ms and a step {-1e3 * step:.1f} ms, so a round "
            f"has {steps} local steps."
        )
        warn_of_checkpoints(workers.owner, steps, trainer)
        return steps


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
