"""Which layers a PEFT config is for, found out and checked before anything of the module is changed."""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_stable.peft._config import DATA_INITS, SHIFTING_INITS

__all__ = [
    "Target",
    "check_names",
    "check_targets",
    "find_model",
    "find_targets",
    "is_transposed",
    "quiet_peft",
    "tuner_layers",
    "why_passed_by",
]

# What needs the weight as a matrix, or the layer's input.
_NEEDS_MATRIX = (*SHIFTING_INITS, *DATA_INITS, "orthogonal", "mica", "loldu", "svfit")


class Target(NamedTuple):
    """A layer that is to be adapted.

    Attributes:
        layer: The layer, as it is in the module.
        rank: Of its adapter; ``None`` where the kind of adapter has none.
        alpha: Its alpha, 0 where there is none.
        scaling: Factor of its product, 0 where there is none.
        dropout: Probability of dropout in front of the adapter.
        low_rank: Whether the adapter is a product of two factors of that rank.
    """

    layer: nn.Module
    rank: int | None
    alpha: float
    scaling: float
    dropout: float
    low_rank: bool = False


def find_model(owner: str, module: nn.Module, path: str | None) -> nn.Module:
    """Return the submodule called ``path``, or the module itself for ``None``.

    Raises:
        ValueError: If there is none; the message lists what there is.
    """
    if not path:
        return module
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        children = ", ".join(repr(name) for name, _ in module.named_children()) or "none"
        raise ValueError(
            f"{owner}: {type(module).__name__} has no submodule {path!r}; its submodules are {children}. Give the path "
            "of the one to adapt as model, or model=None for the whole module."
        ) from error


def check_names(owner: str, root: nn.Module, path: str | None, config: Any) -> None:
    """Raise ``ValueError`` if a name in ``target_modules`` is none of the model's, though others may be."""
    model = find_model(owner, root, path)
    if getattr(config, "trainable_token_indices", None):
        raise ValueError(
            f"{owner}: config has trainable_token_indices, which is not offered. Train the embedding as a whole, by "
            "trainable=['*embed_tokens*'] or modules_to_save."
        )
    if path and not any(True for _ in model.children()):
        parent, _, name = path.rpartition(".")
        raise ValueError(
            f"{owner}: model={path!r} is a single layer ({type(model).__name__}), which cannot be replaced within "
            f"itself. Give the module around it, model={parent or None!r}, and name the layer in target_modules: "
            f"[{name!r}]."
        )
    names = [name for name, _ in model.named_modules()]
    asked = getattr(config, "target_modules", None)
    if isinstance(asked, str):
        stray = [asked] if asked.lower() != "all-linear" and not any(_fits(asked, name) for name in names) else []
    else:
        ends = {name[at:] for name in names for at in (0, *(dot.end() for dot in re.finditer(r"\.", name)))}
        stray = sorted(set(asked or ()) - ends)
    if not stray:
        return
    told = f"{owner}: target_modules has {stray[0]!r}, which matches no layer of {type(model).__name__}."
    if path and stray[0].startswith(f"{path}."):
        told += f" Names are relative to model={path!r}: give {stray[0].removeprefix(f'{path}.')!r}."
    raise ValueError(f"{told} Layers with weights: {_listed(model)}.")


def why_passed_by(layer: nn.Module, parent: nn.Module) -> str | None:
    """Return why an adapter in the place of a layer would not be asked, if so: the parent reads the weight itself."""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is the projection of a MultiheadAttention, which reads the weight past the layer. Leave it out."
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "is part of a TransformerEncoderLayer, whose fast path in evaluation reads the weight past the layer. Call "
            "torch.backends.mha.set_fastpath_enabled(False) first, or leave it out."
        )
    return None


def find_targets(owner: str, model: nn.Module, config: Any) -> dict[str, Target]:
    """Return the layers that peft would adapt, by name, and leave the module as it is.

    peft itself is asked, on a stand-in that has the module's structure and shares its weights, with adapters that have
    no values. ``config`` is completed there, as with the targets that peft knows for a transformers model.

    Raises:
        ValueError: If peft refuses, or nothing matches; the message lists the layers that there are.
    """
    import peft

    if any(True for _ in tuner_layers(model)):
        raise ValueError(
            f"{owner}: {type(model).__name__} has adapters of peft already. Give the model without them, and let "
            f"{owner} make them; or merge them first."
        )
    _refuse_lazy(owner, model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    stand_in = _stand_in(model, {})
    keeps_factors = getattr(config, "save_factors", None)
    if keeps_factors is not None:
        config.save_factors = True  # else our tuners decompose the weights for the stand-in, too
    try:
        with quiet_peft():
            peft.inject_adapter_in_model(config, stand_in, low_cpu_mem_usage=True)
    except Exception as error:
        raise ValueError(
            f"{owner}: peft cannot adapt {type(model).__name__} as asked: {error} Layers with weights: "
            f"{_listed(model)}."
        ) from error
    finally:
        if keeps_factors is not None:
            config.save_factors = keeps_factors
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    found = {name: _target(layer, model.get_submodule(name)) for name, layer in tuner_layers(stand_in)}
    if not found:
        raise ValueError(
            f"{owner}: target_modules={config.target_modules!r} matches no layer of {type(model).__name__}. Layers "
            f"with weights: {_listed(model)}."
        )
    return found


def check_targets(owner: str, root: nn.Module, model: nn.Module, targets: dict[str, Target], init: str) -> None:
    """Raise ``ValueError`` if an initialiser would not be right for one of the layers, naming it and the reason."""
    places = _places(root)
    shared = _shared_modules(model)
    for name, target in targets.items():
        _check_weight(owner, name, target)
        passed_by = why_passed_by(target.layer, model.get_submodule(name.rpartition(".")[0]))
        if passed_by is not None:
            raise ValueError(f"{owner}: layer {name!r} {passed_by}")
        if id(target.layer) in shared:
            raise ValueError(
                f"{owner}: layer {name!r} is the same module as {' and '.join(shared[id(target.layer)])}: an adapter "
                "would come to one of the places only. Give each place a layer of its own, or leave it out "
                "(exclude_modules)."
            )
        if init in _NEEDS_MATRIX:
            _check_matrix(owner, name, target, init)
        _check_rank(owner, name, target, init)
        if init in SHIFTING_INITS:
            _check_shift(owner, name, target, init, places)


def is_transposed(layer: nn.Module) -> bool:
    """Tell whether a base layer holds its weight as (in, out): transformers' ``Conv1D``."""
    return type(layer).__name__ == "Conv1D" and not isinstance(layer, nn.Conv1d)


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost adapted layers by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    within: list[str] = []
    for name, part in model.named_modules():
        if isinstance(part, BaseTunerLayer) and not any(name.startswith(outer) for outer in within):
            within.append(f"{name}.")
            yield name, part


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out the warnings of peft about what it puts right by itself or what is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def _stand_in(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Copy the structure of a module: submodules are copies too, all else is shared."""
    if id(module) in made:
        return made[id(module)]
    copied = type(module).__new__(type(module))
    made[id(module)] = copied
    vars(copied).update(vars(module))
    for name in ("_parameters", "_buffers"):
        vars(copied)[name] = copy.copy(vars(module)[name])
    vars(copied)["_modules"] = {
        name: None if child is None else _stand_in(child, made) for name, child in vars(module)["_modules"].items()
    }
    return copied


def _refuse_lazy(owner: str, model: nn.Module) -> None:
    """Refuse parameters without a shape, which peft could not even freeze."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(  # noqa: TRY004  a model that does not fit, not a wrong type
                f"{owner}: {name!r} gets its shape from the first batch. Run one batch through the model before "
                "it gets adapters."
            )


def _target(layer: Any, original: nn.Module) -> Target:
    dropout = max((float(getattr(part, "p", 0.0)) for part in getattr(layer, "lora_dropout", {}).values()), default=0.0)
    rank = _first_number(layer, "r")
    return Target(
        original,
        None if rank is None else int(rank),
        _first_number(layer, "lora_alpha") or 0.0,
        _first_number(layer, "scaling") or 0.0,
        dropout,
        hasattr(layer, "lora_A"),
    )


def _first_number(layer: Any, name: str) -> float | None:
    """Return what an adapted layer keeps for its one adapter under a name."""
    held = getattr(layer, name, None)
    value = next(iter(held.values()), None) if isinstance(held, dict) else None
    return value if isinstance(value, (int, float)) else None


def _check_weight(owner: str, name: str, target: Target) -> None:
    """Refuse weights that have no values here, or only a part of them."""
    for weight in target.layer.parameters(recurse=False):
        if weight.device.type == "meta":
            why = "is on the meta device and has no values. Load the weights before adapters are made"
        elif type(weight.data).__name__ == "DTensor" or hasattr(weight, "_is_flat_param"):
            why = "is sharded over processes. Use a strategy that keeps whole weights, such as 'ddp'"
        else:
            continue
        raise ValueError(f"{owner}: layer {name!r} {why}.")


def _check_matrix(owner: str, name: str, target: Target, init: str) -> None:
    layer, rank = target.layer, target.rank
    if not (isinstance(layer, nn.Linear) or is_transposed(layer)):
        raise ValueError(
            f"{owner}: init={init!r} is made for Linear and Conv1D, and layer {name!r} is a {type(layer).__name__}. "
            "Leave it out of target_modules, or take init='default'."
        )
    if init == "orthogonal" and rank is not None and rank % 2:
        raise ValueError(
            f"{owner}: layer {name!r} has a rank of r={rank}; init='orthogonal' splits it in two. Choose an even r."
        )


def _fits(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error:
        return True  # for peft to refuse


def _check_rank(owner: str, name: str, target: Target, init: str) -> None:
    """Refuse more directions than the weight has."""
    weight, rank = getattr(target.layer, "weight", None), target.rank
    if rank is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        return
    if not (target.low_rank or init in _NEEDS_MATRIX) or hasattr(weight, "quant_state"):
        return
    room, needed = min(weight.shape), 2 * rank if init == "lora_ga" else rank
    if needed > room:
        why = "takes two singular vectors a rank, which" if init == "lora_ga" else "with this rank"
        raise ValueError(
            f"{owner}: layer {name!r} has a rank of r={rank}; init={init!r} {why} needs a side of {needed}, and the "
            f"smaller side of the weight is {room}. Choose r up to {room * rank // needed} for it (rank_pattern), or "
            "leave it out."
        )


def _check_shift(owner: str, name: str, target: Target, init: str, places: dict[int, list[str]]) -> None:
    weight = cast(Tensor, target.layer.weight)
    plain = type(weight.data) is Tensor and type(weight) is nn.Parameter and not hasattr(weight, "quant_state")
    if not plain or not weight.is_floating_point() or hasattr(target.layer, "quant_state"):
        raise ValueError(
            f"{owner}: init={init!r} changes the weight of layer {name!r}, which is quantized or no plain tensor "
            f"({type(weight).__name__}, {weight.dtype}). Start from the model in floating point, or take init='eva' or "
            "'default'."
        )
    names = places[weight.untyped_storage().data_ptr()]
    if len(names) > 1:
        raise ValueError(
            f"{owner}: init={init!r} changes the weight of layer {name!r}, which is tied: {' and '.join(names)} are "
            "one tensor, and all of them would change. Leave the layer out (exclude_modules), untie it, or take an "
            "init that keeps the base, such as 'eva' or 'default'."
        )


def _places(root: nn.Module) -> dict[int, list[str]]:
    """Return under which names each storage of parameters and buffers is found."""
    found: dict[int, list[str]] = {}
    tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        if type(tensor.data) is Tensor and not isinstance(tensor, UninitializedParameter) and tensor.numel():
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return found


def _shared_modules(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        found.setdefault(id(part), []).append(repr(name))
    return {key: names for key, names in found.items() if len(names) > 1}


def _listed(model: nn.Module) -> str:
    """List the layers that have weights, the last parts of their names where they repeat."""
    ends = dict.fromkeys(
        (name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name, type(part).__name__)
        for name, part in model.named_modules()
        if name and any(True for _ in part.parameters(recurse=False))
    )
    return ", ".join(f"{end} ({kind})" for end, kind in list(ends)[:40]) or "none"
