"""What goes into the layers to adapt over some batches: principal components for EVA, covariances for CorDA."""

import weakref
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stable.functional.eva import (
    PCAState,
    converged,
    eva_components,
    init_pca,
    merge_pca,
    redistribute_ranks,
    update_pca,
    variance_ratios,
)
from lightning_stable.peft._data_pass import DataPass
from lightning_stable.peft._inject import base_matrix

__all__ = ["Components", "covariances", "principal_components"]

_IGNORED = -100  # the label of tokens that nothing is predicted for


class Components:
    """Principal components of layers' inputs, with one computation for layers that have the same input.

    Args:
        owner: The class that is named in messages.
        layers: The layers by name.
        ranks: Their ranks.
        rho: How many times its rank a layer may be given.
        tau: Least cosine at which a component counts as settled.
        share_inputs: Whether layers are asked for the same input.
    """

    def __init__(
        self,
        owner: str,
        layers: Mapping[str, nn.Module],
        ranks: Mapping[str, int],
        *,
        rho: float,
        tau: float,
        share_inputs: bool,
    ) -> None:
        self.states: dict[str, PCAState] = {}
        self.followers: dict[str, list[str]] = {}
        self._owner = owner
        self._layers = layers
        self._ranks = ranks
        self._rho = rho
        self._tau = tau
        self._share = share_inputs
        self.leaders: dict[str, str] = {}
        self._settled: dict[str, Tensor] = {}
        self._active: set[str] = set(layers)
        self._inputs: list[tuple[weakref.ref[Tensor], int, str]] = []

    def take(self, name: str, features: Tensor, mask: Tensor | None) -> None:
        """Take in the input of a layer, of which ``mask`` says what counts."""
        leader = self._leading(name, features)
        if leader != name:
            return
        self._inputs.append((weakref.ref(features), features._version, name))
        if name not in self._active:
            return
        before = self.states.get(name)
        if before is None:
            width = features.shape[-1]
            ranks = max(self._ranks.values())
            before = init_pca(width, eva_components(ranks, self._rho, width), device=features.device)
        rows = features if mask is None else features[mask]
        self.states[name] = before
        if rows.numel() == 0:
            return
        after = update_pca(before, rows)
        self.states[name] = after
        settled = converged(before, after, self._tau)
        # A layer that runs several times in a batch is settled when each of them moved nothing.
        moved = self._settled.get(name)
        self._settled[name] = settled if moved is None else settled & moved

    def end_of_batch(self) -> bool:
        """Tell whether all components that would be given to layers are settled."""
        self._inputs.clear()
        given = self.given_ranks(self.states)
        self._active = set()
        for name in self.states:
            count = max(given[each] for each in (name, *self.followers.get(name, ())))
            settled = self._settled.get(name)
            if settled is None or not bool(settled[:count].all()):
                self._active.add(name)
                self._settled.pop(name, None)
        return not self._active

    def given_ranks(self, states: Mapping[str, PCAState]) -> dict[str, int]:
        """Return the rank that each layer is given."""
        ratios = {name: variance_ratios(state).cpu() for name, state in states.items()}
        own = {name: self._ranks[name] for name in self.leaders}
        return redistribute_ranks(ratios, own, self._rho, self.followers)

    def _leading(self, name: str, features: Tensor) -> str:
        """Return the layer whose components stand for this one's: the first that was given the very same tensor."""
        same = [
            leader
            for reference, version, leader in self._inputs
            if reference() is features and version == features._version
        ]
        if name not in self.leaders:
            self.leaders[name] = same[0] if same and self._share else name
            if self.leaders[name] != name:
                self.followers.setdefault(self.leaders[name], []).append(name)
        leader = self.leaders[name]
        if leader != name and leader not in same:
            raise ValueError(
                f"{self._owner}: layer {name!r} had the input of {leader!r} at first, and another one later. Set "
                "init_options={'share_inputs': False}, which computes components for each layer."
            )
        return leader


def principal_components(
    data: DataPass, components: Components, layers: Mapping[str, nn.Module]
) -> dict[str, PCAState]:
    """Return the components of each layer's input, or of the one that stands for it, of the batches of all processes.

    Raises:
        ValueError: If a layer did not run, or processes do not agree which layers have the same input.
    """

    def look() -> None:
        with _Watch(layers, components.take) as watch:
            data.run(watch.begin, lambda _loss: components.end_of_batch(), gradients=False)
        _check_all_ran(data, layers, set(components.leaders))
        _check_rows(data, "eva", {name for name, state in components.states.items() if not int(state.rows)})

    data.ranks.together(look)
    structures = data.ranks.every(components.leaders)
    if any(structure != structures[0] for structure in structures):
        raise ValueError(
            f"{data.owner}: processes do not agree which layers have the same input. Set "
            "init_options={'share_inputs': False}."
        )
    everyones = data.ranks.every({name: _on_cpu(state) for name, state in components.states.items()})
    return {name: reduce(merge_pca, (each[name] for each in everyones)) for name in sorted(everyones[0])}


def covariances(data: DataPass, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the mean over batches of X^T X for the rows X of each layer's input, scaled to at most 1, on the CPU.

    Raises:
        ValueError: If a layer did not run.
    """
    widths = {name: base_matrix(layer).shape[1] for name, layer in layers.items()}
    sums = {name: torch.zeros(width, width) for name, width in widths.items()}
    runs = {name: torch.zeros(()) for name in layers}
    ran: set[str] = set()

    def take(name: str, features: Tensor, mask: Tensor | None) -> None:
        rows = (features if mask is None else features[mask]).reshape(-1, features.shape[-1]).float()
        ran.add(name)
        if rows.numel() == 0:
            return
        rows = rows / rows.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        sums[name] += (rows.T @ rows).cpu()
        runs[name] += 1

    def look() -> None:
        with _Watch(layers, take) as watch:
            data.run(watch.begin, lambda _loss: False, gradients=False)
        _check_all_ran(data, layers, ran)
        _check_rows(data, "corda", {name for name, count in runs.items() if not count})

    data.ranks.together(look)
    return {name: data.ranks.total(total) / data.ranks.total(runs[name]) for name, total in sums.items()}


class _Watch:
    """Hands the inputs of layers on, with what says which rows of a batch count."""

    def __init__(self, layers: Mapping[str, nn.Module], take: Callable[[str, Tensor, Tensor | None], None]) -> None:
        self._layers = layers
        self._take = take
        self._masks: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._look, name), with_kwargs=True))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, batch: Any) -> None:
        """Note which positions of a batch are padding or have no label, where it says so."""
        self._masks = []
        if isinstance(batch, Mapping):
            if isinstance(batch.get("attention_mask"), Tensor):
                self._masks.append(batch["attention_mask"] != 0)
            if isinstance(batch.get("labels"), Tensor):
                self._masks.append(batch["labels"] != _IGNORED)

    def _look(self, name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        # Each says something of this input only if it has its rows: labels may be one a sequence.
        masks = [mask for mask in self._masks if mask.shape == given.shape[:-1]]
        self._take(name, given, reduce(torch.logical_and, masks) if masks else None)


def _check_all_ran(data: DataPass, layers: Mapping[str, nn.Module], ran: set[str]) -> None:
    idle = [name for name in layers if name not in ran]
    if idle:
        raise ValueError(
            f"{data.owner}: layer {idle[0]!r} did not run in {data.report.batches} batches, so nothing is known of its "
            "input. Leave it out of target_modules, or give more init_batches."
        )


def _check_rows(data: DataPass, init: str, empty: set[str]) -> None:
    if empty:
        raise ValueError(
            f"{data.owner}: init={init!r} has no rows to start layer {sorted(empty)[0]!r} from: attention_mask and "
            f"labels of {data.report.batches} batches leave out every position ({_IGNORED} is a label that does not "
            "count). Look at the masks, or give more init_batches."
        )


def _on_cpu(state: PCAState) -> PCAState:
    return PCAState(state.mean.cpu(), state.components.cpu(), state.values.cpu(), state.spread.cpu(), state.rows)
