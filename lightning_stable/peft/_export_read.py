"""What a checkpoint of :class:`~lightning_stable.peft.adapters.Adapters` holds, sorted for an export."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stable.peft._record import KEY, Record, without_compile

__all__ = ["TUNERS", "Trained", "read_trained"]

TUNERS = {"LORA": "lora_", "LOLDU": "loldu_", "SVFIT": "svfit_"}
"""How the names of an adapter's tensors begin, for each PEFT type that can be exported."""


class Trained(NamedTuple):
    """An adapted module as a checkpoint has it; names are relative to it.

    Attributes:
        path: The checkpoint.
        record: What the callback wrote of the adapters.
        model: The adapted submodule's path, ``""`` if all of the LightningModule was adapted.
        complete: Whether the base is in the checkpoint.
        layers: The tensors of each layer's adapter, by their names without that of the adapter, as in
            ``{"model.q_proj": {"lora_A.weight": ..., "lora_B.weight": ...}}``.
        modules: The tensors of ``modules_to_save``, by the names that they have in the base.
        tokens: The rows of ``trainable_token_indices``, by the names that they have in a PEFT folder.
        base: The other tensors, by their names in the adapted module: all of the base where everything was saved, else
            what trains beside the adapters and the persistent buffers.
        trained: Those names in ``base`` that were trained.
        outside: Names in the checkpoint of trained parameters that are not in the adapted module.
        source: What the model was loaded from, where the checkpoint tells: a name on the hub or a folder.
    """

    path: Path
    record: Record
    model: str
    complete: bool
    layers: dict[str, dict[str, Tensor]]
    modules: dict[str, Tensor]
    tokens: dict[str, Tensor]
    base: dict[str, Tensor]
    trained: tuple[str, ...]
    outside: tuple[str, ...]
    source: str | None

    @property
    def kind(self) -> str:
        """The PEFT type: ``"LORA"``, ``"LOLDU"`` or ``"SVFIT"``."""
        return str(self.record.config["peft_type"])


def read_trained(path: Path) -> Trained:
    """Read a checkpoint and sort its tensors.

    Args:
        path: A checkpoint file of a run with ``Adapters``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, it cannot be read safely, it holds no adapters, or adapters of a kind that
            cannot be exported.
    """
    checkpoint = _load(path)
    stored = checkpoint.get(KEY)
    if not isinstance(stored, dict):
        raise ValueError(  # noqa: TRY004  about a file, as the others
            f"{path} holds no adapters. A run with the callback Adapters (lightning_stable.peft.adapters) writes them "
            "into its checkpoints."
        )
    checkpoint = without_compile(checkpoint)
    record = Record.from_checkpoint(str(path), checkpoint[KEY])
    kind = str(record.config["peft_type"])
    if kind not in TUNERS:
        raise ValueError(
            f"{path} holds adapters of the PEFT type {kind}; those of {', '.join(TUNERS)} can be exported. Load others "
            "onto their base by lightning_stable.peft.load_adapters, and use what PEFT has for them, such as "
            "peft.save_as_lora."
        )
    return _sort(path, checkpoint, record)


def _load(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint file; a tensor is read from the file when it is used."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and an export takes a file. A checkpoint that was saved in shards becomes one by "
            "'python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER'."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no checkpoint of a Trainer.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} holds objects{f' ({found[1]})' if found else ''} that are not safe to read, mostly "
            "hyperparameters. Keep these to numbers and text, or leave others out by save_hyperparameters(ignore=...)."
        ) from error
    except RuntimeError as error:  # a zip file of something else
        raise ValueError(f"{path} is no checkpoint of a Trainer.") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path} is no checkpoint of a Trainer: it has no state_dict.")  # noqa: TRY004
    return content


def _sort(path: Path, checkpoint: dict[str, Any], record: Record) -> Trained:
    """Sort the tensors of a checkpoint by what they are."""
    stored = checkpoint[KEY]
    prefix = f"{stored['model']}." if stored["model"] else ""
    adapter = re.compile(
        rf"(?P<layer>.+)\.(?P<part>{TUNERS[str(record.config['peft_type'])]}\w+)\.default(?P<leaf>\.\w+)?"
    )
    saved = re.compile(r"(?P<layer>.+)\.modules_to_save\.default\.(?P<leaf>.+)")
    token = re.compile(r"(?P<part>.+\.token_adapter\.trainable_tokens_delta)\.default")
    layers: dict[str, dict[str, Tensor]] = {}
    modules, tokens, base = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    trained = []
    for name, tensor in checkpoint["state_dict"].items():
        if not name.startswith(prefix) or ".original_module." in name:
            continue
        inside = name.removeprefix(prefix)
        if found := adapter.fullmatch(inside):
            layers.setdefault(found["layer"], {})[found["part"] + (found["leaf"] or "")] = tensor
        elif found := saved.fullmatch(inside):
            modules[f"{found['layer']}.{found['leaf']}"] = tensor
        elif found := token.fullmatch(inside):
            tokens[found["part"]] = tensor
        else:
            base[inside] = tensor
            trained += [inside] if name in record.trained else []
    source = (checkpoint.get("hyper_parameters") or {}).get("pretrained")
    return Trained(
        path=path,
        record=record,
        model=stored["model"],
        complete=stored["save"] == "full",
        layers=layers,
        modules=modules,
        tokens=tokens,
        base=base,
        trained=tuple(trained),
        outside=tuple(sorted(name for name in record.trained if not name.startswith(prefix))),
        source=source if isinstance(source, str) else None,
    )
