"""Teacher Intervention in a simulated precision: a pass of the teacher before each step, and its outputs put in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.quiet import QuietPass, loss_of, own_loss, quiet_depth
from lightning_stable.functional.simulated import matches, quantized_layers
from lightning_stable.functional.teacher_intervention import inject, keep, outermost
from lightning_stable.precision._first_batch import all_layers, why_not_again
from lightning_stable.precision._host import optimizer_steps, total_steps
from lightning_stable.precision._names import grouped
from lightning_stable.precision._parts import Part

__all__ = ["TeacherIntervention"]


class TeacherIntervention(Part):
    """Replaces outputs of modules, for the first steps of a fit, by those of a teacher that is not quantized.

    Args:
        owner: The class that is named in messages.
        patterns: Of the dotted names of modules; within one that matches no other is looked for.
        steps: For how many optimizer steps.
        weights: ``"start"``: the teacher has the weights that the module began with; ``"present"``: those of now.
        gradients: As of :func:`inject`.
    """

    def __init__(self, owner: str, patterns: list[str], steps: int, weights: str, gradients: str) -> None:
        super().__init__(owner)
        self._patterns = patterns
        self._steps = steps
        self._frozen = weights == "start"
        self._gradients = gradients
        self._weights: dict[str, Tensor] = {}
        self._over = False
        self._told = False
        self._names: list[str] = []
        self._mode = ""  # "teacher" or "student" while the step of one of them runs
        self._kept: dict[str, list[list[Tensor | None]]] = {}
        self._calls: dict[str, int] = {}
        self._training = False  # while the host runs a step that is trained on, not a callback of it
        self._passes = 0  # of the student over the present batch
        self._depth = 0  # within how many quiet passes the step runs, in which others may run passes of their own
        self._quiet = QuietPass()
        self._wrap: MethodWrap | None = None
        self._hooks: list[RemovableHandle] = []

    @override
    def line(self) -> str:
        patterns = ", ".join(map(repr, self._patterns))
        source = "the start" if self._frozen else "the step"
        return (
            f"Until optimizer step {self._steps} the outputs of {patterns} are those of a teacher, with the weights of "
            f"{source}."
        )

    @override
    def begin(self, pl_module: LightningModule) -> None:
        why_not = why_not_again(pl_module)
        if why_not is not None:
            raise ValueError(f"teacher_modules of {self._owner} needs a pass of the teacher, and {why_not}.")
        there = [name for name, _ in pl_module.named_modules() if name]
        self._names = outermost([name for name in there if matches(name, self._patterns)])
        for pattern in self._patterns:
            if not any(matches(name, [pattern]) for name in there):
                raise ValueError(
                    f"teacher_modules of {self._owner}: {pattern!r} matches no module of {type(pl_module).__name__}. "
                    f"Its modules are {grouped(there)}."
                )
        for name in self._names:
            hook = self._hook(pl_module, name)
            self._hooks.append(pl_module.get_submodule(name).register_forward_hook(hook))
        self._wrap = MethodWrap(pl_module, "training_step", self._around(pl_module))

    @override
    @contextmanager
    def step_context(self) -> Iterator[None]:
        before, self._training = self._training, True
        try:
            yield
        finally:
            self._training = before

    @override
    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._passes = 0
        self._tell_end(trainer)
        self._over = self._over or optimizer_steps(trainer) >= self._steps
        if self._over:
            self._weights = {}
            self.stop()
        elif self._frozen and not self._weights:
            self._weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._kept = {}
        if not self._over and optimizer_steps(trainer) >= self._steps:
            # At once, so that no checkpoint carries the teacher for nothing.
            self.before_batch(trainer, pl_module, None, 0)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self._weights} if self._weights else {}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights = dict(state.get("teacher", {}))

    @override
    def stop(self) -> None:
        self._mode, self._kept, self._calls = "", {}, {}
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        if self._wrap is not None:
            self._wrap.undo()
        self._wrap = None

    def _tell_end(self, trainer: Trainer) -> None:
        if self._told:
            return
        self._told, total = True, total_steps(trainer)
        if total is not None and self._steps >= total:
            rank_zero_warn(
                f"teacher_steps={self._steps} of {self._owner} is no shorter than training, which is over after "
                f"{int(total)} optimizer steps. The teacher's outputs are there in each of them, and what follows its "
                "modules never trains on their own outputs, which it gets in validation. Take fewer teacher_steps, or "
                "train for longer."
            )

    # ------------------------------------------------------------------ the two passes

    def _around(self, pl_module: LightningModule) -> Callable[..., Any]:
        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._training:
                return original(*args, **kwargs)
            self._teach(pl_module, *args, *kwargs.values())
            with self._as("student"):
                output = original(*args, **kwargs)
            self._check(output)
            return output

        return around

    def _teach(self, pl_module: LightningModule, batch: Any, batch_idx: int = 0, *rest: Any) -> None:
        self._kept = {name: [] for name in self._names}
        self._depth = quiet_depth(pl_module)
        self._passes += 1
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            self._quiet(pl_module),
            all_layers(quantized_layers(pl_module), enabled=False),
            self._teacher_weights(pl_module),
            self._as("teacher"),
        ):
            own_loss(pl_module, batch, batch_idx)

    @contextmanager
    def _as(self, mode: str) -> Iterator[None]:
        self._mode, self._calls = mode, dict.fromkeys(self._names, 0)
        try:
            yield
        finally:
            self._mode = ""

    @contextmanager
    def _teacher_weights(self, pl_module: LightningModule) -> Iterator[None]:
        """Let the parameters have the teacher's values; they stay the same objects, as optimizers and DDP hold them."""
        before = []
        try:
            for name, parameter in pl_module.named_parameters():
                if name in self._weights:
                    teacher = self._weights[name] = self._weights[name].to(parameter.device)
                    before.append((parameter, parameter.data))
                    parameter.data = teacher
            yield
        finally:
            for parameter, value in before:
                parameter.data = value

    def _hook(self, pl_module: LightningModule, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._mode == "teacher":
                self._kept[name].append(keep(output))
                return output
            if quiet_depth(pl_module) != self._depth or name not in self._kept:
                return output
            if self._mode == "student":
                call = self._calls[name]
                self._calls[name] += 1
                return self._replaced(name, call, output)
            if torch._C._current_graph_task_id() == -1 or not self._kept[name]:
                return output
            if self._passes > 1 or len(self._kept[name]) > 1:
                raise RuntimeError(
                    f"teacher_modules of {self._owner}: {name!r} runs several times in a step, and is computed again "
                    "in the backward pass, as activation checkpointing does, where it is not known for which of them. "
                    "Leave out the checkpointing, or this module."
                )
            return self._replaced(name, 0, output)

        # Lists that grow are no part of a compiled graph.
        return cast(Callable[..., Any], torch.compiler.disable(hook))  # type: ignore[no-untyped-call]

    def _replaced(self, name: str, call: int, output: Any) -> Any:
        if call >= len(self._kept[name]):
            raise ValueError(self._differs(name, call + 1))
        try:
            return inject(output, self._kept[name][call], self._gradients)
        except ValueError as error:
            raise ValueError(f"teacher_modules of {self._owner}, {name!r}: {error}") from error

    def _check(self, output: Any) -> None:
        for name, kept in self._kept.items():
            if self._calls[name] != len(kept):
                raise ValueError(self._differs(name, self._calls[name]))
        loss = loss_of(output)
        if loss is not None and torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"teacher_modules of {self._owner} with teacher_gradients={self._gradients!r} leaves nothing that the "
                "loss could train. Take teacher_gradients='through', or modules with something trained beside them."
            )

    def _differs(self, name: str, calls: int) -> str:
        return (
            f"teacher_modules of {self._owner}: {name!r} ran {len(self._kept[name])} times in the teacher's pass over "
            f"the batch and {calls} times in the module's own. It has to run alike in both: leave it out."
        )
