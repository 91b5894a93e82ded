"""Byte-level text from files, by default the Python standard library's own sources, which every machine has.

Use it to train small language models on real text with no download and no tokenizer: the vocabulary is the 256 bytes,
so the loss divided by ln 2 is in bits per byte and compares between models. Everything is read into memory (one byte a
byte); it is not made for corpora larger than that.

Example:
    >>> from lightning_stable.data.text import TextDataModule
    >>> datamodule = TextDataModule(sequence_length=64, batch_size=8, max_bytes=500_000)
    >>> datamodule.setup("fit")
    >>> batch = next(iter(datamodule.train_dataloader()))
    >>> batch["input_ids"].shape, batch["labels"].shape
    (torch.Size([8, 64]), torch.Size([8, 64]))
"""

import fnmatch
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_stable.data._resumable import SplitDataModule

__all__ = ["ByteWindows", "TextDataModule"]

# Folders under the standard library's path that are not the library.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Stands between files: text does not contain it.
_SEPARATOR = b"\0"


class ByteWindows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a byte string, as causal language models of transformers take them.

    A sample is ``{"input_ids", "labels"}``, both the same int64 tensor of shape (length,) in 0..255: those models shift
    the labels themselves. Windows do not overlap; the incomplete one at the end is left out.

    Args:
        data: The bytes.
        length: Bytes in a window.
    """

    def __init__(self, data: bytes, length: int) -> None:
        # A copy: the buffer of bytes is read-only, and torch warns of it.
        self.data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return len(self.data) // self.length

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.data[index * self.length : (index + 1) * self.length].to(torch.int64)
        return {"input_ids": window, "labels": window}


class TextDataModule(SplitDataModule):
    """Windows of bytes from text files, split by file, in a resumable training order.

    A batch is ``{"input_ids", "labels"}``, both int64 of shape (N, sequence_length) in 0..255 and equal, as causal
    language models of transformers take it. Files are shuffled by ``seed`` and split whole, so that no file is both in
    training and in validation; within a part they follow each other with one zero byte between them. The training order
    is a function of ``seed`` and the epoch; it resumes in the middle of an epoch and gives every process its own part,
    with ``Trainer(use_distributed_sampler=...)`` either way.

    Args:
        paths: Files, and directories that are searched to any depth. Default: the sources of the running Python's
            standard library without its tests and without installed packages, about 12 MB. Another Python version has
            other sources.
        pattern: Which files to take from directories, a glob on the file name.
        sequence_length: Bytes in a window.
        batch_size: Windows in a batch of one process. In training the incomplete batch of an epoch is left out.
        num_workers: Worker processes of each loader; the data is in memory, so 0 is mostly enough.
        seed: Seed of the split and of the training order.
        validation_share: Share of the bytes held out, in (0, 1); whole files, so it is met within one file.
        max_bytes: Read at most so many bytes: shuffled files are taken as long as they fit. Default: everything, which
            for the standard library takes a second or two.

    Raises:
        ValueError: If a setting is out of range, the files are fewer than two, a part is shorter than one window, or
            there is no whole training batch for every process.
        FileNotFoundError: If a path does not exist.
    """

    vocabulary_size = 256

    def __init__(
        self,
        paths: str | list[str] | None = None,
        pattern: str = "*.py",
        sequence_length: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        validation_share: float = 0.05,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, validation_share)
        if sequence_length < 2:
            raise ValueError(
                f"sequence_length must be 2 or more bytes, one to read and one to predict, got {sequence_length!r}."
            )
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be 1 or more, or None to read everything, got {max_bytes!r}.")
        self.paths = [paths] if isinstance(paths, str | os.PathLike) else paths
        self.pattern = pattern
        self.sequence_length = sequence_length
        self.max_bytes = max_bytes
        self.train_files: list[Path] = []
        self.validation_files: list[Path] = []

    @override
    def _load_splits(self) -> tuple[ByteWindows, ByteWindows]:
        """Find, split and read the files. Sets ``train_files`` and ``validation_files``."""
        files = self._choose(_find_files(self.paths, self.pattern))
        self.validation_files, self.train_files = _split_files(files, self.validation_share)
        return self._windows(self.train_files, "training"), self._windows(self.validation_files, "validation")

    def _choose(self, files: list[Path]) -> list[tuple[Path, int]]:
        """Shuffle the files, and take them with their sizes as long as they fit into ``max_bytes``."""
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed)).tolist()
        chosen, room = [], float("inf") if self.max_bytes is None else self.max_bytes
        for file in (files[index] for index in order):
            size = file.stat().st_size
            if 0 < size <= room:
                chosen.append((file, size))
                room -= size
        if len(chosen) < 2:
            raise ValueError(
                f"Training and validation need one file each, but {len(chosen)} of the {len(files)} file(s) found in "
                f"paths={self.paths!r} with pattern={self.pattern!r} can be used (not empty, within "
                f"max_bytes={self.max_bytes!r}). Give more paths, another pattern or a larger max_bytes."
            )
        return chosen

    def _windows(self, files: list[Path], part: str) -> ByteWindows:
        windows = ByteWindows(_SEPARATOR.join(file.read_bytes() for file in files), self.sequence_length)
        if len(windows) == 0:
            raise ValueError(
                f"The {part} part has {len(windows.data)} bytes in {len(files)} file(s), fewer than one window of "
                f"sequence_length={self.sequence_length}. Give more text, a shorter sequence_length or another "
                f"validation_share (now {self.validation_share})."
            )
        return windows


def _find_files(paths: list[str] | None, pattern: str) -> list[Path]:
    """Return the files, each once, in an order that depends on their names only."""
    skip = _NOT_LIBRARY if paths is None else frozenset[str]()
    found: dict[Path, Path] = {}
    for path in map(Path, [sysconfig.get_path("stdlib")] if paths is None else paths):
        if not path.exists():
            raise FileNotFoundError(f"paths names {str(path)!r}, which does not exist. Give files or directories.")
        for file in [path] if path.is_file() else _walk(path, pattern, skip):
            # Two spellings of one file must not put it on both sides of the split.
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _walk(directory: Path, pattern: str, skip: frozenset[str]) -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(set(subfolders) - skip)
        files += [Path(folder, name) for name in sorted(fnmatch.filter(names, pattern))]
    return files


def _split_files(files: list[tuple[Path, int]], share: float) -> tuple[list[Path], list[Path]]:
    """Give the first files to validation until it has its share of the bytes, and the others to training."""
    wanted, held = share * sum(size for _, size in files), 0
    count = 0
    while count == 0 or (held < wanted and count < len(files) - 1):
        held += files[count][1]
        count += 1
    return [file for file, _ in files[:count]], [file for file, _ in files[count:]]
