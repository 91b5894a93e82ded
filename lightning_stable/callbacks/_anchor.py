"""What callbacks share that hold weights near where the last task left them: which weights, when, and the pull."""

from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._gradients import GradientTransform, OptimizerStep
from lightning_stable.callbacks._reports import report
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.functional._settings import check_count, check_not_negative
from lightning_stable.functional.l2_anchor import add_anchor_gradient, anchor_penalty

__all__ = ["WeightAnchor"]

_MOST_NAMES = 12


class WeightAnchor(GradientTransform):
    """Add to each gradient that of a quadratic penalty around the weights the last task ended with.

    A subclass says what becomes of a task that has ended (:meth:`_end_task`), and keeps ``_anchor`` and, where entries
    differ in importance, ``_importance``, both by the parameters' names. Its public arguments are documented there.
    """

    # What the logged penalty is called, with "/penalty" after it.
    log_name: str

    def __init__(
        self,
        *,
        lam: float,
        parameters: Sequence[str] | None,
        log_every_n_steps: int,
        task_steps: list[int] | None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_not_negative("lam", lam, "the weight of the penalty in the loss")
        check_count("log_every_n_steps", log_every_n_steps, 1, "optimizer steps")
        if parameters is not None and (
            isinstance(parameters, str) or not parameters or not all(isinstance(name, str) for name in parameters)
        ):
            raise ValueError(
                f"parameters={parameters!r} of {owner} is not a list of patterns such as ['backbone.*']. None (null in "
                "YAML) holds all parameters that train."
            )
        self.lam = lam
        self.parameters = None if parameters is None else list(parameters)
        self.log_every_n_steps = log_every_n_steps
        self.task_clock = TaskClock(owner, task_steps)
        self._anchor: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] | None = None
        self._told = False

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _end_task(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Take in the task that has ended at the module's present weights; ``batch`` is the next one's first."""

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.task_clock.begin(trainer, pl_module)
            self._told = False

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            self.task_clock.forget()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.task_clock.advance(trainer) and self.lam != 0:
            self._end_task(trainer, pl_module, batch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.lam != 0:
            self.task_clock.tell_of_one_task()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task_clock.state_dict(), "anchor": dict(self._anchor)}

    # ------------------------------------------------------------------ for users

    def start_task(self, task: int) -> None:
        """Say that from the next batch on this task is trained on.

        Args:
            task: Its number, from 0.

        Raises:
            ValueError: If it is no whole number from 0 on.
        """
        self.task_clock.ask(task)

    @override
    def reset(self) -> None:
        """Let go of the weights: nothing is held until the next task ends."""
        self._anchor = {}

    # ------------------------------------------------------------------ for strategies whose workers differ

    def worker_tensors(self) -> list[Tensor]:
        """Return the weights that are held to: each worker's own at the end of the task, until they are averaged.

        The pull is linear in them, so the workers' mean is pulled to their mean all the same.
        """
        return list(self._anchor.values())

    # ------------------------------------------------------------------ helpers

    @override
    def _take_over(self, state: dict[str, Any]) -> None:
        self.task_clock.load_state_dict(state["task"])
        self._anchor = dict(state["anchor"])

    @override
    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live = dict(pl_module.named_parameters())
        for pattern in self.parameters or []:
            if not any(fnmatchcase(name, pattern) for name in live):
                names = ", ".join(map(repr, list(live)[:_MOST_NAMES]))
                raise ValueError(
                    f"{type(self).__name__}: the pattern {pattern!r} in parameters matches no parameter of "
                    f"{type(pl_module).__name__}. Its first parameters are {names}."
                )
        for held in (self._anchor, self._importance or {}):
            held |= {name: value.to(live[name].device) for name, value in held.items() if name in live}

    def _selected(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the parameters that are to be held, frozen ones too, by name."""
        return {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if parameter.is_floating_point() and self._is_selected(name)
        }

    def _is_selected(self, name: str) -> bool:
        return self.parameters is None or any(fnmatchcase(name, pattern) for pattern in self.parameters)

    @override
    def _transform(self, step: OptimizerStep) -> None:
        held = {name: weight for name, weight in step.parameters.items() if name in self._anchor}
        other = [name for name, weight in held.items() if weight.shape != self._anchor[name].shape]
        if other and not self._told:
            self._told = True
            rank_zero_info(
                f"{type(self).__name__}: {', '.join(map(repr, other[:_MOST_NAMES]))} had another shape when the last "
                "task ended and move freely until the next one does."
            )
        names = [name for name in held if name not in other]
        if self.lam == 0 or not names:
            return
        weights = [step.parameters[name] for name in names]
        anchors = [self._anchor[name] for name in names]
        importance = None if self._importance is None else [self._importance[name] for name in names]
        trainer = step.trainer
        if (trainer.global_step // max(1, len(trainer.optimizers)) + 1) % self.log_every_n_steps == 0:
            penalty = anchor_penalty(weights, anchors, self.lam, importance)
            report(trainer, {step.name(f"{self.log_name}/penalty"): penalty}, trainer.global_step)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        add_anchor_gradient(gradients, weights, anchors, self.lam, importance)
