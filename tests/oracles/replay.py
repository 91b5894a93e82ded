"""Goes over a recorded run a second time: which micro-batches each optimizer step took, and the gradients they give.

A step's gradients are computed by a module that no plugin has touched, at the weights that the run recorded before the
step, so that an oracle can ask for them at other weights or with another loss. Buffers go on from step to step as in
the run: every micro-batch passes once through the module at the recorded weights.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_stable.testing.harness import Net, Run, Step
from lightning_stable.testing.streams import BATCHES, Stream

Weights = dict[str, Tensor]
Batch = tuple[Tensor, ...]


class WatchedNet(Net):
    """Keeps the output of its head, the logits of the last pass, and what the buffers were before that loss."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.empty(0)
        self.buffers_before: dict[str, Tensor] = {}
        self.head.register_forward_hook(self._keep)

    def loss(self, batch: Batch) -> Tensor:
        self.buffers_before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        return super().loss(batch)

    def _keep(self, head: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.logits = output


# Called with the replayed step, whose module has just given a micro-batch's loss, and that micro-batch's number.
Term = Callable[["ReplayedStep", int], Tensor]


class Replay:
    """The run's data, its kind of accumulation and its precision.

    Args:
        run: The run.
        rank: Go over the steps of this one of two processes, on its share of each batch.
        steps: What that process recorded; by default what the run did.
    """

    def __init__(self, run: Run, rank: int | None = None, steps: list[Step] | None = None) -> None:
        self.run = run
        self.rank = rank
        self.steps = run.steps if steps is None else steps
        self.accumulate = int(run.trainer.accumulate_grad_batches)
        self.bf16 = run.trainer.precision == "bf16-mixed"
        self.stream = Stream()
        self.module = WatchedNet()

    def __iter__(self) -> Iterator["ReplayedStep"]:
        order = [range(first, min(first + self.accumulate, BATCHES)) for first in range(0, BATCHES, self.accumulate)]
        for number, step in enumerate(self.steps):
            epoch, place = divmod(number, len(order))
            replayed = ReplayedStep(self, step, number, epoch, list(order[place]))
            yield replayed
            replayed.pass_on()

    def batch(self, epoch: int, index: int) -> Batch:
        """Return a micro-batch: the whole one, or the share that the process takes in this epoch."""
        whole = self.stream.batch(index)
        return whole if self.rank is None else tuple(part[(self.rank + epoch) % 2 :: 2] for part in whole)

    def precision(self) -> torch.autocast:
        """Return the context in which the run computed its losses."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)


class ReplayedStep:
    """One optimizer step.

    Attributes:
        step: What the run recorded.
        number: Its number, the steps before it.
        epoch: The epoch that it is in.
        indices: Numbers of the micro-batches that it took, within the epoch.
    """

    def __init__(self, replay: Replay, step: Step, number: int, epoch: int, indices: list[int]) -> None:
        self.replay = replay
        self.step = step
        self.number = number
        self.epoch = epoch
        self.indices = indices
        self.module = replay.module
        self._buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    @property
    def batches(self) -> list[Batch]:
        return [self.replay.batch(self.epoch, index) for index in self.indices]

    def gradients(self, weights: Weights | None = None, term: Term | None = None) -> Weights:
        """Return the raw gradients of the accumulated loss, of all that trains.

        Args:
            weights: Where to take them, by default where the step did.
            term: What each micro-batch's loss has besides, called after its pass.
        """
        self._begin(self.step.before if weights is None else weights)
        for index, batch in zip(self.indices, self.batches, strict=True):
            with self.replay.precision():
                loss = self.module.loss(batch)
                if term is not None:
                    loss = loss + term(self, index)
            (loss / self.replay.accumulate).backward()
        return {name: each.grad.clone() for name, each in self.module.named_parameters() if each.requires_grad}

    def losses(self) -> list[float]:
        """Return the loss of each micro-batch."""
        self._begin(self.step.before)
        with torch.no_grad(), self.replay.precision():
            return [float(self.module.loss(batch)) for batch in self.batches]

    def logits(self) -> list[Tensor]:
        """Return the output of the head for each micro-batch."""
        self._begin(self.step.before)
        found = []
        with torch.no_grad(), self.replay.precision():
            for batch in self.batches:
                self.module(batch[0])
                found.append(self.module.logits)
        return found

    def pass_on(self) -> None:
        """Leave the buffers as the run did."""
        self.losses()

    def _begin(self, weights: Weights) -> None:
        """Go back to where the step began, at given weights."""
        self.module.load_state_dict({**weights, **self._buffers})
        self.module.train()
        self.module.zero_grad(set_to_none=True)
