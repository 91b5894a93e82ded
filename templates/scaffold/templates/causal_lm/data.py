"""The data: text files as bytes, by default the source of the running Python's standard library."""

import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    """Windows of a byte string, one behind the other, as ``{"input_ids", "labels"}`` of shape (length,)."""

    def __init__(self, data: bytes, length: int) -> None:
        self.data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return len(self.data) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.data[index * self.length : (index + 1) * self.length].long()
        return {"input_ids": window, "labels": window}  # the model shifts the labels


class LanguageData(LightningDataModule):
    """Batches of ``{"input_ids", "labels"}``: int64 of shape (N, length) in 0 to 255.

    Args:
        folder: Where text files are searched for; ``None`` is the standard library.
        pattern: Which files to read.
        length: Bytes in a window.
        batch_size: Windows in a batch of one process.
        max_bytes: Read at most so many.
        num_workers: Processes that load; data in memory needs none.
    """

    def __init__(
        self,
        folder: str | None = None,
        pattern: str = "*.py",
        length: int = 128,
        batch_size: int = 16,
        max_bytes: int = 4_000_000,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder or sysconfig.get_path("stdlib"))
        self.pattern = pattern
        self.length = length
        self.batch_size = batch_size
        self.max_bytes = max_bytes
        self.num_workers = num_workers

    def setup(self, stage: str) -> None:
        """Read the files; every tenth one is held out."""
        train, held_out = bytearray(), bytearray()
        for number, file in enumerate(sorted(self.folder.glob(self.pattern))):
            if len(train) + len(held_out) >= self.max_bytes:
                break
            part = train if number % 10 else held_out
            part += file.read_bytes() + b"\0"
        if min(len(train), len(held_out)) < self.batch_size * self.length:
            raise ValueError(f"{self.folder} has too little text in {self.pattern}: give another folder or pattern.")
        self.train, self.held_out = Windows(train, self.length), Windows(held_out, self.length)

    def train_dataloader(self) -> DataLoader:
        """Return the training windows in a new order each epoch."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the windows held out."""
        return DataLoader(self.held_out, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """Return the windows held out: there is no third part."""
        return self.val_dataloader()
