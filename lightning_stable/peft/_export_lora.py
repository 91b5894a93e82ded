"""Adapters as plain LoRA on the base as it was before training, and as a folder that PEFT loads."""

import dataclasses
import importlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stable.functional._diagonal import diagonal_step
from lightning_stable.peft._config import OWN_TUNERS, plain_config
from lightning_stable.peft._export_read import Trained

__all__ = ["Parts", "factors", "native", "plain_lora", "write_folder"]

Parts = dict[str, dict[str, Tensor]]
"""The tensors of each layer's adapter, by layer and by name within it, as in ``"lora_A.weight"``."""

_DOWN, _UP = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")
# What only says how the first factors were found: a loader that reads it may look for them anew.
_FOUND_BY = ("eva_config", "corda_config", "lora_ga_config")
# What the config of LoRA has in common with that of another tuner.
_SHARED = (
    *("task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    "inference_mode",
)


def factors(parts: dict[str, Tensor]) -> tuple[str, str]:
    """Return the names of a layer's A and B, those of a linear layer or of an embedding.

    Raises:
        ValueError: If there are none.
    """
    down = next((name for name in _DOWN if name in parts), None)
    up = next((name for name in _UP if name in parts), None)
    if down is None or up is None:
        raise ValueError(f"An adapter of the checkpoint has no A and B, only {', '.join(sorted(parts))}.")
    return down, up


def plain_lora(trained: Trained, *, joined: bool = True) -> tuple[Parts, dict[str, Any]]:
    r"""Return the adapters as LoRA on the base as it was before training, and the config of it.

    Where the base was shifted by the first factors, :math:`W_{res} = W - s B_0 A_0`, the same function on the untouched
    base has rank :math:`2r`: :math:`W_{res} + s B A = W + s [B, -B_0] [A; A_0]`. The scaling :math:`s` of each layer
    stays, so alpha grows by 2, or by the root of 2 under rslora, also where a layer has a rank of its own. LoLDU and
    SVFit become LoRA of their own rank.

    Args:
        trained: The adapters.
        joined: Whether to put the first factors of a shifted base beside the trained ones.

    Raises:
        ValueError: If a layer lacks a factor, as where frozen ones were not saved.
    """
    record = trained.record
    if trained.kind != "LORA":
        parts = {layer: _diagonal_as_lora(trained, layer) for layer in trained.layers}
        config = {name: record.config.get(name) for name in _SHARED} | {"peft_type": "LORA", "init_lora_weights": True}
        return parts, config | _ranks(parts, dict.fromkeys(parts, 1.0), rslora=False)
    config = {**record.config, **dict.fromkeys(_FOUND_BY), "loftq_config": {}, "init_lora_weights": True}
    parts = trained.layers
    if joined and record.shift:
        parts = {layer: _joined(found, record.shift.get(layer)) for layer, found in parts.items()}
    return parts, config | _patterns(trained, parts)


def _diagonal_as_lora(trained: Trained, layer: str) -> dict[str, Tensor]:
    """Return an adapter of LoLDU or SVFit as factors of LoRA at a scaling of 1."""
    begin = f"{trained.kind.lower()}_"
    parts = {name.removeprefix(begin): tensor for name, tensor in trained.layers[layer].items()}
    if "left" not in parts:
        raise ValueError(
            f"{trained.path} lacks the frozen factors of {layer!r}: it was trained with save_factors=False. Export "
            "with --as native, load that folder onto the base by PeftModel.from_pretrained, and convert the model by "
            "peft.save_as_lora."
        )
    scaling = trained.record.scaling.get(layer, 1.0)
    step = diagonal_step(
        parts["vector"], parts["start"], parts.get("scale", scaling), parts.get("scale_start", scaling)
    )
    return {"lora_A.weight": parts["right"], "lora_B.weight": parts["left"] * step}


def _joined(parts: dict[str, Tensor], first: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Put the first factors beside the trained ones."""
    if first is None:
        return parts
    down, up = factors(parts)
    dtype = torch.promote_types(parts[down].dtype, first["a"].dtype)
    return {
        **parts,
        down: torch.cat([parts[down].to(dtype), first["a"].to(dtype)]),
        up: torch.cat([parts[up].to(dtype), -first["b"].to(dtype)], dim=1),
    }


def _patterns(trained: Trained, parts: Parts) -> dict[str, Any]:
    """Return the fields of a config that name layers by the end of their names, with whole names instead.

    PEFT takes the first key that fits, and writes them in the order of the alphabet.
    """
    config = trained.record.config
    if config.get("target_parameters"):  # their keys are of parameters, and their factors stacked
        return {}
    if trained.kind == "LORA":
        known = {layer: found for layer, found in parts.items() if layer in trained.record.scaling}
        return _ranks(known, trained.record.scaling, rslora=bool(config.get("use_rslora"))) if known else {}
    rank = {layer: found[f"{trained.kind.lower()}_vector"].numel() for layer, found in parts.items()}
    return {"rank_pattern": {f"^{layer}": r for layer, r in rank.items() if r != config["r"]}}


def _ranks(parts: Parts, scaling: dict[str, float], rslora: bool) -> dict[str, Any]:
    """Return the fields of a config that give each layer the rank of its tensors and its scaling."""
    rank = {layer: len(found[factors(found)[0]]) for layer, found in parts.items()}
    alpha = {layer: _whole(scaling[layer] * (math.sqrt(r) if rslora else r)) for layer, r in rank.items()}
    (common_rank, _), *_ = Counter(rank.values()).most_common(1)
    (common_alpha, _), *_ = Counter(alpha.values()).most_common(1)
    # PEFT reads a key as the end of a layer's name: the ^ makes it the whole.
    return {
        "r": common_rank,
        "lora_alpha": common_alpha,
        "rank_pattern": {f"^{layer}": r for layer, r in rank.items() if r != common_rank},
        "alpha_pattern": {f"^{layer}": a for layer, a in alpha.items() if a != common_alpha},
    }


def _whole(alpha: float) -> float:
    """Return ``alpha`` as a whole number if it is one but for rounding."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def native(trained: Trained) -> tuple[Parts, dict[str, Any]]:
    """Return the adapters as they are, and their own config.

    On a shifted base the config does not say how the first factors were found: PEFT would shift the base once more.
    """
    if trained.record.shift:
        return plain_lora(trained, joined=False)
    return trained.layers, trained.record.config | _patterns(trained, trained.layers)


def write_folder(folder: Path, trained: Trained, parts: Parts, config: dict[str, Any], base: str | None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT's ``save_pretrained`` does.

    Args:
        folder: Where to, an empty folder.
        trained: What was trained; its ``modules_to_save`` and biases go into the folder too.
        parts: The adapters.
        config: The fields of the PEFT config.
        base: What the config names as the base, unless it names one already.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from safetensors.torch import save_file

    tensors = {
        f"{layer}.{_file_name(name)}": tensor for layer, found in parts.items() for name, tensor in found.items()
    }
    tensors |= trained.modules | trained.tokens | _biases(trained)
    contiguous = {f"base_model.model.{name}": tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    if config["peft_type"] in OWN_TUNERS.values():
        importlib.import_module(f"lightning_stable.peft.{config['peft_type'].lower()}")  # registers itself with peft
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])}
    fields = {name: value for name, value in config.items() if name in known - {"peft_version", "runtime_config"}}
    if fields.get("target_modules") in (None, "all-linear") and not fields.get("target_parameters"):
        fields["target_modules"] = sorted(parts)
    built = PeftConfig.from_peft_type(**{**fields, "inference_mode": True})  # checks them, and completes them
    written = {**plain_config(built), "peft_version": built.peft_version}
    written["base_model_name_or_path"] = fields.get("base_model_name_or_path") or base
    # The order within a pattern is kept: PEFT takes the first key that fits.
    text = json.dumps(dict(sorted(written.items())), indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _file_name(name: str) -> str:
    """Return the name that PEFT's files have for a tensor of an adapter."""
    return name.removesuffix(".weight") if name.startswith("lora_magnitude_vector") else name


def _biases(trained: Trained) -> dict[str, Tensor]:
    """Return the trained biases of the base that belong to the adapters, where the config has such."""
    if trained.record.config.get("bias", "none") == "none":
        return {}
    return {name: trained.base[name] for name in trained.trained if name.endswith(".bias")}
