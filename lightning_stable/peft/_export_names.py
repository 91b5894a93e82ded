"""Names of what was trained: as the model of the base's folder has them, and of what an export has no place for."""

from pathlib import Path
from typing import Any

from lightning_stable.peft._export_base import Rename
from lightning_stable.peft._export_read import Trained

__all__ = ["lost_in_adapter", "names_note", "not_in_folder", "renamed"]

# What a record holds by layer.
_OF_LAYERS = ("scaling", "shift", "base")


def renamed(trained: Trained, rename: Rename) -> Trained:
    """Return adapters by the names that another level of the model has.

    Args:
        trained: The adapters, by their names in the adapted module.
        rename: What turns such a name into the one to write.
    """
    if rename == Rename():
        return trained
    record = trained.record
    of_layers = {name: {rename(layer): each for layer, each in getattr(record, name).items()} for name in _OF_LAYERS}
    config = {**record.config, **_targets(trained, rename)}
    return trained._replace(
        record=type(record)(**{**vars(record), **of_layers, "config": config}),
        layers={rename(layer): found for layer, found in trained.layers.items()},
        modules={rename(name): tensor for name, tensor in trained.modules.items()},
        tokens={rename(name): tensor for name, tensor in trained.tokens.items()},
        base={rename(name): tensor for name, tensor in trained.base.items()},
        trained=tuple(rename(name) for name in trained.trained),
    )


def _targets(trained: Trained, rename: Rename) -> dict[str, Any]:
    """Return the fields of a config that choose layers, for other names: patterns of the old ones may not fit."""
    config = trained.record.config
    fields: dict[str, Any] = {}
    if not config.get("target_parameters"):
        fields = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        fields = {name: value for name, value in fields.items() if name in config}
        fields["target_modules"] = sorted(rename(layer) for layer in trained.layers)
    if ends := config.get("modules_to_save"):
        found = {_path_of(name, ends) for name in trained.modules}
        fields["modules_to_save"] = sorted(rename(path) for path in found)
    return fields


def _path_of(name: str, ends: list[str]) -> str:
    """Return the path of the module, one that ends as one of ``ends``, that a tensor belongs to."""
    parts = name.split(".")
    paths = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((path for path in paths if any(f".{path}".endswith(f".{end}") for end in ends)), paths[-1])


def names_note(trained: Trained, has_base: bool) -> list[str]:
    """Say so where the names are those of the LightningModule, which other libraries have not."""
    if trained.model or has_base:
        return []
    return [
        f"All of the LightningModule was adapted, so names are those within it, such as {min(trained.layers)}. On a "
        "model that is only a part of it PEFT would find no such layers. Give the folder of that model by --base, "
        "and the names are those of the model."
    ]


def lost_in_adapter(trained: Trained) -> list[str]:
    """Say what was trained that a PEFT folder has no place for, and what to do."""
    biases = trained.record.config.get("bias", "none") != "none"
    names = [name.replace(".base_layer.", ".") for name in trained.trained if not (biases and name.endswith(".bias"))]
    notes = []
    if names:
        inside = [f"{trained.model}.{name}" if trained.model else name for name in names]
        notes.append(
            f"Trained too, but not in the folder, as they are of no adapter: {', '.join(inside)}. With them the model "
            "is another one. Export with --as merged, which takes those that the base has; or train with their modules "
            "in the config's modules_to_save."
        )
    if trained.outside:
        notes.append(not_in_folder(trained.path, "outside of the adapted module", list(trained.outside)))
    return notes


def not_in_folder(path: Path, why: str, names: list[str]) -> str:
    """Return a note of parameters that no export has a place for, and where they are."""
    return (
        f"Trained too, but not in the folder, as they are {why}: {', '.join(names)}. They are in the checkpoint: "
        f"torch.load({str(path)!r}, weights_only=True)['state_dict'] has them by these names, and "
        "lightning_stable.peft.load_adapters puts them into the whole LightningModule."
    )
