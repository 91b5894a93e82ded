"""Gradients that travel in bfloat16: torch's own hook, counted."""

from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from typing_extensions import override

from lightning_stable.strategies.hooks._base import CompressionHook, world
from lightning_stable.strategies.hooks._buckets import Bucket

__all__ = ["BFloat16Hook"]

_BYTES = 2


class BFloat16Hook(CompressionHook):
    """Sends gradients in bfloat16. It keeps no memory."""

    @override
    def exchange(self, bucket: Bucket, stream: int) -> Future[Tensor]:
        self.count_all_reduce(_BYTES * bucket.buffer().numel())
        return bf16_compress_hook(world(), bucket)
