"""Metrics that each break one contract on purpose."""

from pathlib import Path
from typing import Any

import torch
from contract.broken import row
from torch import Tensor
from torchmetrics import Metric


class HonestMetric(Metric):
    """Knows how often it was told scores and what the lowest was, and breaks nothing."""

    reduce = "max"
    unit = 2**20  # a whole number of these keeps its digits where the module's weights have few

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx=self.reduce, persistent=True)
        self.add_state("lowest", torch.tensor(2**40), dist_reduce_fx="min", persistent=True)

    def update(self, scores: dict[int, float], current_task: int, step: int | None = None) -> None:
        self.count += 1
        self.lowest = torch.minimum(self.lowest, torch.tensor(int(self.unit * min(scores.values()))))

    def end_task(self, task: int) -> None:
        """Ends are nothing to it."""

    def compute(self) -> dict[str, Tensor]:
        return {"count": self.count, "lowest": self.lowest / self.unit}


class ForgetsItsScores(HonestMetric):
    """Does not save what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.persistent(False)


class LosesDigits(HonestMetric):
    """Has a state that is converted with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="mean", persistent=True)

    def update(self, scores: dict[int, float], *args: Any, **kwargs: Any) -> None:
        super().update(scores, *args, **kwargs)
        self.total = self.total + torch.tensor([sum(scores.values())])[0]

    def compute(self) -> dict[str, Tensor]:
        return {**super().compute(), "total": self.total}


class AddsToWhatItHas(HonestMetric):
    """Adds a checkpoint's count to its own."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.count
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.count = self.count + own


class ResetsInPart(HonestMetric):
    """Keeps the lowest score over a reset."""

    def reset(self) -> None:
        kept = self.lowest
        super().reset()
        self.lowest = kept - 1


class SplitsTiesByLot(HonestMetric):
    """Consumes the global random numbers that dropout draws from."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        torch.rand(1)
        super().update(*args, **kwargs)


class SavesItsScoresAsObjects(HonestMetric):
    """Puts an object into the checkpoint that a safe load refuses."""

    def get_extra_state(self) -> Any:
        return Path("somewhere")

    def set_extra_state(self, state: Any) -> None:
        pass


class CountsEachProcess(HonestMetric):
    """Counts one evaluation as often as there are processes."""

    reduce = "sum"


ROWS = {metric.__name__: row(metric) for metric in (HonestMetric, CountsEachProcess)}
