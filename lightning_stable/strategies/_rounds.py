"""The rounds of local steps between workers: where each begins, what is exchanged at its end, and when it arrives."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_stable.strategies._flat import FlatBuffers
from lightning_stable.strategies._workers import Exchange, Workers

__all__ = ["OuterUpdate", "Rounds"]

# How long an exchange under way is awaited after a failure, before it is left behind.
_SECONDS_TO_DRAIN = 2.0


class OuterUpdate(Protocol):
    """The step that a method takes on the anchor with the workers' mean movement."""

    def init_outer(self, anchor: list[Tensor]) -> Any:
        """Return the state of the outer step, a NamedTuple of tensors and lists of tensors."""

    def update_outer(self, state: Any, anchor: list[Tensor], delta: list[Tensor], learning_rate: Any) -> Any:
        """Take one outer step on the anchor, in place, and return the new state."""


class Rounds:
    r"""One worker's side of the rounds.

    The anchor :math:`a` is equal on all workers. A worker starts round :math:`t` at :math:`s_t` and moves by
    :math:`\Delta_t = s_t - x_t`. A blocking exchange takes the outer step with the mean of :math:`\Delta_t` at once,
    and every worker goes on from the anchor. A delayed one only launches that mean, takes the outer step with the mean
    of the round before, which has travelled during this one, and goes on from :math:`a` (variant "paper") or from
    :math:`a - \Delta_t` (variant "corrected").

    Attributes:
        state: The state of the outer step.

    Args:
        parameters: What is exchanged; their present values are the first anchor.
        outer: Takes the outer step.
        workers: The groups to exchange over.
        delayed: An exchange travels during the next round.
        keep_own: A delayed exchange leaves each worker its own last round (variant "corrected").
        message_dtype: Precision of what is sent; ``None`` for that of the buffers.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        outer: OuterUpdate,
        workers: Workers,
        *,
        delayed: bool,
        keep_own: bool,
        message_dtype: torch.dtype | None,
    ) -> None:
        self._parameters = list(parameters)
        self._outer = outer
        self._workers = workers
        self._delayed = delayed
        self._anchor = FlatBuffers(parameters, multiple=workers.slices)
        self._message = FlatBuffers(parameters, multiple=workers.slices, dtype=message_dtype)
        # Where workers do not start from the anchor, each has to know where it did.
        self._start = FlatBuffers(parameters, multiple=workers.slices) if delayed and keep_own else None
        self._under_way: Exchange | None = None
        # What moves at a high rate may arrive in a round of a low one.
        self._rate_under_way: Any = None
        self.restart()
        self.state = outer.init_outer(self._anchor.flats)

    @property
    def lengths(self) -> list[int]:
        """How much of each flat tensor is in use."""
        return self._anchor.lengths

    @torch.no_grad()
    def restart(self) -> None:
        """Begin a round at the present weights, which are equal on all workers."""
        self._anchor.read(self._parameters)
        if self._start is not None:
            self._start.read(self._parameters)

    @torch.no_grad()
    def finish_round(self, learning_rate: Any) -> None:
        """Exchange, take the outer step that is due, and begin the next round.

        Args:
            learning_rate: That of the round's last local step.
        """
        self._wait_for_arrival()
        moved = self._movement()
        if self._delayed:
            self._take_arrived()
            try:
                self._message.read(moved)
                self._under_way = self._workers.launch(self._message)
                self._rate_under_way = learning_rate
            finally:
                self._begin_next(moved)
        else:
            self._exchange(moved)
            self._take_outer_step(learning_rate)
            self._anchor.write(self._parameters)

    @torch.no_grad()
    def consolidate(self) -> None:
        """Bring all workers to one place: take what has arrived, and the mean of what the unfinished round has moved.

        The unfinished round is taken plainly, without the outer step's rate and momentum, which are meant for whole
        rounds.
        """
        self._wait_for_arrival()
        moved = self._movement()
        self._take_arrived()
        self._exchange(moved)
        torch._foreach_sub_(self._anchor.flats, self._mean_movement())
        self._anchor.write(self._parameters)
        # Half-precision weights are the anchor rounded: both have to be what a checkpoint of the weights says.
        self.restart()

    def abandon(self) -> None:
        """Forget an exchange under way, after a failure."""
        if self._under_way is not None:
            self._under_way.abandon(_SECONDS_TO_DRAIN)
            self._under_way = None

    def _movement(self) -> list[Tensor]:
        """Return how far each parameter has moved in this round: start minus present weights.

        Where the precision allows, in the memory of the parameters themselves, which are overwritten after it.
        """
        start = (self._start or self._anchor).views
        if any(view.dtype != parameter.dtype for view, parameter in zip(start, self._parameters, strict=True)):
            return list(torch._foreach_sub(start, self._parameters))
        torch._foreach_neg_(self._parameters)
        torch._foreach_add_(self._parameters, start)
        return self._parameters

    def _exchange(self, moved: list[Tensor]) -> None:
        """Replace the message by the mean movement; a worker that is left alone keeps its own weights."""
        try:
            self._message.read(moved)
            self._workers.launch(self._message).wait()
        except BaseException:
            if moved is self._parameters:
                torch._foreach_neg_(moved)
                torch._foreach_add_(moved, (self._start or self._anchor).views)
            raise

    def _wait_for_arrival(self) -> None:
        if self._under_way is not None:
            self._under_way.wait()

    def _take_arrived(self) -> None:
        if self._under_way is not None:
            self._under_way = None
            self._take_outer_step(self._rate_under_way)

    def _take_outer_step(self, learning_rate: Any) -> None:
        self.state = self._outer.update_outer(self.state, self._anchor.flats, self._mean_movement(), learning_rate)

    def _mean_movement(self) -> list[Tensor]:
        """Return the mean movement that has arrived, in the precision of the anchor."""
        if [flat.dtype for flat in self._message.flats] == [flat.dtype for flat in self._anchor.flats]:
            return self._message.flats
        wide = FlatBuffers(self._parameters, multiple=self._workers.slices)
        wide.read(self._message.views)
        return wide.flats

    def _begin_next(self, moved: list[Tensor]) -> None:
        if self._start is None:
            self._anchor.write(self._parameters)
            return
        self._start.read(moved)
        torch._foreach_neg_(self._start.flats)
        torch._foreach_add_(self._start.flats, self._anchor.flats)
        self._start.write(self._parameters)
