"""Put adapters into a module by peft, freeze the rest, and take them out again."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_stable.peft._quantized import plain_base
from lightning_stable.peft._record import find_record, forget
from lightning_stable.peft._targets import is_transposed, quiet_peft, tuner_layers

__all__ = [
    "ADAPTER",
    "adapter_names",
    "base_matrix",
    "frozen_names",
    "inject",
    "layer_seed",
    "let_inputs_need_gradients",
    "matching",
    "merge",
    "set_base",
    "take_out",
    "trained_names",
]

ADAPTER = "default"
"""The name of the adapter, which is part of its parameters' names."""


def layer_seed(seed: int, name: str) -> int:
    """Return the seed of one layer's start, which does not hang on the other layers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")


def matching(owner: str, module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters whose names match one of the patterns.

    Raises:
        ValueError: If a pattern matches none.
    """
    found: dict[int, nn.Parameter] = {}
    for pattern in patterns:
        hits = [p for name, p in module.named_parameters(remove_duplicate=False) if fnmatchcase(name, pattern)]
        if not hits:
            ends = list(dict.fromkeys(name.partition(".")[0] for name, _ in module.named_parameters()))
            raise ValueError(
                f"{owner}: trainable has {pattern!r}, which matches no parameter of {type(module).__name__}. Names "
                f"begin with {', '.join(ends)}; a pattern is such as '{ends[-1] if ends else 'head'}.*'."
            )
        found |= {id(parameter): parameter for parameter in hits}
    return list(found.values())


def inject(
    root: nn.Module, model: nn.Module, config: Any, *, trainable: Sequence[nn.Parameter], seed: int, upcast: bool
) -> dict[str, Any]:
    """Put adapters into ``model`` in place, and freeze everything of ``root`` beside them.

    Random numbers come from ``seed`` and leave the global generators alone.

    Args:
        root: The outermost module.
        model: The part of it that gets adapters.
        config: The PEFT config; completed in place.
        trainable: Parameters that train beside the adapters.
        seed: Seed of what peft draws.
        upcast: Keep adapters in float32 where the base is in half precision, as ``peft.get_peft_model`` does.

    Returns:
        The adapted layers by name within ``model``.
    """
    import peft

    with isolate_rng(), quiet_peft():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    layers = dict(tuner_layers(model))
    within = {id(parameter) for parameter in model.parameters()}
    for parameter in root.parameters():
        if id(parameter) not in within:
            parameter.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    for layer in layers.values() if upcast else ():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer.") and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    return layers


def let_inputs_need_gradients(model: nn.Module) -> None:
    """Let gradients reach layers within checkpointed segments of a transformers model whose embeddings are frozen."""
    checkpointed = any(getattr(part, "gradient_checkpointing", False) is True for part in model.modules())
    if checkpointed and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]  # of transformers


def adapter_names(root: nn.Module) -> set[str]:
    """Return the names in the state dict of tensors that belong to adapters, frozen ones too."""
    found: set[str] = set()
    for path, layer in tuner_layers(root):
        start = f"{path}." if path else ""
        names = layer.state_dict().keys()
        found |= {f"{start}{name}" for name in names if not name.startswith("base_layer.")}
    return found


def trained_names(root: nn.Module, also: Sequence[str] = ()) -> list[str]:
    """Return the names of parameters that train, with their aliases, and of those named in ``also``."""
    named = list(root.named_parameters(remove_duplicate=False))
    known = set(also)
    return [name for name, parameter in named if parameter.requires_grad or name in known]


def frozen_names(root: nn.Module, trained: Sequence[str]) -> set[str]:
    """Return the names of parameters that an untouched base gives back: neither trained nor an adapter's."""
    every = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    return every - set(trained) - adapter_names(root)


def base_matrix(layer: Any) -> Tensor:
    """Return the weight of an adapted or plain layer as (out, in), without a copy."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight: Tensor = base.weight.detach()
    return weight.T if is_transposed(base) else weight


@torch.no_grad()
def set_base(layer: Any, matrix: Tensor) -> None:
    """Write (out, in) into the base weight of an adapted layer, in place."""
    base_matrix(layer).copy_(matrix)


def merge(owner: str, module: nn.Module) -> None:
    """Add the adapters to the base weights and give the module its plain layers back, in place.

    Raises:
        ValueError: If the module has no adapters, or the weight of an adapted layer is tied to another.
    """
    found = find_record(module)
    if found is None:
        raise ValueError(f"{owner}: {type(module).__name__} has no adapters that Adapters made, so none to merge.")
    path, model, record = found
    start = f"{path}." if path else ""
    _refuse_tied(owner, module, model)
    for name, layer in list(tuner_layers(model)):
        parent_path, _, child = name.rpartition(".")
        plain_base(layer)
        layer.merge(safe_merge=True)
        setattr(model.get_submodule(parent_path), child, layer.get_base_layer())
    _unwrap_saved(model)
    if "peft_config" in vars(model):
        del vars(model)["peft_config"]
    forget(model)
    flags = record.flags
    for name, parameter in module.named_parameters(remove_duplicate=False):
        # Where it was adapted without a run, only the names within the model are known.
        flag = flags.get(name, flags.get(name.removeprefix(start)))
        if flag is not None:
            parameter.requires_grad_(flag)


def take_out(root: nn.Module, model: nn.Module, flags: dict[str, bool]) -> None:
    """Undo an injection whose start failed, in place: plain layers back, and ``requires_grad`` as before.

    Args:
        root: The outermost module.
        model: The part of it that has adapters, or some of them.
        flags: ``requires_grad`` of the untouched parameters, by the names that ``root`` gives them.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, layer in list(tuner_layers(model)):
        parent_path, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_path), child, layer.get_base_layer())
    for name, part in list(model.named_modules()):
        if isinstance(part, ModulesToSaveWrapper):
            parent_path, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_path), child, part.original_module)
    vars(model).pop("peft_config", None)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if name in flags:
            parameter.requires_grad_(flags[name])


def _refuse_tied(owner: str, module: nn.Module, model: nn.Module) -> None:
    # By their memory: peft makes the parameters of a MultiheadAttention anew whenever they are listed.
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    for name, layer in tuner_layers(model):
        for parameter in layer.get_base_layer().parameters(recurse=False):
            tied = names.get(parameter.data_ptr(), [])
            if len(tied) > 1:
                raise ValueError(
                    f"{owner}: the weight of adapted layer {name!r} is tied ({' and '.join(tied)} are "
                    "one tensor): merging the adapter would change all of them. Keep the adapter, or untie the weight."
                )


def _unwrap_saved(model: nn.Module) -> None:
    """Put the trained copies of ``modules_to_save`` in the places of the originals."""
    from peft.utils import ModulesToSaveWrapper

    for name, part in list(model.named_modules()):
        if isinstance(part, ModulesToSaveWrapper):
            parent_path, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_path), child, part.modules_to_save[ADAPTER])
