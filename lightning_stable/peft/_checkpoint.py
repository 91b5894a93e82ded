"""Checkpoints of adapted modules: what is kept of the weights, and how a pristine base is made the trained module."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_stable.peft._beside import check_beside, marks_of
from lightning_stable.peft._config import config_differences, plain_config, rebuild_config
from lightning_stable.peft._initialise import apply_shift, hold_bases
from lightning_stable.peft._inject import (
    adapter_names,
    frozen_names,
    inject,
    let_inputs_need_gradients,
    matching,
    trained_names,
)
from lightning_stable.peft._quantized import check_quantizable
from lightning_stable.peft._record import KEY, Record, dtype_of, find_record, fingerprint, keep
from lightning_stable.peft._targets import Target, find_targets

__all__ = [
    "check_optimizers",
    "complete",
    "differences",
    "fingerprints",
    "reduce_checkpoint",
    "restore",
    "stored_record",
    "take_base",
]


def stored_record(owner: str, checkpoint: Mapping[str, Any]) -> Record | None:
    """Return the record of the adapters in a checkpoint, ``None`` if it has none."""
    stored = checkpoint.get(KEY)
    return None if stored is None else Record.from_checkpoint(owner, stored)


def reduce_checkpoint(module: nn.Module, checkpoint: dict[str, Any], save: str, optimized: Sequence[Tensor]) -> None:
    """Write the record into a checkpoint, and with ``save="adapter"`` leave out what an untouched base gives back.

    Doing it again changes nothing more. A module without adapters is left as it is.

    Args:
        module: The outermost module.
        checkpoint: The checkpoint of it, changed in place.
        save: ``"adapter"`` or ``"full"``.
        optimized: Parameters in an optimizer, which may have trained though they do not at present.
    """
    found = find_record(module)
    if found is None:
        return
    path, _, record = found
    # Some optimizers are given frozen parameters too; integers never train.
    held = {id(parameter) for parameter in optimized if parameter.is_floating_point()}
    named = module.named_parameters(remove_duplicate=False)
    record.trained = trained_names(module, [*record.trained, *(name for name, each in named if id(each) in held)])
    checkpoint[KEY] = record.to_checkpoint(path, save)
    dropped = frozen_names(module, record.trained)
    checkpoint[KEY]["rest"] = marks_of(record.rest, dropped, path)
    if save == "adapter":
        weights = checkpoint["state_dict"]
        for name in [name for name in weights if name in dropped]:
            del weights[name]


def complete(module: nn.Module, checkpoint: dict[str, Any], record: Record) -> None:
    """Add to a checkpoint's weights those of the module that an untouched base gives, so that loading stays strict."""
    weights = checkpoint["state_dict"]
    present = dict(module.named_parameters(remove_duplicate=False))
    for name in frozen_names(module, record.trained):
        weights.setdefault(name, present[name].detach())


def take_base(present: Record, stored: Record, *, full: bool) -> None:
    """Note in the record of an adapted module what a checkpoint that it loads stands on."""
    present.shift = stored.shift
    if full:
        # The base comes from the checkpoint, too.
        present.base, present.rest, present.config = stored.base, stored.rest, stored.config
        present.held = stored.held


def check_optimizers(owner: str, module: nn.Module, optimizers: Sequence[Any]) -> None:
    """Look whether the optimizers hold the adapters' parameters that train; some that are missing are a warning.

    Raises:
        ValueError: If they hold none.
    """
    held = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
    names = adapter_names(module)
    train = {name: each for name, each in module.named_parameters() if each.requires_grad and name in names}
    missing = [name for name, each in train.items() if id(each) not in held]
    if not held or not missing:  # the host's stand-in for no optimizer holds nothing, and the host says so
        return
    if len(missing) == len(train):
        raise ValueError(
            f"{owner}: no optimizer holds a parameter of the adapters, so they would not train. Build the optimizer in "
            "configure_optimizers, which runs once they are there, from [p for p in self.parameters() if "
            "p.requires_grad]."
        )
    rank_zero_warn(
        f"{owner}: {len(missing)} of {len(train)} parameters of the adapters are in no optimizer and do not train: "
        f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}."
    )


def fingerprints(targets: Mapping[str, Target]) -> dict[str, str]:
    """Return the fingerprint of the weight of each layer that has one."""
    weights = {name: getattr(target.layer, "weight", None) for name, target in targets.items()}
    return {name: fingerprint(weight) for name, weight in weights.items() if isinstance(weight, Tensor)}


def restore(
    owner: str,
    root: nn.Module,
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    record: Record,
    *,
    trainable: Sequence[str] | None,
    upcast: bool,
    prefix: str = "",
) -> Record:
    """Adapt an untouched module as a checkpoint says: same layers, same ranks, base shifted by the same factors.

    The weights of the checkpoint are not loaded here.

    Args:
        owner: What is named in messages.
        root: The outermost module.
        model: The part of it to adapt.
        checkpoint: The checkpoint.
        record: What it says of the adapters.
        trainable: Patterns of parameters that train beside the adapters; ``None``: as the checkpoint has it.
        upcast: Keep adapters in float32 where the base is in half precision.
        prefix: What the checkpoint's names begin with and those of ``root`` do not.

    Returns:
        The record that is now kept on ``model``.

    Raises:
        ValueError: If the layers are others, or the base is not the one that was adapted; nothing is changed then.
    """
    config = rebuild_config(owner, record.config)
    targets = find_targets(owner, model, config)
    full = checkpoint[KEY]["save"] == "full"
    _check_base(owner, targets, record, full)
    marks = record.rest if full else check_beside(owner, root, targets, record, prefix)
    kept = [] if trainable is None else matching(owner, root, trainable)
    if record.residual:
        check_quantizable(owner, record.residual, targets, config, kept)
    let_inputs_need_gradients(model)
    flags = {name: each.requires_grad for name, each in root.named_parameters(remove_duplicate=False)}
    layers = inject(root, model, config, trainable=kept, seed=0, upcast=upcast)
    if not full:
        for name, factors in record.shift.items():
            apply_shift(layers[name], factors["a"], factors["b"], dtype_of(record.base[name]))
    held = _hold_again(owner, layers, record, full) if record.residual else {}
    trained = [name.removeprefix(prefix) for name in record.trained if name.startswith(prefix)]
    if trainable is None:
        for name, parameter in root.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in trained)
    _take_dtypes(root, checkpoint["state_dict"], targets, record, prefix)
    present = {"trained": trained_names(root, trained), "flags": flags, "rest": marks, "held": held}
    restored = Record(**{**vars(record), **present})
    keep(model, restored)
    return restored


def differences(record: Record, path: str, present: Record, present_path: str, where: str) -> list[str]:
    """Say in what adapters differ from those that are asked for, one phrase each; ``where`` says where they are."""
    first = [
        {
            "model": each_path,
            "init": each.init,
            "peft_type": each.asked.get("peft_type"),
            "quantize_residual": each.residual or None,
        }
        for each, each_path in ((record, path), (present, present_path))
    ]
    found = config_differences(first[0], first[1], where)
    if all(first[0][name] == first[1][name] for name in ("init", "peft_type")):
        # Adapters of two kinds differ in all else, too.
        found += config_differences(_compared(record.asked), _compared(present.asked), where)
    trainable = [{"trainable": sorted(each.trainable)} for each in (record, present)]
    return found + config_differences(trainable[0], trainable[1], where)


def _hold_again(owner: str, layers: dict[str, Any], record: Record, full: bool) -> dict[str, str]:
    """Hold the bases in 4 bits again, say so if what comes out is not what training had, and return what tells it."""
    marks, _ = hold_bases(layers, record.residual)
    other = sorted(name for name, mark in record.held.items() if marks.get(name) != mark)
    if other and not full:
        rank_zero_warn(
            f"{owner}: {len(other)} of {len(marks)} bases have other codes in {record.residual} than in training, such "
            f"as that of {other[0]!r}. Another version of bitsandbytes or another kind of device rounds some weights "
            "the other way, so outputs differ a little. Save checkpoints that hold all weights with save='full' to "
            "keep the codes."
        )
    return record.held if full else marks


def _compared(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with each field that this version of peft has, so that versions can be compared."""
    return plain_config(rebuild_config("Adapters", asked))


def _check_base(owner: str, targets: Mapping[str, Target], record: Record, full: bool) -> None:
    """Raise ``ValueError`` unless the untouched weights are those that were adapted."""
    missing, further = sorted(record.base.keys() - targets.keys()), sorted(targets.keys() - record.base.keys())
    if missing or (further and any(hasattr(targets[name].layer, "weight") for name in further)):
        raise ValueError(
            f"{owner}: the checkpoint's adapters are of other layers: "
            f"{f'{missing[0]!r} is not here' if missing else f'{further[0]!r} had none'}. Build the module with the "
            "same model that was trained."
        )
    for name, mark in record.base.items() if not full else ():
        weight = cast(Tensor, targets[name].layer.weight)
        dtype = dtype_of(mark)
        as_then = weight if dtype is None or not weight.is_floating_point() else weight.detach().to(dtype)
        if fingerprint(as_then) != mark:
            told = "x".join(map(str, weight.shape))
            raise ValueError(
                f"{owner}: the weight of layer {name!r} ({weight.dtype}, {told}) is not the one that the checkpoint's "
                f"adapters were made for ({mark.split('|')[0]}, {mark.split('|')[1]}), which it does not hold itself: "
                "another base model, another seed of a random one, a base that has been trained or merged since, or a "
                "precision that has lost digits. Load the same base first; or save checkpoints that hold all weights "
                "with save='full'."
            )


def _take_dtypes(
    root: nn.Module, weights: Mapping[str, Tensor], targets: Mapping[str, Target], record: Record, prefix: str
) -> None:
    """Give adapters the precision that the checkpoint has them in, where the base is in that of the run, too."""
    same = all(
        getattr(target.layer, "weight").dtype == dtype_of(record.base[name])  # noqa: B009  not every layer has one
        for name, target in targets.items()
        if name in record.base
    )
    named = dict(root.named_parameters(remove_duplicate=False))
    for name in adapter_names(root) if same else ():
        stored, parameter = weights.get(prefix + name), named.get(name)
        if stored is not None and parameter is not None and stored.dtype != parameter.dtype:
            with torch.no_grad():
                parameter.data = parameter.data.to(stored.dtype)
