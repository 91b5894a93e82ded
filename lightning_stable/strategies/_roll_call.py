"""Which ranks are still there after a collective has failed: torch's own error names an address and no rank."""

import time
from datetime import timedelta

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch exports it without saying so

__all__ = ["GRACE_SECONDS", "RollCall", "name_the_missing", "open_roll_call"]

# After a collective has failed, how long the ranks that are left have to say that they are there.
GRACE_SECONDS = 5.0
# On a busy machine a rank may come late to what another one has opened.
_TIME_TO_OPEN = timedelta(minutes=1)


class RollCall:
    """What outlives a broken group: a store on rank 0, in which ranks say where they are. All ranks make it together.

    Args:
        host: Address of rank 0.
        grace: Seconds that the ranks which are left have to come.
    """

    def __init__(self, host: str, grace: float = GRACE_SECONDS) -> None:
        self._rank, self._world_size, self._grace = dist.get_rank(), dist.get_world_size(), grace
        port = [0]
        if self._rank == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIME_TO_OPEN)
            port = [self._store.port]
        dist.broadcast_object_list(port, 0)
        if self._rank != 0:
            self._store = TCPStore(host, port[0], is_master=False, timeout=_TIME_TO_OPEN)
        self._store.set_timeout(timedelta(seconds=max(grace, 1.0)))
        self._store.set(f"opened by {self._rank}", "")
        if self._rank == 0:
            # The store goes with this rank, which may fail before the others have come to it.
            self._wait_for([f"opened by {rank}" for rank in range(self._world_size)])
        self._store.set(f"came {self._rank}", "")
        if self._rank == 0:
            # Rank 0 may fail at once, and the store with it: the others would fail to find it, not by their own error.
            self._wait_for([f"came {rank}" for rank in range(self._world_size)])

    def take(self, position: str) -> tuple[dict[int, str], str]:
        """Say that this rank is there, and at what, and wait a while for the others.

        Returns:
            Who is there, and at what; and in words which ranks did not come, empty if all have.
        """
        there = self._who_is_there(position)
        missing = [str(rank) for rank in range(self._world_size) if rank not in there]
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"
        return there, f"{ranks} did not come" if missing else ""

    def _who_is_there(self, position: str) -> dict[int, str]:
        ranks = range(self._world_size)
        try:
            self._store.set(str(self._rank), position)
            self._wait_for([str(rank) for rank in ranks])
            there = [rank for rank in ranks if self._store.check([str(rank)])]
            found = {rank: self._store.get(str(rank)).decode() for rank in there}
            self._store.set(f"read by {self._rank}", "")
            if self._rank == 0:
                # The store goes with this rank, and the others have to read it too.
                self._wait_for([f"read by {rank}" for rank in there])
        except RuntimeError:
            # The store went with rank 0.
            return {rank: position for rank in ranks if rank != 0}
        return found

    def _wait_for(self, keys: list[str]) -> None:
        end = time.monotonic() + self._grace
        while not self._store.check(keys) and time.monotonic() < end:
            time.sleep(0.01)


def open_roll_call(strategy: DDPStrategy) -> RollCall | None:
    """Return the roll call of a strategy's ranks, ``None`` for a single one. All ranks have to ask for it together."""
    environment = strategy.cluster_environment
    if strategy.world_size == 1 or environment is None:
        return None
    return RollCall(environment.main_address)


def name_the_missing(owner: str, roll_call: RollCall | None, exception: BaseException) -> None:
    """Put into the words of a collective's error which ranks are gone; leave other errors as they are.

    Args:
        owner: Name of the strategy.
        roll_call: Asks who is there.
        exception: What ends the fit.
    """
    if roll_call is not None and _is_lost_link(exception):
        _, missing = roll_call.take("the end of a failed fit")
        if missing:
            # The hooks of DDP put their own words before those of the link.
            words = str(exception).rpartition("RuntimeError: ")[2].splitlines()[0]
            exception.args = (
                f"{owner}: {missing}, and gradients could not be exchanged. It died, stalled or lost its link: its own "
                f"output says more. Start again from the last checkpoint. ({words})",
            )


def _is_lost_link(exception: BaseException) -> bool:
    """Tell a collective that failed from other errors: gloo's have no type of their own."""
    return isinstance(exception, dist.DistError) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))
