"""A table of past predictions, one row a sample of the dataset and one slot an epoch, on the CPU."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stable.functional.trajectory_loss import group, top_k_groups

__all__ = ["PastRecords", "RecordTable", "available_memory"]


class PastRecords(NamedTuple):
    """What was recorded for a batch.

    Attributes:
        log_probs: Log-probabilities of shape (N, ..., classes), or (N, ..., k + 1) with ``classes``.
        classes: Indices of the k classes that stand on their own, of shape (N, ..., k), or ``None``.
        present: Whether there is a record, of shape (N,).
    """

    log_probs: Tensor
    classes: Tensor | None
    present: Tensor

    def regroup(self, log_probs: Tensor) -> Tensor:
        """Bring present log-probabilities into the classes of the record."""
        return log_probs if self.classes is None else group(log_probs, self.classes)


class RecordTable:
    """Log-probabilities of the last ``slots`` epochs.

    A sample's slot is read for the epoch ``slots`` ago just before it takes the present one, so as many slots do as
    epochs lie between.

    Args:
        slots: Epochs to keep.
        samples: Samples in the dataset.
        shape: Shape of one sample's log-probabilities, classes last.
        dtype: What they are stored in.
        top_k: Keep this many classes apart, and lump the rest; ``None`` for all.
    """

    def __init__(
        self, slots: int, samples: int, shape: Sequence[int], dtype: torch.dtype, top_k: int | None = None
    ) -> None:
        *between, classes = shape
        self.shape = tuple(shape)
        self.slots = slots
        self.top_k = top_k
        width = classes if top_k is None else top_k + 1
        self.log_probs = torch.zeros(slots, samples, *between, width, dtype=dtype)
        self.epochs = torch.full((slots, samples), -1, dtype=torch.int32)
        self.classes: Tensor | None = None
        if top_k is not None:
            self.classes = torch.zeros(slots, samples, *between, top_k, dtype=_index_dtype(classes))

    @staticmethod
    def bytes_needed(
        slots: int, samples: int, shape: Sequence[int], dtype: torch.dtype, top_k: int | None = None
    ) -> int:
        """Return the size of such a table."""
        *between, classes = shape
        row = classes * dtype.itemsize
        if top_k is not None:
            row = (top_k + 1) * dtype.itemsize + top_k * _index_dtype(classes).itemsize
        return slots * samples * (math.prod(between) * row + 4)

    def get(self, epoch: int, ids: list[int], device: torch.device) -> PastRecords:
        """Return what was recorded for samples in an epoch."""
        rows = (epoch % self.slots, torch.tensor(ids))
        classes = None if self.classes is None else self.classes[rows].to(device, torch.int64)
        # Normalised again: rounded probabilities do not add up to one, and a divergence could be negative.
        log_probs = self.log_probs[rows].to(device).float().log_softmax(-1)
        return PastRecords(log_probs, classes, (self.epochs[rows] == epoch).to(device))

    def put(self, epoch: int, ids: list[int], log_probs: Tensor) -> int:
        """Record samples, and return how many of them had been recorded in this epoch before.

        Args:
            epoch: The present epoch.
            ids: Dataset indices.
            log_probs: Log-probabilities of shape (N, ..., classes), on the CPU.
        """
        place = {sample: position for position, sample in enumerate(ids)}
        rows = (epoch % self.slots, torch.tensor(list(place)))
        repeated = len(ids) - len(place) + int((self.epochs[rows] == epoch).sum())
        values = log_probs[torch.tensor(list(place.values()))]
        if self.top_k is not None and self.classes is not None:
            values, classes = top_k_groups(values, self.top_k)
            self.classes[rows] = classes.to(self.classes.dtype)
        # Out of range would be stored as minus infinity, which has no difference to anything.
        lowest = torch.finfo(self.log_probs.dtype).min
        self.log_probs[rows] = values.clamp(min=lowest).to(self.log_probs.dtype)
        self.epochs[rows] = epoch
        return repeated

    def state_dict(self) -> dict[str, Any]:
        """Return the table itself, not a copy."""
        state = {"log_probs": self.log_probs, "epochs": self.epochs, "shape": list(self.shape)}
        return state if self.classes is None else {**state, "classes": self.classes}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "RecordTable":
        """Go on with a table that was saved."""
        classes = state.get("classes")
        slots, samples = state["epochs"].shape
        top_k = None if classes is None else classes.shape[-1]
        table = cls(slots, samples, state["shape"], state["log_probs"].dtype, top_k)
        table.log_probs.copy_(state["log_probs"])
        table.epochs.copy_(state["epochs"])
        if table.classes is not None and classes is not None:
            table.classes.copy_(classes)
        return table


def available_memory() -> int | None:
    """Return the bytes of main memory that are free to use, or ``None`` where the system does not say."""
    # Linux counts what caches would give back here, and not among the free pages.
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _index_dtype(classes: int) -> torch.dtype:
    """Return the smallest dtype that counts this many classes."""
    return torch.int16 if classes <= torch.iinfo(torch.int16).max else torch.int32
