"""The one history behind the metrics of continual learning, and what torchmetrics' machinery sees of it."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_stable.functional.continual import (
    compute_continual,
    end_task,
    init_continual,
    pack_continual,
    unpack_continual,
    update_continual,
)

__all__ = ["History", "HistoryMetric", "Scores", "naming"]

Scores = Mapping[int, float | Tensor]

_SETTINGS = ("windows", "higher_is_better", "curve_steps", "recovery_share", "baseline")


@contextmanager
def naming(owner: str) -> Iterator[None]:
    """Put the name of a class before the message of a ``ValueError``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


class History:
    """A history of evaluations in memory, which several metrics may read, with its values and its bytes at hand."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._state = init_continual(**settings)
        self._values: dict[str, float] | None = None
        self._packed: Tensor | None = None

    @property
    def windows(self) -> tuple[int, ...]:
        """Sizes of the windows."""
        return self._state.windows

    @property
    def evaluations(self) -> int:
        """Evaluations so far."""
        return self._state.evaluations

    def update(self, scores: Scores, current_task: int, step: int | None) -> None:
        """Take one evaluation in."""
        update_continual(self._state, _plain(scores), current_task, step)
        self._values = self._packed = None

    def end_task(self, task: int, scores: Scores | None) -> None:
        """Note the end of a task."""
        end_task(self._state, task, None if scores is None else _plain(scores))
        self._values = self._packed = None

    def values(self) -> dict[str, float]:
        """Return each metric by its name."""
        if self._values is None:
            self._values = compute_continual(self._state)
        return self._values

    def pack(self) -> Tensor:
        """Return the history as bytes: no conversion of floating-point tensors can round it."""
        if self._packed is None:
            text = json.dumps(pack_continual(self._state), allow_nan=False)
            self._packed = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)
        return self._packed

    def unpack(self, packed: Tensor) -> None:
        """Become the history that these bytes are.

        Raises:
            ValueError: If it was kept with other settings.
        """
        packed = packed.detach().to(device="cpu", dtype=torch.uint8, copy=True)
        if torch.equal(packed, self.pack()):
            return
        state = unpack_continual(json.loads(bytes(packed.tolist())))
        other = [name for name in _SETTINGS if getattr(state, name) != getattr(self._state, name)]
        if other:
            raise ValueError(
                "the history was kept with "
                + ", ".join(f"{name}={getattr(state, name)!r}" for name in other)
                + " and cannot go on with "
                + ", ".join(f"{name}={getattr(self._state, name)!r}" for name in other)
                + ". Build the metric as it was."
            )
        self._state, self._values, self._packed = state, None, packed


class HistoryMetric(Metric):
    """Base of the metrics: one value of a history of its own, or of the one that a collection shares out.

    Args:
        name: Which value.
        settings: Arguments of :func:`lightning_stable.functional.continual.init_continual`.
        own_sign: Whether the value is a score, so that higher is better exactly where a higher score is.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = True

    @abstractmethod
    def __init__(self, name: str, settings: Mapping[str, Any], own_sign: bool = False, **kwargs: Any) -> None:
        # The history keeps the values; a second cache would go stale when it is shared or loaded.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        self._owner = type(self).__name__
        with naming(self._owner):
            self._history = History({"windows": (), **settings})
        self._name = name
        self._shared = False
        if own_sign:
            # The base class allows no assignment, and the answer is that of this metric, not of its class.
            vars(self)["higher_is_better"] = bool(settings["higher_is_better"])
        self.add_state("history", self._history.pack(), dist_reduce_fx=_first, persistent=True)

    @property
    def history(self) -> Tensor:
        """The state: the history as bytes, on the device of the metric."""
        return self._history.pack().to(self.device)

    @history.setter
    def history(self, packed: Tensor) -> None:
        self._history.unpack(packed)

    @property
    @override
    def update_called(self) -> bool:
        return self.update_count > 0

    @property
    @override
    def update_count(self) -> int:
        return self._history.evaluations

    @override
    def forward(self, scores: Scores, current_task: int, step: int | None = None) -> Tensor:
        """Take one evaluation in and return the value so far: a single evaluation has none of its own."""
        self.update(scores, current_task, step)
        self._to_sync = self.dist_sync_on_step
        try:
            value: Tensor = self.compute()
        finally:
            self._to_sync = self.sync_on_compute
        vars(self)["_forward_cache"] = value  # which the host logs for a step
        return value

    @override
    def update(self, scores: Scores, current_task: int, step: int | None = None) -> None:
        """Take one evaluation in.

        Args:
            scores: The score of each evaluated task, over the whole evaluation, equal on all ranks.
            current_task: The task that is learned; at its first evaluation, before its first update, about to be.
            step: Optimizer steps so far, for recovery in steps; ``None`` counts evaluations.
        """
        self._refuse_if_shared("update")
        with naming(self._owner):
            self._history.update(scores, current_task, step)

    def end_task(self, task: int, scores: Scores | None = None) -> None:
        """Note that the training of a task has ended.

        Args:
            task: The task.
            scores: Scores at its end, if not those of the latest evaluation.
        """
        self._refuse_if_shared("end_task")
        with naming(self._owner):
            self._history.end_task(task, scores)

    @override
    def compute(self) -> Tensor:
        """Return the value so far, not-a-number while it is not defined."""
        return self.value()

    def value(self) -> Tensor:
        """Return the value so far, as this process has it."""
        return torch.tensor(self._history.values()[self._name], dtype=torch.float32, device=self.device)

    @override
    def sync(self, dist_sync_fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> None:
        super().sync(dist_sync_fn or self._gather, *args, **kwargs)

    def share(self, history: History, owner: str, keeper: bool) -> None:
        """Read the history of a collection from now on.

        Args:
            history: The history.
            owner: The collection's class, for messages.
            keeper: Whether the history goes into ``state_dict`` with this metric.
        """
        self._history, self._owner, self._shared = history, owner, True
        self._defaults["history"] = history.pack()
        self._persistent["history"] = keeper

    def _refuse_if_shared(self, method: str) -> None:
        """Raise ``ValueError`` if this metric reads the history of a collection."""
        if self._shared:
            raise ValueError(
                f"{type(self).__name__}: it is part of a {self._owner}, whose parts share one history. Call {method} "
                f"of the {self._owner}, and put it into no other MetricCollection."
            )

    def _gather(self, packed: Tensor, group: Any = None) -> list[Tensor]:
        """Return the bytes of every process, all of them equal."""
        gathered: list[Tensor] = gather_all_tensors(packed, group)
        if not all(torch.equal(theirs, gathered[0]) for theirs in gathered):
            raise ValueError(
                f"{self._owner}: the processes were given different scores. Each has to be given the score of "
                "the whole evaluation: sum right answers and samples over the processes before the division."
            )
        return gathered

    @override
    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The history is no tensor: it moves nowhere, and what is made of it is made on the present device.
        return super()._apply(fn, exclude_state=("history",))

    @override
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            with naming(self._owner):
                super()._load_from_state_dict(
                    state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
                )
        except ValueError as error:
            error_msgs.append(str(error))

    def __hash__(self) -> int:
        """Return a hash that tells modules apart, without packing the history."""
        return hash((type(self).__name__, id(self)))


def _plain(scores: Any) -> Any:
    """Return the scores without tensors that carry a graph."""
    if not isinstance(scores, Mapping):
        return scores
    return {task: score.detach() if isinstance(score, Tensor) else score for task, score in scores.items()}


def _first(gathered: Tensor) -> Tensor:
    """Return what the processes have in common: the first of equal ones."""
    return gathered[0]
