"""A copy of what an optimizer changes, to go back to: its weights, its state of each of them, the module's buffers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["restore_snapshot", "take_snapshot"]

# Safe to load: tensors, numbers and strings in dictionaries.
Snapshot = dict[str, dict[str, Any]]


def take_snapshot(module: nn.Module, optimizer: Optimizer, parameters: dict[str, Tensor]) -> Snapshot:
    """Copy the parameters, the optimizer's entries for each, and the module's buffers.

    Args:
        module: Whose buffers are copied.
        optimizer: Its parameter groups, with the learning rates, are left out.
        parameters: What the optimizer trains, by name.
    """
    held = {name: optimizer.state[parameter] for name, parameter in parameters.items() if parameter in optimizer.state}
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "buffers": {name: buffer.detach().clone() for name, buffer in module.named_buffers()},
        "state": {name: {entry: _copied(value) for entry, value in state.items()} for name, state in held.items()},
    }


@torch.no_grad()
def restore_snapshot(
    snapshot: Snapshot, module: nn.Module, optimizer: Optimizer, parameters: dict[str, Tensor]
) -> None:
    """Put everything back as it was, in place; the snapshot can be used again.

    What joined the optimizer later is left as it is.
    """
    for group, present in (("weights", parameters), ("buffers", dict(module.named_buffers()))):
        for name, value in snapshot[group].items():
            if name in present and present[name].shape == value.shape:
                present[name].copy_(value)
    for name in snapshot["weights"].keys() & parameters.keys():
        parameter = parameters[name]
        present = optimizer.state.pop(parameter, {})
        if name in snapshot["state"]:
            copies = {entry: _copied(value) for entry, value in snapshot["state"][name].items()}
            # A snapshot from a checkpoint may be on another device; a step count may have to stay on the CPU.
            optimizer.state[parameter] = {
                entry: value.to(present[entry].device) if isinstance(present.get(entry), Tensor) else value
                for entry, value in copies.items()
            }


def _copied(value: Any) -> Any:
    """Return a copy of an entry of an optimizer's state."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
