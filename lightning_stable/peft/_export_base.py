"""A folder of ``save_pretrained`` as tensors by name: read one at a time, copied, and changed in place in the copy."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stable.peft._record import dtype_of, fingerprint

__all__ = [
    "Base",
    "Change",
    "Rename",
    "check_base",
    "name_in_base",
    "name_in_model",
    "open_base",
    "tied_heads",
    "write_base",
]

Change = Callable[[Tensor], Tensor]
"""What becomes of a tensor of the base; shape and dtype stay."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
_TEMPLATES = "additional_chat_templates"
# Of the fingerprint of a weight that has values, see `fingerprint`.
_FIELDS = 4


class Base(NamedTuple):
    """The folder of a model.

    Attributes:
        folder: The folder.
        files: The file of each tensor, by the tensor's name.
        config: What ``config.json`` says.
    """

    folder: Path
    files: dict[str, str]
    config: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_base(folder: Path) -> Base:
    """Find out what a folder holds.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks a file.
        ValueError: If its weights are quantized or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Give the model that training started from, as a folder with config.json and "
            "model.safetensors; save_pretrained writes one."
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json. Give a folder that save_pretrained wrote.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder} holds quantized weights, which an adapter cannot be added to. Give the model in floating point, "
            "or export with --as lora."
        )
    # In the order in which transformers looks for them.
    if (folder / _SINGLE).is_file():
        return Base(folder, dict.fromkeys(_header(folder / _SINGLE)[0], _SINGLE), config)
    if (folder / _INDEX).is_file():
        files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        if lost := sorted({file for file in files.values() if not (folder / file).is_file()}):
            raise FileNotFoundError(f"{folder} lacks {', '.join(lost)}, which {_INDEX} names.")
        for file in set(files.values()):
            _header(folder / file)
        return Base(folder, files, config)
    raise FileNotFoundError(
        f"{folder} has no {_SINGLE} and no {_INDEX}. Load the model and write it anew by save_pretrained."
    )


class Rename(NamedTuple):
    """A change of how names begin.

    Attributes:
        less: What is taken away.
        more: What is put before.
    """

    less: str = ""
    more: str = ""

    def __call__(self, name: str) -> str:
        """Return the other name."""
        return self.more + name.removeprefix(self.less)


def name_in_base(layers: Iterable[str], base: Base, tied: Iterable[str]) -> Rename:
    """Return what turns a name in the adapted module into the one that the folder has.

    They differ in what comes first: the folder is of the model within the adapted module, or of the one around it.

    Args:
        layers: The adapted layers.
        base: The folder.
        tied: Weights that the model has and the files do not, because they are those of others.

    Raises:
        ValueError: If the folder has not all of the layers.
    """
    wanted, known = sorted(f"{layer}.weight" for layer in layers), base.files.keys() | set(tied)

    def lost(rename: Rename) -> list[str]:
        return [name for name in wanted if rename(name) not in known]

    renames, first = [Rename()], wanted[0].split(".")
    renames += [Rename(less=".".join(first[:count]) + ".") for count in range(1, len(first) - 1)]
    renames += [Rename(more=other.removesuffix(wanted[0])) for other in known if other.endswith(f".{wanted[0]}")]
    best = min(renames, key=lambda rename: len(lost(rename)))
    if missing := lost(best):
        raise ValueError(
            f"{base.folder} is not the base of these adapters: it has no weight of {len(missing)} of the {len(wanted)} "
            f"adapted layers, such as {missing[0]}. Give the folder of the model that training started from."
        )
    return best


def name_in_model(in_files: Rename, base: Base) -> Rename:
    """Return what turns a name in the adapted module into the one in the model that transformers builds of the folder.

    The files may be of the part of the model that is without its head, as those of GPT-2 on the hub are.

    Args:
        in_files: What turns it into the one of the files, from :func:`name_in_base`.
        base: The folder.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    headless = {
        name for found in MODEL_MAPPING_NAMES.values() for name in ([found] if isinstance(found, str) else found)
    }
    for architecture in base.config.get("architectures") or []:
        part = getattr(getattr(transformers, architecture, None), "base_model_prefix", "")
        has_part = bool(part) and architecture not in headless
        in_names = any(name.startswith(f"{part}.") for name in base.files)
        if has_part and not in_names and f".{in_files.less}".endswith(f".{part}."):
            return Rename(less=in_files.less.removesuffix(f"{part}."))
    return in_files


def check_base(base: Base, marks: dict[str, str]) -> list[str]:
    """Compare weights of the folder with the fingerprints of those that training started from.

    Args:
        base: The folder.
        marks: Fingerprints by the name in the folder.

    Returns:
        The names of those that cannot be compared, because training had them quantized.

    Raises:
        ValueError: If some differ; it names them.
    """
    known = {name: mark for name, mark in marks.items() if mark.count("|") == _FIELDS - 1}
    other = [name for name, mark in known.items() if fingerprint(_as_trained(base.read(name), mark)) != mark]
    if other:
        more = f" and {len(other) - 2} more" if len(other) > 2 else ""
        raise ValueError(
            f"{base.folder} is not the base of these adapters: {len(other)} of {len(known)} adapted weights are not "
            f"what training started from, such as {', '.join(other[:2])}{more}. Give the folder of that model."
        )
    return sorted(marks.keys() - known.keys())


def _as_trained(tensor: Tensor, mark: str) -> Tensor:
    """Return a tensor in the dtype that it was trained in."""
    return tensor.to(dtype_of(mark) or tensor.dtype)


def tied_heads(base: Base) -> dict[str, str]:
    """Return which weights the model ties to another, if its config has it so: ``{head: embedding}``."""
    if base.config.get("tie_word_embeddings") is False:
        return {}
    import transformers

    heads: set[str] = set()
    for architecture in base.config.get("architectures") or []:
        heads |= set(getattr(getattr(transformers, architecture, None), "_tied_weights_keys", None) or ())
    shapes = {name: shape for file in set(base.files.values()) for name, shape in _shapes(base.folder / file).items()}
    rows = base.config.get("vocab_size")
    found = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == rows and name not in heads]
    return dict.fromkeys(sorted(heads), found[0]) if len(found) == 1 else {}


def write_base(
    base: Base, out: Path, changes: dict[str, Change], added: dict[str, Tensor] | None = None, *, untie: bool = False
) -> None:
    """Copy a model's folder, with some of its weights changed. One tensor at a time is in memory.

    Args:
        base: The folder to copy: its weights, and the files beside them.
        out: Where to, an empty folder.
        changes: What becomes of a tensor, by name.
        added: Tensors that the base has under the name of another only.
        untie: Let the copy's config say that no weights are tied.
    """
    names = {file: file for file in sorted(set(base.files.values()))}
    if added:
        names = {file: f"model-{at:05d}-of-{len(names) + 1:05d}.safetensors" for at, file in enumerate(names, 1)}
    for source in sorted(base.folder.iterdir()):
        if source.is_file() and not source.name.endswith(_WEIGHTS):
            shutil.copyfile(source, out / source.name)
    if (base.folder / _TEMPLATES).is_dir():
        shutil.copytree(base.folder / _TEMPLATES, out / _TEMPLATES)
    for file, copied in names.items():
        shutil.copyfile(base.folder / file, out / copied)
        _overwrite(out / copied, {name: change for name, change in changes.items() if base.files[name] == file}, base)
    if added:
        _add(base, out, names, added)
    elif set(names) != {_SINGLE}:
        shutil.copyfile(base.folder / _INDEX, out / _INDEX)
    if untie:
        config = {**base.config, "tie_word_embeddings": False}
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _overwrite(path: Path, changes: dict[str, Change], base: Base) -> None:
    """Write changed tensors over those of a file."""
    entries, start = _header(path)
    with path.open("r+b") as file:
        for name, change in changes.items():
            before = base.read(name)
            after = change(before).to(before.dtype).contiguous()
            if after.shape != before.shape:
                raise ValueError(
                    f"{name} was trained in the shape {tuple(after.shape)}, and {base.folder} has "
                    f"{tuple(before.shape)}. Save the model that training started from by save_pretrained, and give "
                    "that folder."
                )
            file.seek(start + entries[name][0])
            file.write(after.flatten().view(torch.uint8).numpy().tobytes())


def _add(base: Base, out: Path, names: dict[str, str], added: dict[str, Tensor]) -> None:
    """Put more tensors beside the others, and write the index of all."""
    from safetensors.torch import save_file

    last = f"model-{len(names) + 1:05d}-of-{len(names) + 1:05d}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in added.items()}, out / last, metadata={"format": "pt"})
    files = {name: names[file] for name, file in base.files.items()} | dict.fromkeys(added, last)
    size = sum((out / file).stat().st_size - _header(out / file)[1] for file in set(files.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (out / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shapes(path: Path) -> dict[str, list[int]]:
    return {name: shape for name, (_, shape) in _header(path)[0].items()}


def _header(path: Path) -> tuple[dict[str, tuple[int, list[int]]], int]:
    """Return offset and shape of each tensor of a safetensors file, by name, and where its data begin.

    Raises:
        ValueError: If it is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8)) if size > start else {}
    places = {name: (e["data_offsets"][0], e["shape"]) for name, e in entries.items() if name != "__metadata__"}
    if not places or size != start + max(entries[name]["data_offsets"][1] for name in places):
        raise ValueError(
            f"{path} is no file of safetensors, or only a part of one. Download it whole; a clone by git needs git lfs."
        )
    return places, start
