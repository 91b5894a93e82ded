"""Folders of whole models: the base with the adapters in its weights, or as the adapters of a shifted base need it."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_stable.peft._export_base import (
    Change,
    check_base,
    name_in_base,
    name_in_model,
    open_base,
    tied_heads,
    write_base,
)
from lightning_stable.peft._export_lora import Parts, plain_lora
from lightning_stable.peft._export_names import not_in_folder
from lightning_stable.peft._export_read import Trained
from lightning_stable.peft._export_weight import is_transposed, merged_weight, refuse_variants, shifted_weight
from lightning_stable.peft._quantized import Held, hold, mark_of, values
from lightning_stable.peft._record import dtype_of

__all__ = ["BaseOfTraining", "write_complete"]


class BaseOfTraining:
    """The folder of the model that adapters were trained on.

    Args:
        trained: The adapters.
        folder: The model, as ``save_pretrained`` writes it.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks a file.
        ValueError: If it is not the base that training started from.
    """

    def __init__(self, trained: Trained, folder: Path) -> None:
        self.trained = trained
        self.base = open_base(folder)
        self.heads = tied_heads(self.base)
        self.rename = name_in_base(trained.layers, self.base, self.heads)
        marks = trained.record.base
        known = {self._source(f"{layer}.weight"): marks[layer] for layer in trained.layers if layer in marks}
        self.unchecked = check_base(self.base, known)
        self.rename_in_model = name_in_model(self.rename, self.base)
        self.other_codes: set[str] = set()

    def write_merged(self, out: Path) -> list[str]:
        """Write the model with the adapters in its weights; return notes for the reader."""
        refuse_variants(self.trained.record.config)
        parts, _ = plain_lora(self.trained, joined=False)
        adapted: dict[str, Change] = {f"{layer}.weight": change for layer, change in self._merges(parts).items()}
        adapted |= {name: _instead(tensor) for name, tensor in self.trained.modules.items()}
        if odd := [name for name in self.trained.modules if self._source(name) not in self.base.files]:
            raise ValueError(f"{self.base.folder} has no {odd[0]}, which modules_to_save trained a copy of.")
        others = _others(self.trained)
        unplaced = sorted(name for name in others if self._source(name) not in self.base.files)
        changes = {self.rename(name): _instead(tensor) for name, tensor in others.items() if name not in unplaced}
        changes |= {self.rename(name): change for name, change in adapted.items()}
        apart = {self.rename(name) for name in adapted} & {name for pair in self.heads.items() for name in pair}
        present = {name: change for name, change in changes.items() if name in self.base.files}
        write_base(self.base, out, present, self._added(changes, apart), untie=bool(apart))
        lost = [name for name in unplaced if name in {_bare(name) for name in self.trained.trained}]
        return [*self._rounding(), *_left_out(self.trained, lost)]

    def write_shifted(self, out: Path) -> list[str]:
        """Write the base as training had it, without the product of the first factors; return notes."""
        record = self.trained.record
        turned = self._transposed(self.trained.layers)

        def change_of(layer: str) -> Change:
            return lambda weight: self._shifted(layer, self._as_trained(layer, weight), turned[layer])

        write_base(self.base, out, {self.rename(f"{layer}.weight"): change_of(layer) for layer in record.shift})
        return self._rounding()

    def _merges(self, parts: Parts) -> dict[str, Change]:
        """Return what becomes of the weight of each layer."""
        record = self.trained.record
        turned = self._transposed(parts)

        def change_of(layer: str) -> Change:
            def change(before: Tensor) -> Tensor:
                weight, scaling = self._as_trained(layer, before), _scaling(self.trained, layer)
                if (name := f"{layer}.base_layer.weight") in self.trained.trained:
                    weight = self.trained.base[name]  # shifted already, where it was shifted
                elif layer in record.shift:  # with its rounding, which the adapter was trained on
                    weight = self._shifted(layer, weight, turned[layer])
                return merged_weight(weight, parts[layer], scaling, transposed=turned[layer])

            return change

        return {layer: change_of(layer) for layer in parts}

    def _shifted(self, layer: str, weight: Tensor, transposed: bool) -> Tensor:
        """Return the base of a layer as training had it, with what quantizing took from it."""
        record = self.trained.record
        shifted = shifted_weight(weight, record.shift[layer], record.scaling[layer], transposed=transposed)
        if not record.residual:
            return shifted
        held = hold(shifted, record.residual)
        if mark_of(held, record.residual) != record.held.get(layer):
            self.other_codes.add(layer)
        return values(held, record.residual, shifted.shape, shifted.dtype)

    def _transposed(self, parts: Parts) -> dict[str, bool]:
        shapes = {layer: tuple(self.base.read(self._source(f"{layer}.weight")).shape) for layer in parts}
        return _transposed(self.trained, parts, shapes, str(self.base.config.get("model_type")))

    def _as_trained(self, layer: str, weight: Tensor) -> Tensor:
        return weight.to(dtype_of(self.trained.record.base.get(layer, "")) or weight.dtype)

    def _source(self, name: str) -> str:
        """Return the name in the folder under which a tensor of the adapted module is found."""
        found = self.rename(name)
        return found if found in self.base.files else self.heads.get(found, found)

    def _added(self, changes: dict[str, Change], apart: set[str]) -> dict[str, Tensor]:
        """Return tensors that the files do not have, and that are no longer those of another.

        Args:
            changes: By the name in the model.
            apart: Which tied ones were adapted by themselves.
        """
        added = {}
        for head, source in self.heads.items():
            if head not in self.base.files and {head, source} & apart:
                before = self.base.read(source)
                # One that is not adapted may have trained with the other's weight.
                added[head] = changes[head](before).to(before.dtype) if head in changes else before.clone()
        return added

    def _rounding(self) -> list[str]:
        """Say so where weights are rounded otherwise than in training."""
        return [*self._precision(), *self._codes()]

    def _codes(self) -> list[str]:
        if not self.other_codes:
            return []
        return [
            f"{len(self.other_codes)} bases have other codes in {self.trained.record.residual} than in training, such "
            f"as that of {min(self.other_codes)}: another version of bitsandbytes or another kind of device rounds "
            "some weights the other way. Outputs differ a little."
        ]

    def _precision(self) -> list[str]:
        if self.unchecked:
            return [
                f"Training had {len(self.unchecked)} of these weights quantized. So whether {self.base.folder} is its "
                "base was not checked, and outputs differ by that rounding."
            ]
        for layer in self.trained.layers:
            here = self.base.read(self._source(f"{layer}.weight")).dtype
            there = dtype_of(self.trained.record.base.get(layer, ""))
            if there is not None and here.itemsize < there.itemsize:
                names = [str(dtype).removeprefix("torch.") for dtype in (here, there)]
                return [
                    f"{self.base.folder} is in {names[0]} and training was in {names[1]}: weights are rounded to "
                    f"{names[0]}. For all of their precision load the base in {names[1]}, write it by save_pretrained, "
                    "and give that folder."
                ]
        return []


def write_complete(trained: Trained, out: Path) -> list[str]:
    """Write the weights of a model that is in the checkpoint as a whole, its adapters merged; return notes."""
    from huggingface_hub import save_torch_state_dict

    refuse_variants(trained.record.config)
    tensors = _others(trained) | {f"{layer}.weight": _saved_base(trained, layer) for layer in trained.layers}
    parts, _ = plain_lora(trained, joined=False)
    shapes = {layer: tuple(tensors[f"{layer}.weight"].shape) for layer in parts}
    turned = _transposed(trained, parts, shapes, "")
    for layer, found in parts.items():
        weight = tensors[f"{layer}.weight"]  # shifted already, where it was shifted
        merged = merged_weight(weight, found, _scaling(trained, layer), transposed=turned[layer])
        tensors[f"{layer}.weight"] = merged.contiguous()
    save_torch_state_dict(tensors | trained.modules, out)
    return [
        "There are weights only. Put config.json and the tokenizer's files of the base beside them, or give its folder "
        "by --base.",
        *_left_out(trained, []),
    ]


def _transposed(trained: Trained, parts: Parts, shapes: dict[str, tuple[int, ...]], model_type: str) -> dict[str, bool]:
    return is_transposed(shapes, parts, model_type, bool(trained.record.config.get("fan_in_fan_out")))


def _saved_base(trained: Trained, layer: str) -> Tensor:
    """Return the base of a layer as a checkpoint of all weights has it."""
    weight, form = trained.base[f"{layer}.base_layer.weight"], trained.record.residual
    if not form:
        return weight
    dtype, shape = trained.record.base[layer].split("|")[:2]
    held = Held(weight, trained.base[f"{layer}.base_layer.scales"].view(torch.float32))
    return values(held, form, [int(side) for side in shape.split("x")], getattr(torch, dtype))


def _scaling(trained: Trained, layer: str) -> float:
    """Return the factor of a layer's product of factors; those of LoLDU and SVFit have theirs in the factors."""
    return trained.record.scaling[layer] if trained.kind == "LORA" else 1.0


def _others(trained: Trained) -> dict[str, Tensor]:
    """Return the tensors beside the adapters by the names that the model without adapters has."""
    adapted = {f"{layer}.{part}" for layer in trained.layers for part in ("weight", "scales")}
    return {_bare(name): tensor for name, tensor in trained.base.items() if _bare(name) not in adapted}


def _bare(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _instead(tensor: Tensor) -> Change:
    return lambda _: tensor


def _left_out(trained: Trained, lost: list[str]) -> list[str]:
    """Say what was trained that a folder of the model has no place for."""
    names = [f"{trained.model}.{name}" if trained.model else name for name in lost] + list(trained.outside)
    return [not_in_folder(trained.path, "of no tensor of the base", names)] if names else []
