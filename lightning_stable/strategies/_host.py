"""The one place for what the strategies need of the host and it offers no public way to.

The host ties all workers together at every batch: it broadcasts from rank 0 whether that rank was sent SIGTERM
(``_TrainingEpochLoop._broadcast_sigterm_tensor``), and its signal handler (``_SignalConnector._sigterm_notifier_fn``)
broadcasts too. Between two exchanges nothing may tie workers together, so both are set aside for the length of a fit,
and the signal is passed on with the exchanges.
"""

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_stable.strategies._flat import FlatBuffers
from lightning_stable.strategies._progress import Progress
from lightning_stable.strategies._workers import Exchange, Workers

__all__ = ["AtTrainEnd", "UntiedWorkers", "callbacks_of"]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's list of callbacks, which the host sets without declaring it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


class AtTrainEnd(Callback):
    """Calls something at the end of training. First in the list, it does so before any other callback acts there."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._action()


class UntiedWorkers:
    """Sets aside what makes workers wait for each other at every batch, and carries SIGTERM in its place.

    Attributes:
        heard: Some rank was sent SIGTERM, and all ranks have heard of it at the same step.
    """

    def __init__(self, trainer: Trainer, workers: Workers, device: torch.device) -> None:
        self._workers = workers
        self._device = device
        self.heard = False
        self._received = False
        self._under_way: tuple[FlatBuffers, Exchange] | None = None
        self._loop: Any = trainer.fit_loop.epoch_loop
        self._connector: Any = trainer._signal_connector
        self._launcher: Any = trainer.strategy.launcher
        self._leads_its_machine = trainer.local_rank == 0
        self._loop.__dict__["_broadcast_sigterm_tensor"] = _nothing
        self._connector.__dict__["_sigterm_notifier_fn"] = self._notice

    def pass_on(self, *, wait: bool) -> None:
        """Tell the other ranks whether this one was sent SIGTERM; if any was, the host ends all fits after this batch.

        Args:
            wait: Hear of it now, and not at the next exchange.
        """
        self._hear()
        # Each rank of a worker fills the slice that it sends.
        told = torch.full((self._workers.slices,), float(self._received), device=self._device)
        message = FlatBuffers([told], multiple=self._workers.slices)
        message.read([told])
        self._under_way = message, self._workers.launch(message)
        if wait:
            self._hear()

    def _hear(self) -> None:
        if self._under_way is None:
            return
        message, exchange = self._under_way
        self._under_way = None
        exchange.wait()
        if float(message.flats[0].sum()) > 0:
            self.heard = True
            self._connector.received_sigterm = True

    def explain_the_end(self, exception: BaseException, progress: Progress) -> None:
        """Say what a run leaves that SIGTERM has ended, and give its process the exit code that shells expect of it.

        The host's own exception ends a process with code 0, as if training were over.

        Args:
            exception: What ends the fit; nothing is said of any other than the host's for SIGTERM.
            progress: Where the run stands.
        """
        if not isinstance(exception, SIGTERMException) or not self.heard:
            return
        # Not the processes that the host may have started beside this one: it would kill this one for their code.
        if self._leads_its_machine and exception.code is None:
            exception.code = 128 + signal.SIGTERM
        place, saved_at = progress.saved or (None, None)
        left = f"The checkpoint of this step is {place}."
        if saved_at != progress.steps:
            last = "nothing was saved before" if place is None else f"the last one is {place}, of step {saved_at}"
            left = (
                f"No checkpoint of this step was saved, and {last}. ModelCheckpoint(save_on_exception=True) or "
                "OnExceptionCheckpoint saves one on the way out."
            )
        rank_zero_warn(
            f"{self._workers.owner}: SIGTERM ended training after step {progress.steps}, on all ranks, with the mean "
            f"of their weights. {left}"
        )

    def restore(self) -> None:
        """Give the host back what was set aside."""
        self._loop.__dict__.pop("_broadcast_sigterm_tensor", None)
        self._connector.__dict__.pop("_sigterm_notifier_fn", None)

    def _notice(self, signum: Any, _: Any) -> None:
        # As the host does: processes that this one launched are told too.
        if not self._received and self._launcher is not None:
            self._launcher.kill(signum)
        if not self._received:
            rank_zero_info(f"{self._workers.owner}: sent SIGTERM. All ranks end together, at the next exchange or two.")
        self._received = True


def _nothing() -> None:
    """Stand in for the host's broadcast at every batch."""
