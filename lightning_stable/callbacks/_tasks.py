"""Which task is trained on: said by the user, by steps, by the datamodule, or by one fit after the other."""

import itertools
import weakref
from bisect import bisect_right
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

__all__ = ["TaskClock"]

# Orders what users ask for between fits, of whichever callbacks.
_order = itertools.count(1)


class TaskClock:
    """The task that a module is trained on, from 0, for callbacks that act when it changes.

    In this order it is: what ``start_task`` asked for last, on any callback of the Trainer that has a clock; the number
    of ``task_steps`` that have passed, of any such callback; the datamodule's ``current_task``; the number of fits that
    this module has been through with any such callback, where a fit that is resumed stays in the task of its
    checkpoint. What was asked for after the last fit and before the present one wins over what a checkpoint has.

    Args:
        owner: Class name of the callback, for messages.
        task_steps: Optimizer steps of the fit after which tasks 1, 2, ... begin; ``None`` leaves it to the others.

    Attributes:
        task: The present task.
        previous: The task before it; ``None`` before any switch.
        task_steps: As given.

    Raises:
        ValueError: If the steps are not increasing whole numbers from 1 on.
    """

    def __init__(self, owner: str, task_steps: list[int] | None = None) -> None:
        self._owner = owner
        self.task_steps = None if task_steps is None else _checked(owner, task_steps)
        self.task = 0
        self.previous: int | None = None
        # What was asked for, after its number among all that was asked of the Trainer's clocks.
        self._asked: tuple[int, int] | None = None
        # The same, asked between fits: it has its number at the first batch, when all checkpoints have been read.
        self._unnumbered: tuple[int, int] | None = None
        self._begun = False
        self._next_fit = False
        self._told = False
        self._module: weakref.ref[LightningModule] | None = None
        # That of the present fit from its first batch on.
        self._trainer: weakref.ref[Trainer] | None = None

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for a fit, in ``setup``: another module than before starts at task 0.

        Raises:
            ValueError: If another callback of the Trainer was given other ``task_steps``.
        """
        for other in _clocks(trainer):
            if None not in (self.task_steps, other.task_steps) and self.task_steps != other.task_steps:
                raise ValueError(
                    f"{self._owner} was given task_steps={self.task_steps} and {other._owner} "
                    f"task_steps={other.task_steps}. Give both the same, or only one of them any."
                )
        if self._module is None or self._module() is not pl_module:
            self.forget()
            self._module = weakref.ref(pl_module)
        self._next_fit, self._trainer = self._begun, None

    def forget(self) -> None:
        """Forget what an earlier fit left, before a checkpoint is loaded; what was asked for since then stays."""
        self.task, self.previous = 0, None
        self._asked, self._begun, self._next_fit = None, False, False

    def ask(self, task: int) -> None:
        """Say which task is trained on from the next batch on.

        Raises:
            ValueError: If ``task`` is no whole number from 0 on.
        """
        if isinstance(task, bool) or not isinstance(task, int) or task < 0:
            raise ValueError(f"{self._owner}.start_task({task!r}): a task is a whole number from 0 on.")
        self._unnumbered = (next(_order), task)
        trainer = None if self._trainer is None else self._trainer()
        in_fit = (TrainerFn.FITTING, TrainerStatus.RUNNING)
        if trainer is not None and (trainer.state.fn, trainer.state.status) == in_fit:
            self._number(trainer)

    def advance(self, trainer: Trainer) -> bool:
        """Find out the task of the batch that is about to be trained on, in ``on_train_batch_start``.

        Returns:
            Whether it is another task than that of the batch before. Weights are still those it ended with.
        """
        self._trainer = weakref.ref(trainer)
        self._number(trainer)
        task = self._present(trainer)
        self._next_fit = False
        changed = self._begun and task != self.task
        if changed:
            self.previous = self.task
        self.task, self._begun = task, True
        return changed

    def tell_of_one_task(self) -> None:
        """Say, once, that there was no second task: what acts from there on has done nothing."""
        if self._begun and self.previous is None and not self._told:
            self._told = True
            rank_zero_info(
                f"{self._owner}: there was one task so far, and it acts from the second on. Fit again with this "
                "object, or say where tasks begin: by task_steps, start_task(...) or a datamodule that names its tasks."
            )

    def names(self, trainer: Trainer) -> list[str] | None:
        """Return the names of the tasks, if the datamodule knows them."""
        names = getattr(_datamodule(trainer), "task_names", None)
        return None if names is None else [str(name) for name in names]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, safe to load."""
        # Asked between two fits and saved before the second: numbered in the checkpoint alone.
        trainer = None if self._trainer is None else self._trainer()
        asked = self._numbers(trainer).get(self, self._asked)
        return {
            "task": self.task,
            "previous": self.previous,
            "begun": self._begun,
            "asked": None if asked is None else list(asked),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the fit that it is loaded for continues its task."""
        self.task, self.previous, self._begun = state["task"], state["previous"], state["begun"]
        self._asked = None if state["asked"] is None else (state["asked"][0], state["asked"][1])
        self._next_fit = False

    def _number(self, trainer: Trainer) -> None:
        """Number what was asked for since the last fit."""
        for clock, asked in self._numbers(trainer).items():
            clock._asked, clock._unnumbered = asked, None

    def _numbers(self, trainer: Trainer | None) -> dict["TaskClock", tuple[int, int]]:
        """Return the numbers of what was asked for since the last fit: it is later than all that has a number."""
        clocks = dict.fromkeys([self, *([] if trainer is None else _clocks(trainer))])
        last = max((clock._asked[0] for clock in clocks if clock._asked is not None), default=0)
        waiting = [(*clock._unnumbered, clock) for clock in clocks if clock._unnumbered is not None]
        ordered = enumerate(sorted(waiting, key=lambda found: found[0]), start=last + 1)
        return {clock: (number, task) for number, (_, task, clock) in ordered}

    def _present(self, trainer: Trainer) -> int:
        """Return the task, from the first source that knows it."""
        clocks = [self, *_clocks(trainer)]
        asked = [clock._asked for clock in clocks if clock._asked is not None]
        if asked:
            return max(asked)[1]
        steps = next((clock.task_steps for clock in clocks if clock.task_steps is not None), None)
        if steps is not None:
            # The host adds up the steps of all optimizers.
            return bisect_right(steps, trainer.global_step // max(1, len(trainer.optimizers)))
        named = getattr(_datamodule(trainer), "current_task", None)
        if named is not None:
            return int(named)
        # A callback that joins in a later fit has not seen those before it.
        return max(clock.task + clock._next_fit for clock in clocks)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None, "_trainer": None}


def _clocks(trainer: Trainer) -> list[TaskClock]:
    """Return the clocks of all callbacks of a Trainer."""
    found = [getattr(callback, "task_clock", None) for callback in cast(Any, trainer).callbacks]
    return [clock for clock in found if isinstance(clock, TaskClock)]


def _datamodule(trainer: Trainer) -> Any:
    """Return the datamodule of a fit, if it has one."""
    return getattr(trainer, "datamodule", None)


def _checked(owner: str, task_steps: list[int]) -> list[int]:
    """Return the steps as a list."""
    steps = list(task_steps)
    whole = all(isinstance(step, int) and not isinstance(step, bool) and step > 0 for step in steps)
    if not whole or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(
            f"{owner}: task_steps={task_steps!r} has to be increasing numbers of optimizer steps from 1 on: those "
            "after which tasks 1, 2, ... begin."
        )
    return steps
