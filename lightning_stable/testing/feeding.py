"""A metric in a run: it is a part of the module, and something has to feed it, as a user's own code would.

The tasks are fixed batches. Their scores are minus the module's loss on them, weighted by a number that goes up and
down with the steps, so that scores fall and recover. The task that is learned changes after fixed optimizer steps,
while what is trained on stays the same, since a metric only sees scores.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

__all__ = ["CHANGES", "Feeder", "is_metric", "place", "scores", "task_at", "without_metric"]

CHANGES = (5, 10)
"""The optimizer steps after which another task begins."""
_SAMPLES = 8


def is_metric(plugin: Any) -> bool:
    """Tell whether a plugin is a metric."""
    return isinstance(plugin, (Metric, MetricCollection))


def task_at(step: int) -> int:
    """Return the task that is learned after so many optimizer steps."""
    return sum(step >= change for change in CHANGES)


def place(metric: Any, module: LightningModule, *, resumed: bool = False) -> None:
    """Make a metric a part of the module, as its author would.

    A metric goes on with what it holds. Whoever moves it to another module resets it, unless a checkpoint is about to
    say what it holds.
    """
    if getattr(module, "metric", None) is metric:
        return
    if not resumed:
        metric.reset()
    module.metric = metric.train()
    # Steps over all fits: each Trainer counts its own.
    module.register_buffer("metric_steps", torch.tensor(0))


def without_metric(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module, without that of a metric that was put on it."""
    return {name: value for name, value in module.state_dict().items() if not name.startswith("metric")}


def scores(module: nn.Module, tasks: range, step: int) -> dict[int, float]:
    """Return minus the weighted loss on each task's batch, in eval mode, and leave everything as it was."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    weight = next(module.parameters())
    found = {}
    with torch.no_grad():
        for task in tasks:
            x = torch.randn(_SAMPLES, weight.shape[1], generator=torch.Generator().manual_seed(task))
            outputs = module(x.to(weight.dtype)).float()
            loss = nn.functional.mse_loss(outputs, torch.sin(x.sum(1, keepdim=True)).expand_as(outputs))
            found[task] = -(1 + step % 4) * float(loss)
    for part, mode in training.items():
        part.training = mode
    return found


class Feeder(Callback):
    """Gives a metric the scores before the first optimizer step and after each, and logs what it says.

    Attributes:
        events: What the metric was told, as the brute-force twin takes it.
        said: What it said after each optimizer step.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.events: list[tuple[Any, ...]] = []
        self.said: dict[int, dict[str, float]] = {}
        self.step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(pl_module, 0)

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.step = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self.step:
            return  # gradients are being accumulated
        _steps(pl_module).add_(step - self.step)
        task = task_at(self.step)
        self._evaluate(pl_module, task)
        if task_at(step) != task:
            self.metric.end_task(task)
            self.events.append(("end", task))
            self._evaluate(pl_module, task_at(step))
        self.said[step] = {name: float(value) for name, value in self.metric.compute().items()}
        pl_module.log_dict({f"continual/{name}": value for name, value in self.said[step].items()})

    def _evaluate(self, module: LightningModule, task: int) -> None:
        step = int(_steps(module))
        # Every task up to the next one, which is not learned yet; at each third step only the present one.
        tasks = range(min(task + 2, 1 + len(CHANGES))) if step % 3 != 1 else range(task, task + 1)
        found = scores(module, tasks, step)
        self.metric.update(found, task, step)
        self.events.append(("scores", found, task, step))


def _steps(module: nn.Module) -> torch.Tensor:
    """Return the count of optimizer steps over all fits."""
    return module.get_buffer("metric_steps")
