"""Run with other weights and always get the live ones back; read both sets from a checkpoint."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightSwap", "floating_buffers", "named_tensors", "read_weights", "tied_names"]

# Bytes copied at once while two sets of weights change places: bounds the extra memory of an exchange.
_CHUNK_BYTES = 64 * 2**20


class WeightSwap:
    """Two sets of values for the same weights, one of which the module runs with.

    Where both sets have the same precision and device they change places, which takes no further copy. Where they
    differ, the live values are kept aside while the others are in. Values move, tensors stay: optimizers, DDP and
    compiled graphs go on seeing the tensors they hold.
    """

    def __init__(self) -> None:
        self._live: list[Tensor] = []
        self._other: list[Tensor] = []
        self._aside: list[Tensor] | None = None
        self.active = False

    @torch.no_grad()
    def swap_in(self, live: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Let the module's tensors ``live`` take the values of ``other``."""
        if self.active:
            raise RuntimeError("The other weights are in place already: swap_out() has to come first.")
        self._live, self._other = list(live), list(other)
        self.active = True
        if all(a.dtype == b.dtype and a.device == b.device for a, b in zip(live, other, strict=True)):
            _exchange(self._live, self._other)
            return
        self._aside = [tensor.detach().clone() for tensor in live]
        torch._foreach_copy_(self._live, self._other)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Give the module its live weights back; nothing happens if it has them."""
        if not self.active:
            return
        if self._aside is None:
            _exchange(self._live, self._other)
        else:
            torch._foreach_copy_(self._live, self._aside)
        self.release()

    def release(self) -> None:
        """Forget the set that is not in the module, and leave the module as it is."""
        self._live, self._other, self._aside, self.active = [], [], None, False

    def live_values(self) -> list[Tensor]:
        """Return the tensors that hold the live values while the others are in place."""
        return self._other if self._aside is None else self._aside

    def other_values(self) -> list[Tensor]:
        """Return the tensors that hold the other values while they are in place."""
        return self._live if self._aside is None else self._other


def read_weights(
    path: str | os.PathLike[str], which: str, into: nn.Module | None = None, prefix: str = ""
) -> dict[str, Tensor]:
    """Read the live or the averaged weights from a checkpoint (arguments as in :meth:`.EMA.load_weights`).

    Raises:
        ValueError: If ``which`` is unknown, the checkpoint holds no average, no name begins with ``prefix``, or
            ``into`` does not have these weights.
    """
    if which not in ("ema", "live"):
        raise ValueError(
            f"which={which!r} is unknown. Choose 'ema' (the averaged weights) or 'live' (the trained ones)."
        )
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    states = [
        state
        for state in checkpoint.get("callbacks", {}).values()
        if isinstance(state, dict) and {"shadow", "live", "aliases"} <= state.keys()
    ]
    if not states:
        raise ValueError(
            f"{os.fspath(path)} holds no averaged weights beside its state_dict: it was saved without EMA or "
            "BalancedEMA, before the average began, or with save_weights_only=True. Its state_dict is all there is."
        )
    weights = dict(checkpoint["state_dict"])
    values = states[0]["shadow" if which == "ema" else "live"]
    for alias, name in states[0]["aliases"].items():
        if alias in weights and name in values:
            weights[alias] = values[name].to(weights[alias].dtype)
    chosen = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not chosen:
        raise ValueError(
            f"prefix={prefix!r} fits no weight of {os.fspath(path)}; the first is {next(iter(weights))!r}."
        )
    if into is not None:
        try:
            into.load_state_dict(chosen)
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {os.fspath(path)} do not fit {type(into).__name__}. Name the submodule that it is, as "
                f"in prefix={next(iter(weights)).partition('.')[0] + '.'!r}. {error}"
            ) from error
    return chosen


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def floating_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers by name."""
    return {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Map every name of a parameter or buffer to the first one of the same tensor: tied weights have several."""
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _exchange(left: list[Tensor], right: list[Tensor]) -> None:
    """Let two lists of tensors change values, a chunk at a time."""
    for chunk in _chunks(left):
        kept = [tensor.detach().clone() for tensor in left[chunk]]
        torch._foreach_copy_(left[chunk], right[chunk])
        torch._foreach_copy_(right[chunk], kept)


def _chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Yield slices of at most :data:`_CHUNK_BYTES`, at least one tensor each."""
    start, size = 0, 0
    for index, tensor in enumerate(tensors):
        if size and size + tensor.nbytes > _CHUNK_BYTES:
            yield slice(start, index)
            start, size = index, 0
        size += tensor.nbytes
    if start < len(tensors):
        yield slice(start, len(tensors))
