"""What the tests of L2Anchor, EWC and LwF share: a loop by hand over tasks, a fit for each task, two processes."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from gradients import NetWith, weights
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_stable.callbacks.ewc import EWC
from lightning_stable.callbacks.l2_anchor import L2Anchor
from lightning_stable.callbacks.lwf import LwF
from lightning_stable.testing.harness import Net, Run, SaveAt, Stream, fit
from lightning_stable.testing.streams import BATCHES

Batch = tuple[Tensor, ...]
# A run of 14 steps, of tasks of 5, 4 and 5 steps.
STEPS, SWITCHES = 14, [5, 9]
HOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.4},
    "accumulation and clipping": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.4},
}


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.05)


class ByHand:
    """A training loop without the host, with the penalty or the term in the loss.

    Args:
        term: What each micro-batch's loss has besides, called with the module and the batch.
        at_switch: Called with the module and the batches of the task that ended.
    """

    def __init__(
        self,
        term: Callable[[nn.Module, Batch], Tensor | float],
        at_switch: Callable[[nn.Module, list[Batch]], None],
        module: Net | None = None,
    ) -> None:
        self.besides, self.at_switch = term, at_switch
        self.module = Net(norm=False) if module is None else module

    def run(self, accumulate_grad_batches: int = 1, gradient_clip_val: float | None = None) -> dict[str, Tensor]:
        module, stream, task = self.module, Stream(), []
        optimizer = SGD(
            [{"params": module.body.parameters(), "lr": 0.05}, {"params": module.head.parameters(), "lr": 0.02}],
            lr=0.05,
            momentum=0.9,
        )
        module.train()
        groups = [range(first, first + accumulate_grad_batches) for first in range(0, BATCHES, accumulate_grad_batches)]
        for step in range(STEPS):
            if step in SWITCHES:
                self.at_switch(module, task)
                task = []
            optimizer.zero_grad()
            for index in groups[step % len(groups)]:
                batch = stream.batch(index)
                task.append(batch)
                loss = module.loss(batch) + self.besides(module, batch)
                (loss / accumulate_grad_batches).backward()
            if gradient_clip_val is not None:
                nn.utils.clip_grad_norm_(module.parameters(), gradient_clip_val)
            optimizer.step()
        return weights(module)


def fit_tasks(plugins: list[Any], module: Any = None, **settings: Any) -> Run:
    """The fit that :class:`ByHand` is compared with."""
    settings = {"max_steps": STEPS, "limit_val_batches": 0, **settings}
    return fit(plugins, module=Net(norm=False) if module is None else module, **settings)


def loader(first: int, last: int) -> DataLoader:
    stream = Stream(STEPS)
    batches = [stream.batch(index) for index in range(first, last)]
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    return DataLoader(dataset, batch_size=len(batches[0][0]), generator=torch.Generator())


def one_fit(plugin: Callback) -> Run:
    """All tasks in one fit, whose steps say where they begin."""
    return fit([plugin], module=NetWith(sgd, norm=False), train=loader(0, STEPS), max_epochs=1)


def a_fit_for_each_task(plugin: Callback) -> Run:
    """A fit for each task, with a new Trainer each."""
    module = NetWith(sgd, norm=False)
    for first, last in ((0, 5), (5, 9), (9, 14)):
        run = fit([plugin], module=module, train=loader(first, last), max_epochs=1)
    return run


def resumed(make: Callable[[], Callback], cut: int, module: Callable[[], Any], path: str) -> tuple[Run, Run]:
    """A run without a break, and one that goes on from a checkpoint with new objects."""
    straight = fit_tasks([make(), SaveAt(cut, path)], module=module())
    return straight, fit_tasks([make(), SaveAt(STEPS + 1, path)], module=module(), ckpt_path=path)


# What is trained in two processes and in one, by name.
ELASTIC: dict[str, Any] = {"lam": 2.0, "decay": 0.9, "samples": 12, "log_every_n_steps": 1, "task_steps": SWITCHES}
SHARED: dict[str, Callable[[], Callback]] = {
    "l2_anchor": lambda: L2Anchor(lam=0.3, log_every_n_steps=1, task_steps=SWITCHES),
    "ewc": lambda: EWC(**ELASTIC),
    "lwf": lambda: LwF(lam=2.0, logits="head", task_steps=SWITCHES),
}


def shared_job(name: str, norm: bool = False) -> dict[str, Any]:
    """Run in each of two processes."""
    os.chdir(tempfile.mkdtemp())
    plugin = SHARED[name]()
    run = fit_tasks([plugin], module=Net(norm=norm), devices=2, strategy="ddp")
    return {
        "weights": weights(run.module),
        "state": plugin.state_dict(),
        "logged": run.logged,
    }
