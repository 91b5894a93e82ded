"""What all hooks share: counting passes and bytes, and the uncompressed passes at the start."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from lightning_stable.strategies.hooks._buckets import Bucket

__all__ = ["CompressionHook", "hold", "run_hook", "world"]


def run_hook(state: "CompressionHook", bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Run a hook on a bucket: the function that DDP is given, with the hook as its state."""
    return state.run(bucket)


def world() -> dist.ProcessGroup:
    """Return the group of all processes."""
    return cast(dist.ProcessGroup, dist.group.WORLD)


def hold(*tensors: Tensor) -> None:
    """Keep the memory of tensors until what the present stream does with them is over: another stream made them."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class CompressionHook(ABC):
    """A DDP communication hook: it gets a bucket of this worker's gradients and puts the workers' mean in its place.

    Attributes:
        bytes_sent: What this process has sent so far, in bytes: counted as an all-gather and an all-reduce in a ring
            send it, (N - 1) messages and 2 (N - 1) / N of the buffer for N processes.
        streams_apart: Each of several passes within a batch has a memory of its own. For modules with several
            optimizers: what a pass leaves unsent is not to reach the gradients of another one's loss.

    Args:
        names: The parameters' names.
        warmup_steps: So many passes first that are not compressed.
    """

    def __init__(self, names: Mapping[Tensor, str], warmup_steps: int = 0) -> None:
        self.names = names
        self.warmup_steps = warmup_steps
        self.bytes_sent = 0
        self.streams_apart = False
        self.workers = dist.get_world_size()
        self._steps: defaultdict[int, int] = defaultdict(int)
        self._pass = 0

    def begin_batch(self) -> None:
        """Note that the next pass is the first of a batch."""
        self._pass = 0

    def run(self, bucket: Bucket) -> Future[Tensor]:
        """Exchange a bucket, and return a future that holds the workers' mean."""
        stream = self._pass if self.streams_apart else 0
        step = self._steps[stream]
        if bucket.is_last():
            self._steps[stream] += 1
            self._pass += 1
        if step < self.warmup_steps:
            return self.exchange_in_full(bucket, stream, last=step == self.warmup_steps - 1)
        return self.exchange(bucket, stream)

    @abstractmethod
    def exchange(self, bucket: Bucket, stream: int) -> Future[Tensor]:
        """Exchange a bucket compressed."""

    def exchange_in_full(self, bucket: Bucket, stream: int, *, last: bool) -> Future[Tensor]:
        """Exchange a bucket uncompressed; ``last`` for the last time."""
        self.count_all_reduce(bucket.buffer().nbytes)
        return allreduce_hook(world(), bucket)

    def count_all_reduce(self, size: int) -> None:
        """Count an all-reduce of so many bytes."""
        self.bytes_sent += 2 * (self.workers - 1) * size // self.workers

    def rest(self) -> None:  # noqa: B027  only hooks with a memory have something to do
        """Leave the device after a fit, and keep what a checkpoint holds."""

    def own_state(self) -> dict[str, Any]:
        """Return what differs between the processes."""
        return {}

    def shared_state(self) -> dict[str, Any]:
        """Return what is the same on all processes."""
        return {"steps": dict(self._steps), "bytes_sent": self.bytes_sent}

    def load(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        """Take over what ``own_state`` and ``shared_state`` returned."""
        self._steps.update(shared["steps"])
        self.bytes_sent = shared["bytes_sent"]
