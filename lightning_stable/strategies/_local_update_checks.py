"""What local updates cannot work with, told before training begins."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, Timer, WeightAveraging
from lightning.pytorch.plugins import DeepSpeedPrecision, FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_stable.functional._settings import check_choice, check_count
from lightning_stable.functional.local_update import check_local_steps
from lightning_stable.strategies._ddp_settings import changed_ddp_settings, check_ddp_settings

__all__ = [
    "check_callbacks",
    "check_module",
    "check_optimizers",
    "check_precision",
    "check_rounds",
    "check_settings",
    "check_unfrozen",
    "trained_names",
    "trained_parameters",
]

# By name, since importing torch's distributed optimizers warns. LBFGS keeps a history that has no mean.
_TIED = {"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "LBFGS"}


def check_settings(owner: str, settings: Mapping[str, Any], workers: str) -> None:
    """Raise ``ValueError`` for settings of DDP that do not exist, have no effect, or work against the strategy."""
    check_ddp_settings(owner, settings)
    unused = changed_ddp_settings(settings)
    if unused and workers != "node":
        raise ValueError(
            f"{owner} has no use for {', '.join(unused)}: with workers='process' there is no DDP around the module. "
            "Leave them out, or set workers='node'."
        )


def check_rounds(
    local_steps: int | Sequence[Sequence[int]] | str,
    *,
    delayed: bool,
    variant: str,
    workers: str,
    warmup_steps: int,
    comm_dtype: str | None,
    timeout: timedelta | None,
    **switches: bool,
) -> None:
    """Raise ``ValueError`` for settings of the rounds that are not allowed; ``switches`` are those of two values."""
    for name, value in {"delayed": delayed, **switches}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is neither True nor False.")  # noqa: TRY004
    if not isinstance(timeout, timedelta) or timeout <= timedelta():
        raise ValueError(f"timeout={timeout!r} is not a duration above 0: give a datetime.timedelta.")
    if comm_dtype not in (None, "bfloat16"):
        raise ValueError(f"comm_dtype={comm_dtype!r} is unknown. Choose None or 'bfloat16'.")
    if not isinstance(local_steps, str):
        check_local_steps(local_steps)
    elif local_steps != "auto":
        raise ValueError(f"local_steps={local_steps!r} is unknown. Give a number of steps, pairs of them, or 'auto'.")
    elif not delayed:
        raise ValueError(
            "local_steps='auto' picks the steps that hide a delayed exchange, and a blocking one is waited for: set "
            "delayed=True or give a number."
        )
    check_choice("variant", variant, ("paper", "corrected"))
    if variant != "corrected" and not delayed:
        raise ValueError(
            f"variant={variant!r} says what follows a delayed exchange, and this one is waited for: set delayed=True, "
            "or leave it out."
        )
    check_choice("workers", workers, ("process", "node"))
    check_count("warmup_steps", warmup_steps, 0, "optimizer steps")


def check_module(owner: str, module: LightningModule, *, final_merge: bool) -> None:
    """Raise ``ValueError`` for modules whose weights cannot be averaged between workers."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    reasons: list[str | None] = (
        [] if trained else ["has nothing to exchange: no parameter of the module has requires_grad."]
    )
    reasons += [_why_not_parameter(name, parameter) for name, parameter in trained.items()]
    reasons.append(_why_not_together(trained))
    reasons += [_why_not_part(name or "the module", part) for name, part in module.named_modules()]
    if final_merge and not module.automatic_optimization:
        reasons.append(
            "with final_merge=True runs the training step once more for batch normalisation, and under manual "
            "optimisation that would train. Set final_merge=False."
        )
    found = [reason for reason in reasons if reason]
    if found:
        raise ValueError(f"{owner} {found[0]}")


def check_precision(owner: str, plugin: Precision) -> None:
    """Raise ``ValueError`` for the precision plugin of a strategy that shards."""
    if isinstance(plugin, (FSDPPrecision, DeepSpeedPrecision)):
        raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
            f"{owner} keeps a whole model on every worker and does not work with {type(plugin).__name__}, made for "
            "sharded ones. Set the Trainer's precision instead, such as 'bf16-mixed'."
        )


def check_callbacks(owner: str, callbacks: Sequence[Callback]) -> None:
    """Raise ``ValueError`` for callbacks that would part the workers for good; warn of those that tie them together."""
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(  # noqa: TRY004  a combination that does not fit, not a wrong type
                f"{owner} does not work with {name}, which ends with an average of each worker's own weights. Use EMA "
                "of lightning_stable.callbacks, whose average is that of the mean weights."
            )
        if isinstance(callback, Timer) or getattr(callback, "_train_time_interval", None) is not None:
            rank_zero_warn(
                f"{owner}: {name} asks rank 0 for the time at every batch, which ties the workers together between "
                "exchanges. Count steps instead of time where the link is slow."
            )


def check_optimizers(owner: str, optimizers: Sequence[Optimizer], *, timed: bool) -> None:
    """Raise ``ValueError`` for optimizers that train nothing, or that communicate themselves."""
    if not any(group["params"] for optimizer in optimizers for group in optimizer.param_groups):
        raise ValueError(f"{owner} counts optimizer steps, but configure_optimizers returned no optimizer.")
    if timed and len(optimizers) > 1:
        raise ValueError(
            f"{owner} with local_steps='auto' times the steps of one optimizer, and there are {len(optimizers)}. "
            "Give a number of steps."
        )
    tied = [o for o in optimizers if _TIED.intersection(kind.__name__ for kind in type(o).__mro__)]
    if tied:
        raise ValueError(
            f"{owner} needs an optimizer whose state is each worker's own and has a mean, not "
            f"{type(tied[0]).__name__}. Use SGD or AdamW, without a wrapper that communicates."
        )


def check_unfrozen(owner: str, trained: set[str], module: nn.Module) -> None:
    """Raise ``ValueError`` if other parameters train now than those whose names are given."""
    changed = trained ^ trained_names(module)
    if changed:
        raise ValueError(
            f"{owner} exchanges the parameters that had requires_grad when training began, but {sorted(changed)[0]!r} "
            "changed it since. Freeze and unfreeze between fits."
        )


def trained_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters that train."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def trained_parameters(module: nn.Module) -> list[Tensor]:
    """Return the values of the parameters that train, in the order of the module."""
    return [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]


def _why_not_parameter(name: str, parameter: nn.Parameter) -> str | None:
    if isinstance(parameter, DTensor):
        return (
            f"keeps a whole model on every worker, but parameter {name!r} is sharded. Leave out the sharding, or use "
            f"{FSDPStrategy.__name__} or {ModelParallelStrategy.__name__} in its place."
        )
    if not parameter.is_floating_point():
        return f"averages real numbers, but parameter {name!r} is {parameter.dtype}."
    return None


def _why_not_together(parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Say which two parameters share memory. A module that ties weights by one parameter has only one."""
    seen: dict[tuple[int, int], str] = {}
    for name, parameter in parameters.items():
        if parameter.numel() == 0 or type(parameter.data) is not Tensor:
            # Other kinds of tensors may have no memory of their own to ask for.
            continue
        place = parameter.untyped_storage().data_ptr(), int(parameter.storage_offset())
        if place in seen:
            return (
                f"moves each parameter once, but {seen[place]!r} and {name!r} share their memory. Tie them by using "
                "the same Parameter in both places."
            )
        seen[place] = name
    return None


def _why_not_part(name: str, part: nn.Module) -> str | None:
    if isinstance(part, FullyShardedDataParallel):
        return f"keeps a whole model on every worker, but {name!r} is sharded by FSDP. Leave it out."
    if isinstance(part, nn.SyncBatchNorm):
        return (
            f"lets workers make steps of their own, but {name!r} is a SyncBatchNorm, which ties them together at every "
            "step. Leave out sync_batchnorm: statistics are averaged with the weights."
        )
    return None
