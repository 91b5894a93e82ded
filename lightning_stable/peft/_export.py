"""Take what ``Adapters`` trained elsewhere: as plain LoRA, merged into the base, or in the tuner's own form.

``lightning-stable export-adapter`` is :func:`export_adapter`. It works on names and tensors; no model is built.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_stable.functional._settings import check_choice
from lightning_stable.peft._export_lora import native, plain_lora, write_folder
from lightning_stable.peft._export_merge import BaseOfTraining, write_complete
from lightning_stable.peft._export_names import lost_in_adapter, names_note, renamed
from lightning_stable.peft._export_read import Trained, read_trained
from lightning_stable.peft._quantized import import_bitsandbytes

__all__ = ["FORMS", "Exported", "export_adapter"]

FORMS = ("lora", "merged", "native")
# Of an earlier export these would be read beside the new weights of a model, or before them.
_STALE = ("adapter_config.json", "adapter_model.safetensors", "model*.safetensors", "model.safetensors.index.json")


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        summary: One sentence.
        notes: What the reader should know besides, a sentence or two each.
    """

    summary: str
    notes: list[str]


@torch.no_grad()
def export_adapter(
    checkpoint: str | Path, out: str | Path, *, form: str = "lora", base: str | Path | None = None, force: bool = False
) -> Exported:
    """Write the adapters of a checkpoint to a folder.

    Args:
        checkpoint: A checkpoint file of a run with ``Adapters``.
        out: The folder to write. It is filled at the end, so an export that fails leaves it as it was.
        form: ``"lora"``: a PEFT folder of plain LoRA for the untouched base. ``"merged"``: the whole model without
            adapters. ``"native"``: a PEFT folder of the adapters as they were trained.
        base: The folder of the model that training started from, as ``save_pretrained`` writes it.
        force: Write into a folder that is not empty. What an earlier export wrote there is replaced, other files
            stay.

    Raises:
        FileNotFoundError: If the checkpoint or the base does not exist, or a file of it.
        ValueError: If ``out`` is not empty and not to be written to, the checkpoint has no adapters, the base is
            another one, or the form is not for these adapters.
    """
    check_choice("form", form, FORMS)
    target, source = Path(out), None if base is None else Path(base)
    _check_target(target, source, force)
    trained = read_trained(Path(checkpoint))
    if trained.record.residual and form != "lora":
        import_bitsandbytes("export-adapter")
    opened = None if source is None else BaseOfTraining(trained, source)
    write = {"lora": _write_lora, "merged": _write_merged, "native": _write_native}[form]
    with _staged(target) as folder:
        return write(trained, opened, folder, target)


def _write_lora(trained: Trained, base: BaseOfTraining | None, folder: Path, out: Path) -> Exported:
    notes = lost_in_adapter(trained) + names_note(trained, base is not None)
    if base is not None:
        trained = renamed(trained, base.rename_in_model)
    parts, config = plain_lora(trained)
    write_folder(folder, trained, parts, config, _name_of(trained, base))
    ranks = sorted({len(found[name]) for found in parts.values() for name in found if "_A" in name})
    if trained.record.residual:
        notes.append(
            f"Training had the base in {trained.record.residual}, and the folder is for the untouched base: outputs "
            "differ by what quantizing took. For the base of the training export with --as merged or --as native, and "
            "--base."
        )
    of_rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    return Exported(f"LoRA of {of_rank} for {len(parts)} layers of the untouched base", notes)


def _write_merged(trained: Trained, base: BaseOfTraining | None, folder: Path, out: Path) -> Exported:
    done = f"The model with the adapters of {len(trained.layers)} layers merged"
    if base is not None:
        return Exported(done, base.write_merged(folder))
    if trained.complete:
        return Exported(done, write_complete(trained, folder))
    raise ValueError(
        f"{trained.path} holds adapters and no base to merge them into. Give the folder of the model that training "
        "started from by --base."
    )


def _write_native(trained: Trained, base: BaseOfTraining | None, folder: Path, out: Path) -> Exported:
    notes = lost_in_adapter(trained) + names_note(trained, base is not None)
    name = _name_of(trained, base)
    if trained.record.shift:
        if base is None:
            raise ValueError(
                f"{trained.path} holds adapters of {trained.record.init!r}, which go on a base that was shifted for "
                "them. Give the folder of the model that training started from by --base, and the shifted base is "
                "written too; or export with --as lora, for the untouched base."
            )
        (folder / "base").mkdir()
        notes += base.write_shifted(folder / "base")
        if trained.record.residual:
            notes.append(f"The base of the training in {trained.record.residual} is written in floating point.")
        name = str((out / "base").resolve())
    if base is not None:
        trained = renamed(trained, base.rename_in_model)
    parts, config = native(trained)
    write_folder(folder, trained, parts, config, name)
    if trained.kind != "LORA":
        notes.append(
            f"To load it PEFT has to know {trained.kind}: import lightning_stable.peft.{trained.kind.lower()}."
        )
    beside = ", and the shifted base that they go on in its folder 'base'" if trained.record.shift else ""
    return Exported(f"{trained.kind} adapters of {len(parts)} layers as they were trained{beside}", notes)


def _name_of(trained: Trained, base: BaseOfTraining | None) -> str | None:
    """Return what a PEFT config names as the base."""
    return trained.source or (None if base is None else str(base.base.folder.resolve()))


def _check_target(out: Path, base: Path | None, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file. Give a folder that is empty or does not exist.")
    if base is not None and base.resolve() in (out.resolve(), *out.resolve().parents, (out / "base").resolve()):
        raise ValueError(f"{out} is the base's own folder, within it, or around it. Give another one to write to.")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ValueError(f"{out} is not empty. Give another folder, or --force to replace an earlier export there.")


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` to write to; what it holds takes its place there if nothing fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o666 & ~_umask()  # some libraries write files that only their owner may read
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        for place in {file.parent for file in folder.rglob("model*.safetensors")}:
            for stale in [found for name in _STALE for found in (out / place.relative_to(folder)).glob(name)]:
                stale.unlink()
        for file in [path for path in folder.rglob("*") if path.is_file()]:
            place = out / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(mode)
            os.replace(file, place)  # noqa: PTH105  over what is there, on every system
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    """Return what new files are not allowed, which can only be asked for by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
