"""The data: scikit-learn's breast cancer data, 569 rows of 30 numbers in two classes."""

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset


class TabularData(LightningDataModule):
    """Batches of ``(rows, labels)``: float32 of shape (N, 30), and int64 of shape (N,).

    Args:
        batch_size: Samples in a batch of one process.
        num_workers: Processes that load; data in memory needs none.
        seed: Which samples are held out.
    """

    def __init__(self, batch_size: int = 16, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the data and hold a part of it out."""
        table = load_breast_cancer()
        inputs = torch.from_numpy(table.data).float()
        labels = torch.from_numpy(table.target).long()
        train, held_out = train_test_split(
            torch.arange(len(labels)), test_size=0.2, stratify=table.target, random_state=self.seed
        )
        # To mean 0 and spread 1, as the training rows say: the held-out ones must not tell.
        inputs = (inputs - inputs[train].mean(dim=0)) / inputs[train].std(dim=0)
        self.train = TensorDataset(inputs[train], labels[train])
        self.held_out = TensorDataset(inputs[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader:
        """Return the training samples in a new order each epoch."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        """Return the samples held out."""
        return DataLoader(self.held_out, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        """Return the samples held out: there is no third part."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Return the samples held out."""
        return self.val_dataloader()
