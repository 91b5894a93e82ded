r"""LAE: adapters that learn task after task, a slow copy of them that remembers, and a prediction by both.

Use it to fine-tune a pretrained model on a stream of tasks with adapters, such as PEFT's LoRA, or with any other named
group of weights. Use :class:`.EMA` to average all weights and evaluate the average alone. Cost: one copy of the
adapters, one fused pass over them for each step, and in validation, test and prediction a second forward pass.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import LAE
    >>> lae = LAE(parameters=["*lora_*"], calibration_steps=300, task_steps=[500, 1000])
    >>> trainer = Trainer(callbacks=[lae], logger=False, enable_checkpointing=False)
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._ensemble import EvaluationEnsemble
from lightning_stable.callbacks._gradients import GradientTransform, OptimizerStep
from lightning_stable.callbacks._host import run_first
from lightning_stable.callbacks._tasks import TaskClock
from lightning_stable.functional._settings import check_count
from lightning_stable.functional.ema import check_decay
from lightning_stable.functional.lae import accumulate, ensemble_logits, init_offline

__all__ = ["LAE"]

_MOST_NAMES = 8


class LAE(GradientTransform):
    r"""Learning, accumulation, ensemble, for adapters on a stream of tasks (arXiv 2303.10070).

    The adapters that train (online) have a copy (offline) from the second task on, which begins as they are when the
    first task ends and follows slowly: :math:`\bar\theta \leftarrow \beta\bar\theta + (1-\beta)\theta` after each
    optimizer step. For the first steps of each task from the second on the adapters stand still, so that the head
    adapts first. Validation, test and prediction are given, as the head's output, the logarithm of the larger of both
    probabilities for each class: :math:`\max(\mathrm{softmax}(z), \mathrm{softmax}(\bar z))`.

    What the loss is taken over, in the paper only the present task's classes, is the module's business.

    Args:
        parameters: Patterns of the adapters' names, such as ``["*lora_*"]``; those of them that train are meant.
        decay: :math:`\beta`, the share of the offline copy that is kept at each optimizer step, in [0, 1).
        calibration_steps: Optimizer steps at the start of each task from the second on for which the adapters stand
            still. The paper: three epochs of five.
        ensemble: Whether evaluation sees both sets of adapters, or the online ones alone.
        logits: Dotted name of the submodule that puts the logits out, classes last, or an object that holds them as
            ``.logits``. ``None``: the last ``nn.Linear`` that feeds the loss that ``training_step`` returns, or if
            it returns none under manual optimisation, that ran in it.
        task_steps: Optimizer steps of the fit after which tasks 1, 2, ... begin. ``None``: what :meth:`start_task`
            says, the datamodule's ``current_task``, or one task for each fit.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit if a pattern matches no
            parameter that trains, for a sharded strategy, LBFGS or an unknown submodule; in training if no head is
            found; in evaluation if its output is no logits.
    """

    def __init__(
        self,
        parameters: Sequence[str],
        decay: float = 0.9999,
        calibration_steps: int = 0,
        ensemble: bool = True,
        logits: str | None = None,
        task_steps: list[int] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(parameters, str) or not parameters or not all(isinstance(name, str) for name in parameters):
            raise ValueError(f"parameters={parameters!r} of LAE is not a list of patterns such as ['*lora_*'].")
        check_decay("decay", decay)
        check_count("calibration_steps", calibration_steps, 0, "optimizer steps")
        self.parameters = list(parameters)
        self.decay = decay
        self.calibration_steps = calibration_steps
        self.ensemble = ensemble
        self.logits = logits
        self.task_clock = TaskClock("LAE", task_steps)
        self._ensemble = EvaluationEnsemble("LAE", logits, ensemble_logits)
        self._online: dict[str, Tensor] = {}
        self._offline: dict[str, Tensor] = {}
        self._head: str | None = logits
        # Optimizer steps of the present task.
        self._steps = 0
        self._last_step = 0

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            run_first(trainer, self)  # what looks at the module after a step is to find the copy of this step
            self.task_clock.begin(trainer, pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING:
            self.task_clock.forget()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._online = self._adapters(pl_module)
        if self._restored is not None:
            # Before the host's sanity check, which is to see the ensemble, too.
            self._take_over(self._restored)
            self._restored = None
        self._offline = _placed(self._offline, self._online)
        self._attach(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_step = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.task_clock.advance(trainer):
            return
        self._steps = 0
        self._online = self._adapters(pl_module)
        self._offline = _placed(self._offline, self._online)
        fresh = {name: value for name, value in self._online.items() if name not in self._offline}
        self._offline |= dict(zip(fresh, init_offline(list(fresh.values())), strict=True))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self._steps += 1
        live = [self._online[name] for name in self._offline]
        accumulate(list(self._offline.values()), live, self.decay)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_alone(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_alone(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach_alone(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._detach()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._detach()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.task_clock.tell_of_one_task()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "offline": dict(self._offline),
            "steps": self._steps,
            "head": self._ensemble.head if self._ensemble.attached else self._head,
            "task_clock": self.task_clock.state_dict(),
        }

    # ------------------------------------------------------------------ for users

    @property
    def offline(self) -> dict[str, Tensor]:
        """The offline copy of the adapters by name; empty before the second task."""
        return dict(self._offline)

    def start_task(self, task: int) -> None:
        """Say which task is trained on from the next batch on, counted from 0."""
        self.task_clock.ask(task)

    @override
    def reset(self) -> None:
        """Forget the offline copy: the next change of task begins a new one."""
        self._offline, self._head, self._steps = {}, self.logits, 0

    # ------------------------------------------------------------------ for strategies whose workers differ

    def worker_tensors(self) -> list[Tensor]:
        """Return the offline copy, which follows the mean weights once it is itself averaged over workers."""
        return list(self._offline.values())

    # ------------------------------------------------------------------ helpers

    @override
    def _transform(self, step: OptimizerStep) -> None:
        if not self._offline or self._steps >= self.calibration_steps:
            return
        for name, parameter in step.parameters.items():
            if name in self._online:
                # An optimizer skips it, with momentum and weight decay; a gradient of 0 would let both move it.
                parameter.grad = None

    @override
    def _take_over(self, state: dict[str, Any]) -> None:
        self._offline, self._steps, self._head = dict(state["offline"]), state["steps"], state["head"]
        self.task_clock.load_state_dict(state["task_clock"])

    def _adapters(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the adapters that train, by name.

        Raises:
            ValueError: If a pattern matches none.
        """
        trained: dict[str, Tensor] = {
            n: p for n, p in pl_module.named_parameters() if p.requires_grad and p.is_floating_point()
        }
        for pattern in self.parameters:
            if not any(fnmatchcase(name, pattern) for name in trained):
                names = ", ".join(map(repr, list(trained)[:_MOST_NAMES])) or "none"
                raise ValueError(
                    f"LAE: the pattern {pattern!r} in parameters matches no parameter of {type(pl_module).__name__} "
                    f"that trains. The first of those are {names}. Adapters have to be in the module when fit starts."
                )
        return {n: p for n, p in trained.items() if any(fnmatchcase(n, pattern) for pattern in self.parameters)}

    def _attach(self, pl_module: LightningModule) -> None:
        """Let the module evaluate with both sets of adapters."""
        if self.ensemble:
            self._ensemble.attach(pl_module, lambda: _as_live(self._offline, pl_module), self._head)

    def _attach_alone(self, pl_module: LightningModule) -> None:
        """Do so where nothing is trained, with the copy of the checkpoint or else of the last fit of this module."""
        if self._ensemble.attached or not self.ensemble:
            return
        state = self._restored
        if state is None and (self._module is None or self._module() is not pl_module):
            return
        offline, head = (self._offline, self._head) if state is None else (state["offline"], state["head"])
        present = _placed(offline, dict(pl_module.named_parameters()))
        if present and head is not None:
            self._ensemble.attach(pl_module, lambda: _as_live(present, pl_module), head)

    def _detach(self) -> None:
        """Take wraps and hooks off the module, and forget what was loaded for a validation or a test."""
        if self._ensemble.attached and self._online:
            self._head = self._ensemble.head
        self._ensemble.detach()
        self._online, self._restored = {}, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        ensemble = EvaluationEnsemble("LAE", self.logits, ensemble_logits)
        return {**super().__getstate__(), "_ensemble": ensemble, "_online": {}}


def _placed(offline: Mapping[str, Tensor], online: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the copies of the weights that are there, on their devices."""
    return {
        name: value.to(online[name].device)
        for name, value in offline.items()
        if name in online and online[name].shape == value.shape
    }


def _as_live(offline: Mapping[str, Tensor], pl_module: LightningModule) -> dict[str, Tensor]:
    """Return the copies in the precision of the live weights."""
    live = dict(pl_module.named_parameters())
    return {name: value.to(live[name].dtype) for name, value in offline.items() if name in live}
