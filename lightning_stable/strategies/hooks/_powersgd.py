"""PowerSGD: torch's own hook, put right for gloo, for buckets that change, and for checkpoints."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from typing_extensions import override

from lightning_stable.strategies.hooks._base import CompressionHook, hold
from lightning_stable.strategies.hooks._buckets import Bucket, Kept, Layout, Layouts, layout_of, to_cpu

__all__ = ["LEAST_WARMUP", "PowerSGDHook"]

LEAST_WARMUP = 2
"""Passes that torch wants uncompressed at least."""

# torch's own value: a matrix is sent as it is unless that saves half.
_LEAST_SAVING = 2
# Without it a matrix whose gradient is zero becomes NaN.
_EPSILON = 1e-8


class PowerSGDHook(CompressionHook):
    """Sends low-rank factors of each matrix; vectors, and matrices of which that saves little, are sent as they are.

    torch's hook is taken as it is. Around it: one bucket after the other unless NCCL orders what its callbacks launch,
    since they do so from several threads and processes would take one message for another; what is kept follows the
    parameters when DDP lays out its buckets anew; the state can be saved.

    Args:
        names: The parameters' names.
        rank: Rank of the factors.
        warmup_steps: So many passes first that are not compressed, and at least two.
    """

    def __init__(self, names: Mapping[Tensor, str], rank: int, warmup_steps: int = 0) -> None:
        for parameter, name in names.items():
            if parameter.ndim == 0 or parameter.numel() == 0:
                raise ValueError(
                    f"CompressedDDPStrategy: torch's PowerSGD cannot take the parameter {name!r} of shape "
                    f"{tuple(parameter.shape)}. Give it one entry and one dimension at least, or choose 'topk', 'sign' "
                    "or 'bf16'."
                )
        super().__init__(names)  # torch's hook counts the first passes itself
        self.rank = rank
        self.first = max(warmup_steps, LEAST_WARMUP)
        self._states: dict[int, PowerSGDState] = {}
        self._layouts = Layouts()
        self._kept: Kept = defaultdict(lambda: defaultdict(dict))

    @override
    def exchange(self, bucket: Bucket, stream: int) -> Future[Tensor]:
        state = self._state(stream)
        self._follow(state, bucket, stream)
        if state.iter < state.start_powerSGD_iter:
            self.count_all_reduce(bucket.buffer().nbytes)
            return powerSGD_hook(state, bucket)
        before = state.total_numel_after_compression
        undo = self._undo(state, bucket.index(), bucket.buffer())
        future = powerSGD_hook(state, bucket).then(undo)
        self.count_all_reduce((state.total_numel_after_compression - before) * bucket.buffer().itemsize)
        if not (bucket.buffer().is_cuda and dist.get_backend() == "nccl"):
            future.wait()
        return future

    def _undo(self, state: PowerSGDState, index: int, buffer: Tensor) -> Callable[[Future[Tensor]], Tensor]:
        """Return what keeps a gradient that is not finite out of the memory, once it has been exchanged."""
        error = state.error_dict.get(index, torch.zeros_like(buffer))
        factor = state.q_memory_dict[index].clone() if index in state.q_memory_dict else None

        def undo(future: Future[Tensor]) -> Tensor:
            result = future.value()
            hold(error, *([] if factor is None else [factor]))
            # Not finite on some worker means that the mean is not, for all of them.
            sound, now = result.isfinite().all(), state.q_memory_dict[index]
            state.error_dict[index] = torch.where(sound, state.error_dict[index], error)
            now.copy_(torch.where(sound, now, _random_like(now) if factor is None else factor))
            return result

        return undo

    def _state(self, stream: int) -> PowerSGDState:
        if stream not in self._states:
            self._states[stream] = PowerSGDState(
                None,
                matrix_approximation_rank=self.rank,
                start_powerSGD_iter=self.first,
                min_compression_rate=_LEAST_SAVING,
                orthogonalization_epsilon=_EPSILON,
                random_seed=stream,
            )
        return self._states[stream]

    def _follow(self, state: PowerSGDState, bucket: Bucket, stream: int) -> None:
        """Let what torch's hook keeps for buckets follow the parameters."""
        index, layout = bucket.index(), layout_of(bucket, self.names)
        same, void = self._layouts.arrive(stream, index, layout)
        for other, old in void.items():
            self._put_aside(self._kept, stream, old, state, other)
            for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                kept.pop(other, None)
        errors, factors = self._kept["error"][stream], self._kept["factor"][stream]
        buffer, sizes = bucket.buffer(), layout.sizes
        if same or not any(name in errors for name in layout.names):
            return
        parts = [errors.pop(n, buffer.new_zeros(size)) for n, size in zip(layout.names, sizes, strict=True)]
        state.error_dict[index] = torch.cat([part.to(buffer) for part in parts])
        matrices = _matrices(layout, self.rank)
        if all(name in factors for name, _, _ in matrices):
            state.p_memory_dict[index] = buffer.new_zeros(sum(rows for _, rows, _ in matrices))
            none = [buffer.new_zeros(0)]
            state.q_memory_dict[index] = torch.cat([*none, *(factors.pop(n).to(buffer) for n, _, _ in matrices)])

    def _put_aside(self, kept: Kept, stream: int, layout: Layout, state: PowerSGDState, index: int) -> None:
        if index in state.error_dict:
            parts = torch.split(state.error_dict[index], layout.sizes)
            kept["error"][stream].update(zip(layout.names, parts, strict=True))
        if index in state.q_memory_dict:
            matrices = _matrices(layout, self.rank)
            parts = torch.split(state.q_memory_dict[index], [columns for _, _, columns in matrices])
            kept["factor"][stream].update(zip((name for name, _, _ in matrices), parts, strict=True))

    @override
    def rest(self) -> None:
        for stream, index, layout in self._layouts.now():
            self._put_aside(self._kept, stream, layout, self._states[stream], index)
        to_cpu(self._kept)
        self._layouts.forget()
        for state in self._states.values():
            for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                kept.clear()

    @override
    def own_state(self) -> dict[str, Any]:
        return {"error": self._by_name("error")}

    @override
    def shared_state(self) -> dict[str, Any]:
        passes = {stream: state.iter for stream, state in self._states.items()}
        random = {stream: _random_state(state) for stream, state in self._states.items()}
        return {**super().shared_state(), "factor": self._by_name("factor"), "passes": passes, "random": random}

    def _by_name(self, what: str) -> dict[int, dict[str, Tensor]]:
        found: Kept = defaultdict(lambda: defaultdict(dict))
        for stream, kept in self._kept[what].items():
            found[what][stream].update(kept)
        for stream, index, layout in self._layouts.now():
            self._put_aside(found, stream, layout, self._states[stream], index)
        return {stream: dict(kept) for stream, kept in found[what].items() if kept}

    @override
    def load(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        super().load(own, shared)
        for what, streams in (("error", own["error"]), ("factor", shared["factor"])):
            for stream, kept in streams.items():
                self._kept[what][stream] = dict(kept)
        for stream, passes in shared["passes"].items():
            state = self._state(stream)
            state.iter = passes
            words, position = shared["random"][stream]
            state.rng.set_state(("MT19937", words.numpy().astype(np.uint32), position, 0, 0.0))


def _matrices(layout: Layout, rank: int) -> list[tuple[str, int, int]]:
    """Return name and entries of both factors of each matrix that torch's hook compresses, in its order: by shape."""
    by_shape: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        rows, columns = shape[0], shape[1:].numel()
        if (rows + columns) * min(rows, columns, rank) * _LEAST_SAVING < rows * columns:
            by_shape[rows, columns].append(name)
    return [
        (name, rows * min(rows, columns, rank), columns * min(rows, columns, rank))
        for (rows, columns), names in by_shape.items()
        for name in names
    ]


def _random_like(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)


def _random_state(state: PowerSGDState) -> list[Any]:
    found: Any = state.rng.get_state()
    return [torch.from_numpy(found[1].astype(np.int64)), int(found[2])]
