"""Workers begin with one model: the same parameters, and the same values in them. And rank 0's values, at any time."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_stable.strategies._workers import Workers

__all__ = ["agree_on_model", "take_from_rank_zero"]


def agree_on_model(module: nn.Module, workers: Workers) -> None:
    """Check that all ranks have the same model, and give every rank rank 0's values, with a warning if others had own.

    Raises:
        ValueError: If names, shapes, precisions or what trains differ between ranks; the first difference is named.
    """
    found = workers.gather({name: _describe(parameter) for name, parameter in module.named_parameters()})
    for rank, others in enumerate(found):
        for name in [*found[0], *others]:
            mine, theirs = found[0].get(name, "not there"), others.get(name, "not there")
            if mine != theirs:
                raise ValueError(
                    f"{workers.owner}: parameter {name!r} differs between ranks: it is {mine} on rank 0 and {theirs} "
                    f"on rank {rank}. Build the same module on every rank."
                )
    _take_values_of_rank_zero(module, workers)


@torch.no_grad()
def take_from_rank_zero(tensors: Sequence[Tensor]) -> None:
    """Give tensors rank 0's values, in the default group: one broadcast for each dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        members = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([member.flatten() for member in members])
        dist.broadcast(flat, 0)
        parts = torch.split(flat, [member.numel() for member in members])
        torch._foreach_copy_(members, [part.view(m.shape) for part, m in zip(parts, members, strict=True)])


def _describe(parameter: nn.Parameter) -> str:
    trained = "trained" if parameter.requires_grad else "frozen"
    return f"{trained}, {parameter.dtype}, of shape {tuple(parameter.shape)}"


@torch.no_grad()
def _take_values_of_rank_zero(module: nn.Module, workers: Workers) -> None:
    different = []
    for name, value in _values(module).items():
        # One by one, and each in its own precision: a copy of the whole model may not fit.
        first = value.clone(memory_format=torch.contiguous_format)
        workers.broadcast(first)
        # What is no number stays what it is: such weights are no reason to warn.
        if value.is_floating_point() and not torch.equal(value.nan_to_num(), first.nan_to_num()):
            different.append(name)
        value.copy_(first)
    everywhere = [names for names in workers.gather(different) if names]
    if everywhere:
        rank_zero_warn(
            f"{workers.owner}: {len(everywhere[0])} tensors began with other values on other ranks, the first is "
            f"{everywhere[0][0]!r}; every rank takes those of rank 0, as DDP does. Seed every rank alike, for example "
            "by seed_everything, to begin with the same weights."
        )


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in [*module.named_parameters(), *module.named_buffers()] if t.numel()}
