"""Where a run of local updates stands: steps, rounds, and whether the workers have moved apart."""

from collections.abc import Sequence
from typing import Any

from lightning_stable.functional.local_update import round_length

__all__ = ["Progress"]


class Progress:
    """Counts optimizer steps and rounds.

    Attributes:
        steps: Optimizer steps so far. With several optimizers, those of the one that has made the most.
        finished_rounds: Rounds that ended with an exchange.
        chosen_steps: The length of a round that was measured; 0 where it is given, or not measured yet.
        warmup_steps: Steps that come before the first round.
        warming_up: Steps are synchronous, and no round has begun.
        moved: A step was made since all workers were at one place.
        cut_rounds: Rounds that a checkpoint ended before their time.
        saved: The last checkpoint of this fit, and after how many steps it was saved.
    """

    def __init__(self, local_steps: int | Sequence[Sequence[int]] | str, warmup_steps: int) -> None:
        self.steps = 0
        self.finished_rounds = 0
        self.chosen_steps = 0
        self.warmup_steps = warmup_steps
        self.warming_up = warmup_steps > 0
        self.moved = False
        self.cut_rounds = 0
        self.saved: tuple[Any, int] | None = None
        self._local_steps = local_steps
        self._begun_at = 0
        self._made: dict[int, int] = {}

    @property
    def warmup_is_over(self) -> bool:
        """The last synchronous step has been made, and the first round has not begun."""
        return self.warming_up and self.steps >= self.warmup_steps

    @property
    def round_is_over(self) -> bool:
        """The present round has all its steps."""
        if self.warming_up:
            return False
        if isinstance(self._local_steps, str):
            return self.steps - self._begun_at >= self.chosen_steps
        return self.steps - self._begun_at >= round_length(self._local_steps, self._begun_at)

    def count(self, optimizer: int) -> None:
        """Count a step of the optimizer of this number."""
        self._made[optimizer] = self._made.get(optimizer, 0) + 1
        self.steps = max(self.steps, self._made[optimizer])
        self.moved = True

    def extend_warmup(self, steps: int) -> None:
        """Make at least so many more synchronous steps."""
        self.warmup_steps = max(self.warmup_steps, self.steps + steps)
        self.warming_up = True

    def begin_round(self) -> None:
        """A round begins with the next step, unless the warm-up goes on."""
        self.warming_up = self.steps < self.warmup_steps
        self._begun_at = self.steps

    def come_together(self, *, saving: bool) -> None:
        """All workers are at one place, and a round begins there: for a checkpoint, or because training is over."""
        self.cut_rounds += saving and not self.warming_up and self.steps > self._begun_at
        self.moved = False
        self.begin_round()

    def summary(self) -> str:
        """Say what became of the rounds."""
        if self.warming_up:
            return f"all {self.steps} steps were synchronous, since the warm-up has {self.warmup_steps}."
        text = (
            f"rounds that ended with an exchange: {self.finished_rounds}, cut short by a checkpoint: {self.cut_rounds}."
        )
        if self.cut_rounds > self.finished_rounds:
            return f"{text} Each checkpoint waits for the link: save after more steps than a round has."
        return text

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on from here has to know."""
        return {
            "steps": self.steps,
            "finished_rounds": self.finished_rounds,
            "chosen_steps": self.chosen_steps,
            "made": dict(self._made),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps = int(state["steps"])
        self.finished_rounds = int(state["finished_rounds"])
        self.chosen_steps = int(state["chosen_steps"])
        self._made = {int(number): int(steps) for number, steps in state["made"].items()}
        self.begin_round()
