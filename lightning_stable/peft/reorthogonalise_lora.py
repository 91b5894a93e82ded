r"""Bring LoRA's factors into one form as training goes on: orthonormal rows of A, the product unchanged.

Use it in federated or local training where only B is trained (FedSVD): workers then average B exactly, and A follows
what B has learned. Use it also where A and B drift to very different sizes. It moves no weight of the model, but from
there on an optimizer's steps are taken in other coordinates, so it is no mere tidying up. Cost: every
``every_n_steps`` steps two QR decompositions and an SVD of a (rank, rank) matrix for each layer, and among several
processes a broadcast of the factors.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.peft.reorthogonalise_lora import ReorthogonaliseLoRA
    >>> callbacks = [ReorthogonaliseLoRA(every_n_steps=100)]
    >>> trainer = Trainer(callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False)
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional.reorthogonalise_lora import (
    Reorthogonalised,
    reorthogonalise,
    turn_average,
    turn_squares,
)

__all__ = ["ReorthogonaliseLoRA"]

_NAME = "ReorthogonaliseLoRA"
# Entries of optimizers' states by what they are averages of.
_AVERAGES = ("exp_avg", "momentum_buffer", "grad_avg")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


class _Pair(NamedTuple):
    """The factors of one adapter of one layer."""

    name: str
    a: nn.Parameter
    b: nn.Parameter


class ReorthogonaliseLoRA(Callback):
    r"""Replace LoRA's factors by those of the singular value decomposition of their product, every so many steps.

    .. math:: A \leftarrow V^\top, \qquad B \leftarrow U S, \qquad U S V^\top = B A

    for each layer of peft's LoRA in the module, its active adapters (equations, and what becomes of an optimizer's
    averages: :mod:`lightning_stable.functional.reorthogonalise_lora`). As FedSVD does each round, arXiv 2505.12805.
    A factor that does not train changes too, and does not train after it. Factors of a frozen A are then no longer what
    they started as: what saves the adapter has to save both.

    Where workers train apart, with a strategy of local steps, it is done at the first end of a round from
    ``every_n_steps`` on, when all have the same factors: with ``every_n_steps=1`` at each. The exchange has to be a
    plain mean that is waited for.

    Args:
        every_n_steps: Optimizer steps from one time to the next, at least 1.
        moments: "rotate" takes the optimizer's averages of both factors into the new coordinates: exactly for averages
            of gradients, approximately for those of squares. "reset" forgets them, and with them the number of steps
            that corrects their bias. "rotate" is the default, since after "reset" each time begins as training did,
            with steps from single gradients.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit if the module has no layer of LoRA,
            one has no such form, or another callback or the strategy keeps what depends on the coordinates; in training
            for an optimizer whose state is not known with "rotate".
    """

    def __init__(self, every_n_steps: int = 100, moments: str = "rotate") -> None:
        check_count("every_n_steps", every_n_steps, 1, "optimizer steps")
        check_choice("moments", moments, ("rotate", "reset"))
        self.every_n_steps = every_n_steps
        self.moments = moments
        # Since the last time, or the start.
        self._steps = 0
        self._global_step = 0
        self._rounds = 0

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._steps = 0

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = int(state_dict["steps"])

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in setup: adapters may be made there by another callback.
        _check_strategy(trainer)
        pairs = _pairs(pl_module)
        _check_company(trainer, frozen=not all(pair.a.requires_grad and pair.b.requires_grad for pair in pairs))
        rank_zero_info(f"{_NAME}: {len(pairs)} layers, every {self.every_n_steps} steps.")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._global_step, self._rounds = trainer.global_step, _finished_rounds(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._global_step:
            return
        self._steps += 1
        if self._steps >= self.every_n_steps and (
            not _trains_apart(trainer) or _finished_rounds(trainer) > self._rounds
        ):
            self._steps = 0
            for pair, new in zip(pairs := _pairs(pl_module), _computed(trainer, pairs), strict=True):
                self._put(trainer.optimizers, pair, new)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    # ------------------------------------------------------------------ helpers

    @torch.no_grad()
    def _put(self, optimizers: list[Optimizer], pair: _Pair, new: Reorthogonalised) -> None:
        """Put new factors in the place of the old ones, and what belongs to them into the same coordinates."""
        for parameter, value, turn in ((pair.a, new.a, new.turn_a), (pair.b, new.b, new.turn_b)):
            of_a = parameter is pair.a
            if parameter.grad is not None:
                # Of a step that is still being accumulated, under manual optimisation.
                parameter.grad.copy_(_turned(parameter.grad, turn, of_a))
            for optimizer in optimizers:
                if self.moments == "reset":
                    optimizer.state.pop(parameter, None)
                else:
                    _turn_state(optimizer, parameter, turn, of_a, pair.name)
            parameter.copy_(value.view_as(parameter))


def _turn_state(optimizer: Optimizer, parameter: nn.Parameter, turn: Tensor, of_a: bool, name: str) -> None:
    """Take an optimizer's state of one factor into the new coordinates."""
    for entry, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if entry not in _AVERAGES + _SQUARES or value.shape != parameter.shape:
            raise ValueError(
                f"{_NAME}: moments='rotate' does not know what {entry!r} in the state of {type(optimizer).__name__} is "
                f"an average of (layer {name!r}). Set moments='reset', or use Adam, AdamW, SGD or RMSprop."
            )
        value.copy_(_turned(value, turn, of_a, squares=entry in _SQUARES))


def _turned(value: Tensor, turn: Tensor, of_a: bool, *, squares: bool = False) -> Tensor:
    rule = turn_squares if squares else turn_average
    return rule(_matrix(value, of_a), turn.to(value.device), of_a=of_a).view_as(value)


def _matrix(factor: Tensor, of_a: bool) -> Tensor:
    """Return a factor as (rank, in) or (out, rank); that of a convolution has further dimensions."""
    return factor.flatten(1) if of_a or factor.shape[2:].numel() == 1 else factor


def _pairs(module: nn.Module) -> list[_Pair]:
    """Return the factors of all active adapters of LoRA.

    Raises:
        ValueError: If there are none, or some cannot be brought into the form.
    """
    from peft.tuners.lora import LoraLayer  # takes seconds, which runs without adapters are spared

    pairs = [
        _pair(name, adapter, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in cast(Any, layer).active_adapters
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    ]
    if not pairs:
        raise ValueError(
            f"{_NAME}: {type(module).__name__} has no layer with an active adapter of peft's LoRA. Put adapters in "
            "first, with the callback Adapters or peft.inject_adapter_in_model, or leave this callback out."
        )
    shared: set[int] = set()
    for pair in pairs:
        if not shared.isdisjoint((id(pair.a), id(pair.b))):
            raise ValueError(
                f"{_NAME}: layer {pair.name!r} shares a factor with another layer, so its product cannot be kept while "
                "the other's changes. Use adapters that share nothing."
            )
        shared |= {id(pair.a), id(pair.b)}
    return pairs


def _pair(name: str, adapter: str, layer: Any) -> _Pair:
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    plain = variant is None or "Dora" in type(variant).__name__
    rank, left, right = layer.r[adapter], _matrix(b, of_a=False), _matrix(a, of_a=True)
    smaller = min(left.shape[0], right.shape[1])
    if not plain or left.ndim != 2 or right.shape[0] != rank or left.shape[1] != rank:
        kind = type(layer if plain else variant).__name__
        raise ValueError(
            f"{_NAME}: layer {name!r} with {kind} is not a product of two factors of rank {rank}, and has no such "
            "form. Use plain LoRA, or leave this callback out."
        )
    if rank > smaller:
        raise ValueError(
            f"{_NAME}: layer {name!r} has rank {rank}, above its smaller side {smaller}: there are no {rank} "
            "orthonormal rows. Choose a lower rank for it (rank_pattern)."
        )
    return _Pair(name, a, b)


def _computed(trainer: Trainer, pairs: list[_Pair]) -> Iterator[Reorthogonalised]:
    """Return the new factors, on every process those that rank 0 has computed."""
    new = (reorthogonalise(_matrix(pair.a, of_a=True), _matrix(pair.b, of_a=False)) for pair in pairs)
    if trainer.world_size == 1:
        return new
    # Other hardware, or another number of threads, rounds otherwise.
    own = [tuple(part.cpu() for part in each) for each in new] if trainer.is_global_zero else None
    found = cast(list[tuple[Tensor, ...]], trainer.strategy.broadcast(own))
    return (Reorthogonalised(*each) for each in found)


def _trains_apart(trainer: Trainer) -> bool:
    """Tell whether the strategy lets workers make steps of their own between two exchanges."""
    return trainer.world_size > 1 and getattr(trainer.strategy, "local_steps", None) is not None


def _finished_rounds(trainer: Trainer) -> int:
    """Return how many rounds have ended with an exchange, where there are any."""
    return int(getattr(trainer.strategy, "finished_rounds", 0))


def _check_strategy(trainer: Trainer) -> None:
    """Raise ``ValueError`` for strategies that shard factors, or keep what depends on their coordinates."""
    strategy = cast(Any, trainer.strategy)
    name = type(strategy).__name__
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
            f"{_NAME} does not work with {name}, which shards the factors. Use a strategy that keeps whole weights, "
            "such as 'ddp' or a single device."
        )
    if trainer.world_size > 1 and getattr(strategy, "freeze_step", None) is not None:
        raise ValueError(
            f"{_NAME} does not work with {name}, which exchanges averages of gradients that stay in the old "
            "coordinates. Use 'ddp', or LocalSGDStrategy."
        )
    if not _trains_apart(trainer):
        return
    plain = getattr(strategy, "outer_lr", 1.0) == 1.0 and getattr(strategy, "outer_momentum", 0.0) == 0.0
    if (
        strategy.delayed
        or not plain
        or getattr(strategy, "comm_dtype", None)
        or not hasattr(strategy, "finished_rounds")
    ):
        raise ValueError(
            f"{_NAME} needs rounds that end in a plain mean of the weights at once, and {name} as it is set takes the "
            "change of the factors for a movement to delay, scale, repeat or round. Use LocalSGDStrategy without "
            "delayed and comm_dtype."
        )


def _check_company(trainer: Trainer, *, frozen: bool) -> None:
    """Raise ``ValueError`` for callbacks that keep values of the weights in the old coordinates."""
    for other in cast(list[Callback], cast(Any, trainer).callbacks):
        name = type(other).__name__
        if hasattr(other, "worker_tensors") or isinstance(other, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{_NAME} and {name} are both among the Trainer's callbacks: {name} keeps values of the factors from "
                "before they change, and takes them for comparable. Keep one of them."
            )
        if frozen and getattr(other, "rewind_after", None) is not None:
            raise ValueError(
                f"{_NAME} and {name} with rewind_after are both among the Trainer's callbacks: a rewind brings back "
                "what trains and not the frozen factor that belongs to it. Leave out rewind_after."
            )
