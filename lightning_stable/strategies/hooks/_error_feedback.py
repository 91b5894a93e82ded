"""Top-k and sign messages with error feedback: EF, EF21 or EControl."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from typing_extensions import override

from lightning_stable.functional.compression import Memory, init_memory, update_memory, what_to_send
from lightning_stable.strategies.hooks._base import CompressionHook, hold
from lightning_stable.strategies.hooks._buckets import Bucket, Kept, Layout, Layouts, layout_of, to_cpu
from lightning_stable.strategies.hooks._messages import Codec, join, split

__all__ = ["ErrorFeedbackHook"]

# What a worker says of each tensor besides: whether its gradient is not all zero, and whether not all of it is finite.
_USED, _BROKEN = 1, 2


class _Bucket(NamedTuple):
    """What is kept for a bucket: the memory, flat, and the tensors' numbers of entries as a tensor."""

    memory: Memory
    entries: Tensor


class ErrorFeedbackHook(CompressionHook):
    """Sends compressed gradients, and remembers what the messages left out.

    The memory is in float32 at least, and belongs to parameters: DDP may lay out its buckets anew at any time.

    The messages of a tensor do not count, and its memory stays, in two cases. Where its gradient is zero on all
    workers, as that of a parameter that the pass did not use, zero is returned: DDP throws away what a hook returns
    for an unused parameter, and with it what the memory would have given. Where the gradient is not finite on some
    worker, NaN is returned, as from a mean: a skipped step then leaves no trace.

    Args:
        names: The parameters' names.
        codec: The compressor.
        error: "ef", "ef21" or "econtrol".
        eta: EControl's weight of what was not sent yet.
        warmup_steps: So many passes first that are not compressed. EF21 and EControl begin from the last one's
            gradients, or from zero without any.
    """

    def __init__(
        self, names: Mapping[Tensor, str], codec: Codec, error: str, eta: float = 1.0, warmup_steps: int = 0
    ) -> None:
        super().__init__(names, warmup_steps)
        self.codec = codec
        self.error = error
        self.eta = eta
        self._layouts = Layouts()
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._kept: Kept = defaultdict(lambda: defaultdict(dict))

    @override
    def exchange(self, bucket: Bucket, stream: int) -> Future[Tensor]:
        gradient, layout = bucket.buffer(), layout_of(bucket, self.names)
        sizes, own_bucket = layout.sizes, self._find(bucket, stream, layout)
        status, finite = _status(gradient, sizes)
        x = what_to_send(own_bucket.memory, gradient, self.eta)
        x = torch.where(_spread(finite, own_bucket.entries, x), x, torch.zeros_like(x))
        # What was not sent for some steps may be too large for float16.
        dtype = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
        parts = [*self.codec.encode(x, sizes, dtype), status]
        own = torch.zeros_like(x)
        self.codec.add(own, parts[:-1], own_bucket.entries)
        message = join(parts)
        gathered = message.new_empty(self.workers, message.numel())
        self.bytes_sent += (self.workers - 1) * message.numel()
        under_way = dist.all_gather(list(gathered), message, async_op=True)

        def receive(future: Future[Any]) -> Tensor:
            future.value()  # raises what failed
            hold(own, gathered)
            return self._receive(gradient, own_bucket, own, [split(row, parts) for row in gathered])

        return cast(Future[Tensor], under_way.get_future().then(receive))

    def _receive(self, gradient: Tensor, bucket: _Bucket, own: Tensor, messages: Sequence[Sequence[Tensor]]) -> Tensor:
        """Put the gradient to step with in place of this worker's."""
        mean = torch.zeros_like(own)
        # One worker after the other, so that every process adds in the same order and gets the same bits.
        for parts in messages:
            self.codec.add(mean, parts[:-1], bucket.entries)
        mean /= self.workers
        status = torch.stack([parts[-1] for parts in messages])
        broken = (status & _BROKEN != 0).any(0)
        counts = (status & _USED != 0).any(0) & ~broken
        mask = _spread(counts, bucket.entries, own)
        result = update_memory(bucket.memory, gradient, own, mean, mask)
        instead = _spread(torch.where(broken, torch.nan, 0.0).to(own.dtype), bucket.entries, own)
        return gradient.copy_(torch.where(mask, result, instead))

    @override
    def exchange_in_full(self, bucket: Bucket, stream: int, *, last: bool) -> Future[Tensor]:
        if not last or self.error == "ef":
            return super().exchange_in_full(bucket, stream, last=last)
        layout = layout_of(bucket, self.names)
        own_bucket, buffer = self._find(bucket, stream, layout), bucket.buffer()
        gradient = buffer.clone()
        # In half precision the mean would be rounded and the estimates not: their difference would stay for ever.
        wide = buffer.to(torch.promote_types(buffer.dtype, torch.float32)).div_(self.workers)
        self.count_all_reduce(wide.nbytes)
        under_way = dist.all_reduce(wide, async_op=True)

        def begin(future: Future[Any]) -> Tensor:
            future.value()  # raises what failed
            hold(gradient, wide)
            mean = wide
            # Not finite on some worker means that the mean is not, for all of them.
            _, finite = _status(mean, layout.sizes)
            mask, zero = _spread(finite, own_bucket.entries, mean), torch.zeros_like(mean)
            for kept, value in ((own_bucket.memory.estimate, gradient), (own_bucket.memory.mean, mean)):
                if kept is not None:
                    kept.copy_(torch.where(mask, value, zero))
            return buffer.copy_(mean)

        return cast(Future[Tensor], under_way.get_future().then(begin))

    def _find(self, bucket: Bucket, stream: int, layout: Layout) -> _Bucket:
        """Return what is kept for a bucket, put together anew if its layout has changed."""
        same, void = self._layouts.arrive(stream, bucket.index(), layout)
        for index, old in void.items():
            self._put_aside(self._kept, stream, old, self._buckets.pop((stream, index)).memory)
        if not same:
            self._buckets[stream, bucket.index()] = self._put_together(bucket.buffer(), stream, layout)
        return self._buckets[stream, bucket.index()]

    @staticmethod
    def _put_aside(kept: Kept, stream: int, layout: Layout, memory: Memory) -> None:
        for what, flat in memory._asdict().items():
            if flat is not None:
                kept[what][stream].update(zip(layout.names, torch.split(flat, layout.sizes), strict=True))

    def _put_together(self, buffer: Tensor, stream: int, layout: Layout) -> _Bucket:
        like = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        memory = init_memory(self.error, like)
        for what, flat in memory._asdict().items():
            kept = self._kept[what][stream]
            for name, part in zip(
                layout.names, () if flat is None else torch.split(flat, layout.sizes), strict=flat is not None
            ):
                if name in kept:
                    part.copy_(kept.pop(name))
        return _Bucket(memory, torch.tensor(layout.sizes, device=buffer.device))

    @override
    def rest(self) -> None:
        for stream, index, layout in self._layouts.now():
            self._put_aside(self._kept, stream, layout, self._buckets[stream, index].memory)
        to_cpu(self._kept)
        self._layouts.forget()
        self._buckets.clear()

    @override
    def own_state(self) -> dict[str, Any]:
        return {what: self._by_name(what) for what in ("error", "estimate")}

    @override
    def shared_state(self) -> dict[str, Any]:
        return {**super().shared_state(), "mean": self._by_name("mean")}

    def _by_name(self, what: str) -> dict[int, dict[str, Tensor]]:
        found: Kept = defaultdict(lambda: defaultdict(dict))
        for stream, kept in self._kept[what].items():
            found[what][stream].update(kept)
        for stream, index, layout in self._layouts.now():
            self._put_aside(found, stream, layout, self._buckets[stream, index].memory)
        return {stream: dict(kept) for stream, kept in found[what].items() if kept}

    @override
    def load(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        super().load(own, shared)
        for what, streams in {**own, "mean": shared["mean"]}.items():
            for stream, kept in streams.items():
                self._kept[what][stream] = dict(kept)


def _status(flat: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Return for each tensor what a worker says of it, uint8, and whether it is finite, bool."""
    # A tensor without entries has no largest one.
    filled = [tensor for tensor in torch.split(flat, sizes) if tensor.numel()]
    norms = iter(torch._foreach_norm(filled, torch.inf) if filled else ())
    largest = torch.stack([next(norms) if size else flat.new_zeros(()) for size in sizes])
    finite = largest.isfinite()
    return (largest != 0).to(torch.uint8) * _USED + (~finite).to(torch.uint8) * _BROKEN, finite


def _spread(of_tensors: Tensor, entries: Tensor, like: Tensor) -> Tensor:
    """Return a number of each tensor for each of its entries."""
    return torch.repeat_interleave(of_tensors, entries, output_size=like.numel())
