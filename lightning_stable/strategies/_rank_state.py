"""State that differs between processes, in a checkpoint that rank 0 writes.

The host saves one process' state only. What a strategy keeps for each process, such as the part of a gradient that it
has not sent yet, is gathered here as a list with an entry for each rank.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

__all__ = ["gather_rank_states", "on_cpu", "own_rank_state"]


def gather_rank_states(state: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the states of all processes, in the order of their ranks, on rank 0 and ``None`` on the others.

    Every process has to call it. The tensors of the result are copies on the CPU. Rank 0 takes one state after the
    other, so that on a GPU no more than one of them is under way at a time.

    Args:
        state: This process' state: tensors, numbers, strings, lists and dictionaries of them.
    """
    own = on_cpu(state)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    if dist.get_rank() != 0:
        dist.send_object_list([own], dst=0)
        return None
    states = [own]
    for rank in range(1, dist.get_world_size()):
        received: list[Any] = [None]
        dist.recv_object_list(received, src=rank)
        states.append(received[0])
    return states


def own_rank_state(saved: Sequence[dict[str, Any]], rank: int, world_size: int, owner: str) -> dict[str, Any] | None:
    """Return this process' entry of what ``gather_rank_states`` made, or ``None`` if the number of processes changed.

    Args:
        saved: The states in the order of their ranks.
        rank: This process' rank.
        world_size: How many processes there are now.
        owner: Whose state it is and what goes on without it, for the warning: it is the warning's first words.
    """
    if len(saved) == world_size:
        return saved[rank]
    rank_zero_warn(
        f"{owner}: the checkpoint was made by {len(saved)} process(es) and this run has {world_size}. What was kept "
        "for each process does not fit and begins anew. Weights and optimizers go on as saved. To go on exactly, "
        f"resume with {len(saved)} process(es)."
    )
    return None


def on_cpu(value: Any) -> Any:
    """Copy nested containers, with their tensors on the CPU in storage of their own: a view would take all of its."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_cpu(entry) for entry in value]
    return value
