"""The fading low-rank helper of a simulated precision: when a phase begins, and how far it is."""

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable.functional._simulated_layers import Quantized
from lightning_stable.functional.fading_helper import Helper, helper_alphas, helper_factors, helper_ranks
from lightning_stable.functional.simulated import quantized_layers
from lightning_stable.precision._host import optimizer_steps, total_steps
from lightning_stable.precision._names import grouped
from lightning_stable.precision._parts import Part

__all__ = ["FadingHelper"]

# Of each layer by name, L and R.
_Factors = dict[str, list[Tensor]]


class FadingHelper(Part):
    """Gives converted layers a low-rank helper beside their quantized weights, until it has faded.

    Args:
        owner: The class that is named in messages.
        rank: The rank of the first phase.
        phase_steps: Optimizer steps of a phase; ``None``: the steps of the fit, evenly divided among the phases.
    """

    def __init__(self, owner: str, rank: int, phase_steps: int | None) -> None:
        super().__init__(owner)
        self._ranks = helper_ranks(rank)
        self._phase_steps = phase_steps
        self._phase = -1  # of those before the first batch
        self._step = -1  # for which the layers were told last
        self._factors: _Factors = {}
        self._alphas: list[float] = []
        self._told = False

    @override
    def line(self) -> str:
        ranks = ", ".join(map(str, self._ranks))
        length = "that divide the fit evenly" if self._phase_steps is None else f"of {self._phase_steps} steps"
        return f"A helper beside each quantized weight has {len(self._ranks)} phases {length}, of rank {ranks}."

    @override
    def begin(self, pl_module: LightningModule) -> None:
        rank, sides = self._ranks[0], dict[int, list[str]]()
        for name, layer in _helped(pl_module).items():
            side = min(cast(Tensor, layer.weight).flatten(1).shape)
            if side <= rank:
                sides.setdefault(side, []).append(name)
        if sides:
            layers = ", ".join(f"{grouped(sides[side])} ({side})" for side in sorted(sides))
            rank_zero_warn(
                f"helper_rank={rank} of {self._owner} is cut to the smaller side of the weight, where that is no "
                f"larger: {layers}. While the rank of a phase is that large, the helper makes up for all that rounding "
                "took at the start of the phase. Take a lower rank, or leave such layers out with exclude."
            )

    @override
    def before_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._follow(trainer, pl_module)

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After an optimizer step at once, for what validates or saves before the next batch.
        self._follow(trainer, pl_module)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = optimizer_steps(trainer)
        if step == self._step:
            return
        if self._phase_steps is None:
            self._phase_steps = self._shared(total_steps(trainer))
        if not self._told:
            self._tell_end(self._phase_steps, total_steps(trainer))
        phase, within = divmod(step, self._phase_steps)
        if phase >= len(self._ranks):
            self._factors, self._alphas = {}, []
        else:
            if phase != self._phase:
                self._factors = _factors(trainer, pl_module, self._ranks[phase])
            self._alphas = helper_alphas(self._ranks[phase], within / self._phase_steps)
        self._phase, self._step = phase, step
        self.apply(pl_module)

    def _tell_end(self, phase_steps: int, total: float | None) -> None:
        self._told = True
        phases = len(self._ranks)
        if total is None or phases * phase_steps <= total:
            return
        fitting = int(total) // phases
        rank_zero_warn(
            f"helper_rank={self._ranks[0]} of {self._owner} fades over {phases} phases of {phase_steps} optimizer "
            f"steps, {phases * phase_steps} in all, and training is over after {int(total)}. At its end there is still "
            f"a helper of rank {self._ranks[int(total) // phase_steps]}, which is in the plugin's state alone and not "
            "in the saved weights. "
            + (f"Take helper_phase_steps={fitting} or less" if fitting else "Take a lower rank")
            + ", or train for longer."
        )

    def _shared(self, total: float | None) -> int:
        if total is None:
            raise ValueError(
                f"helper_rank of {self._owner} divides the steps of training among phases, and its end is not known. "
                "Give helper_phase_steps, or set max_steps, or max_epochs with a loader that has a length."
            )
        if total < len(self._ranks):
            raise ValueError(
                f"helper_rank={self._ranks[0]} of {self._owner} has {len(self._ranks)} phases, and training is over "
                f"after {int(total)} optimizer steps. Train for longer, or take a lower rank."
            )
        return int(total) // len(self._ranks)

    @override
    def apply(self, module: nn.Module) -> None:
        placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for name, state in quantized_layers(module).items():
            if name not in self._factors:
                state.helper = None
                continue
            device = cast(Tensor, module.get_submodule(name).weight).device
            left, right = (factor.to(device) for factor in self._factors[name])
            self._factors[name] = [left, right]
            kind = (device, left.dtype)
            if kind not in placed:
                placed[kind] = torch.tensor(self._alphas, device=device, dtype=left.dtype)
            state.helper = Helper(left, right, placed[kind][: len(right)])

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._phase < 0:
            return {}
        steps = self._phase_steps
        found = {"phase": self._phase, "phase_steps": steps, "alphas": self._alphas, "factors": self._factors}
        return {"helper": found}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = state.get("helper")
        if found is not None:
            self._phase, self._phase_steps = int(found["phase"]), int(found["phase_steps"])
            self._alphas, self._factors = list(found["alphas"]), dict(found["factors"])
            self._step = -1


def _factors(trainer: Trainer, pl_module: LightningModule, rank: int) -> _Factors:
    """Return L and R of each layer whose weight is quantized, those of the first process in all of them."""
    found: _Factors = {}
    for name, layer in _helped(pl_module).items():
        found[name] = list(helper_factors(layer.weight_error(), rank))
    if trainer.world_size == 1:
        return found
    # Equal weights need not have equal factors to the last bit, where machines or their loads differ.
    moved = {name: [factor.cpu() for factor in pair] for name, pair in found.items()}
    return dict(trainer.strategy.broadcast(moved))


def _helped(pl_module: LightningModule) -> dict[str, Quantized]:
    """Return the layers whose weight is quantized, by name."""
    layers = {name: (pl_module.get_submodule(name), state) for name, state in quantized_layers(pl_module).items()}
    return {
        name: layer
        for name, (layer, state) in layers.items()
        if state.weights is not None and isinstance(layer, Quantized)
    }
