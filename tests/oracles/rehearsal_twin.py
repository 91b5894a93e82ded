"""What a rehearsing run was given: a module that notes every batch of its training steps, and what they mean together.

Which samples are drawn is the plugin's own chance; that they come from the past, that no more of them are alive than
fit, and what the optimizer makes of them follows from the notes.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_stable.testing.harness import Net

Batch = tuple[Tensor, ...]


class NotingNet(Net):
    """Notes the batches of its training steps, with the number of the optimizer step that they belong to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.notes: list[tuple[int, Batch]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.notes.append((self.trainer.global_step, tuple(part.detach().clone() for part in batch)))
        return super().training_step(batch, batch_idx)

    def given(self, step: int) -> list[Batch]:
        """Return the batches of an optimizer step, in order."""
        return [batch for number, batch in self.notes if number == step]


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def samples(batch: Batch) -> list[bytes]:
    """Return each sample as bytes, to be looked up."""
    rows = zip(*(part.reshape(len(part), -1) for part in batch), strict=True)
    return [b"".join(value.contiguous().numpy().tobytes() for value in row) for row in rows]


class Past:
    """When each sample was given to training first, and in which tasks."""

    def __init__(self) -> None:
        self.tasks: dict[bytes, set[int]] = {}

    def add(self, batch: Batch, task: int) -> None:
        for sample in samples(batch):
            self.tasks.setdefault(sample, set()).add(task)
