"""What has to be equal on all ranks besides the weights, so that rank 0's checkpoint speaks for all of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stable.strategies._workers import Workers

__all__ = [
    "alike_tensors",
    "all_parameters",
    "average_optimizers",
    "bring_together",
    "float_buffers",
    "optimizer_tensors",
    "refuse_foreign_weights",
    "share_states",
    "takes_state_of_rank_zero",
]

# A floating tensor of an optimizer's state: optimizer, parameter among all of that optimizer, name in its state.
_Place = tuple[int, int, str]


def bring_together(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    precision: Precision,
    callbacks: Sequence[Callback],
    workers: Workers,
) -> None:
    """Make everything besides the weights equal on all ranks."""
    workers.mean(alike_tensors(module, callbacks, workers))
    _share_buffers(module, workers)
    average_optimizers(optimizers, workers)
    asking = [callback for callback in callbacks if takes_state_of_rank_zero(callback)]
    share_states([*asking, precision], workers.from_rank_zero, workers.rank)


def float_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers that a mean makes sense for, such as batch normalisation's."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def alike_tensors(module: nn.Module, callbacks: Iterable[Callback], workers: Workers) -> list[Tensor]:
    """Return what differs between workers besides weights and has a mean: floating-point buffers, kept averages.

    Raises:
        ValueError: If a callback keeps tensors of other shapes on another rank, which have no mean.
    """
    keeping: list[Any] = [callback for callback in callbacks if hasattr(callback, "worker_tensors")]
    kept = [callback.worker_tensors() for callback in keeping]
    found = workers.gather([[tuple(tensor.shape) for tensor in tensors] for tensors in kept]) if keeping else []
    for number, callback in enumerate(keeping):
        if any(shapes[number] != found[0][number] for shapes in found):
            raise ValueError(
                f"{workers.owner} averages what {type(callback).__name__} keeps, but that has other shapes on other "
                "ranks: a parameter got a gradient on some workers only. Freeze what does not train."
            )
    return float_buffers(module) + [tensor for tensors in kept for tensor in tensors]


def takes_state_of_rank_zero(callback: Callback) -> bool:
    """Tell whether a callback goes on from rank 0's state where that is the one that is saved."""
    return bool(getattr(callback, "takes_state_of_rank_zero", False))


def share_states(plugins: Iterable[Any], from_rank_zero: Callable[[Callable[[], Any]], Any], rank: int) -> None:
    """Give every rank the states of rank 0's plugins.

    Args:
        plugins: What has a state.
        from_rank_zero: Returns what a function returns on rank 0, which alone calls it.
        rank: This process.
    """
    for plugin in plugins:
        state = from_rank_zero(plugin.state_dict)
        if rank != 0 and state:
            plugin.load_state_dict(state)


def _share_buffers(module: nn.Module, workers: Workers) -> None:
    """Give every rank the values of rank 0's buffers that have no mean, such as counters."""
    buffers = [buffer for buffer in module.buffers() if not buffer.is_floating_point()]
    if buffers:
        values = workers.from_rank_zero(lambda: [buffer.cpu() for buffer in buffers])
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def refuse_foreign_weights(callbacks: Iterable[Callback], owner: str) -> None:
    """Raise ``ValueError`` if a callback has other weights in the module for the moment."""
    for callback in callbacks:
        if getattr(callback, "holds_live_weights", False):
            raise ValueError(
                f"{owner} cannot save a checkpoint while {type(callback).__name__} has other weights in the module: "
                "the workers' own weights have to be averaged first. Save at the end of the validation or of a batch."
            )


@torch.no_grad()
def average_optimizers(optimizers: Sequence[Optimizer], workers: Workers) -> None:
    """Replace the optimizers' floating-point state by its mean over all ranks, and numbers by those of rank 0.

    A rank on which a parameter never had a gradient has no state for it: it gets the mean of those that have. A number
    of steps kept as a tensor is the largest of any rank.

    Raises:
        ValueError: If state is neither floating point nor a plain number, such as that of 8-bit optimizers.
    """
    own = optimizer_tensors(optimizers, workers.owner)
    described = workers.gather(({place: _describe(tensor) for place, tensor in own.items()}, _plain(optimizers)))
    having = [tensors for tensors, _ in described]
    places = sorted({place for tensors in having for place in tensors})
    for place in places:
        if place not in own:
            shape, dtype, device, _ = next(tensors[place] for tensors in having if place in tensors)
            parameter = all_parameters(optimizers[place[0]])[place[1]]
            on = parameter.device if device == parameter.device.type else torch.device(device)
            own[place] = torch.zeros(shape, dtype=dtype, device=on)
            optimizers[place[0]].state[parameter][place[2]] = own[place]
    workers.mean([own[place] for place in places if own[place].dim()])
    for place in places:
        held = [tensors[place] for tensors in having if place in tensors]
        if not own[place].dim():
            own[place].fill_(max(value for _, _, _, value in held))
        elif len(held) < workers.world_size:
            own[place].mul_(workers.world_size / len(held))
    for _, (groups, values) in reversed(described):
        # Rank 0's come last, and hold wherever it has any.
        _take_plain(optimizers, groups, values)


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(optimizers: Sequence[Optimizer], owner: str) -> dict[_Place, Tensor]:
    """Return the floating-point tensors of the optimizers' state, by optimizer, parameter and name.

    Raises:
        ValueError: If there is state that has no mean.
    """
    found: dict[_Place, Tensor] = {}
    for place, value in _state(optimizers):
        if not _has_mean(value):
            raise ValueError(
                f"{owner} averages the state of optimizers, and cannot average {place[2]!r} of "
                f"{type(optimizers[place[0]]).__name__}, which is {_kind(value)}. Use an optimizer whose state is "
                "floating-point tensors and plain numbers."
            )
        if isinstance(value, Tensor) and value.is_floating_point():
            found[place] = value
    return found


def _state(optimizers: Sequence[Optimizer]) -> Iterator[tuple[_Place, Any]]:
    for number, optimizer in enumerate(optimizers):
        for index, parameter in enumerate(all_parameters(optimizer)):
            for name, value in optimizer.state.get(parameter, {}).items():
                yield (number, index, str(name)), value


def _describe(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, str, float]:
    return tuple(tensor.shape), tensor.dtype, tensor.device.type, 0.0 if tensor.dim() else float(tensor)


def _plain(optimizers: Sequence[Optimizer]) -> tuple[list[list[dict[str, Any]]], dict[_Place, Any]]:
    """Return the plain values of the parameter groups and of the state."""
    groups = [
        [{name: value for name, value in group.items() if _is_plain(value)} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    return groups, {place: value for place, value in _state(optimizers) if _is_plain(value)}


def _take_plain(optimizers: Sequence[Optimizer], groups: list[list[dict[str, Any]]], values: dict[_Place, Any]) -> None:
    for optimizer, given in zip(optimizers, groups, strict=True):
        for group, plain in zip(optimizer.param_groups, given, strict=True):
            group.update(plain)
    for (number, index, name), value in values.items():
        optimizers[number].state[all_parameters(optimizers[number])[index]][name] = value


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _has_mean(value: Any) -> bool:
    """Tell floating-point tensors, step counts and plain values from what workers cannot agree on by a mean."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.dim() == 0
    return value is None or _is_plain(value)


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
