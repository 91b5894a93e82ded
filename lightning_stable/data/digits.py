"""Handwritten digits: 1797 real 8x8 images in 10 classes, bundled with scikit-learn.

Use it for runs of seconds on real images. Not a benchmark of vision models: a small network is right on 97 to 99 % of
the held-out images, so differences between good runs are a few images.

Example:
    >>> from lightning_stable.data.digits import DigitsDataModule
    >>> datamodule = DigitsDataModule(batch_size=32)
    >>> datamodule.setup("fit")
    >>> images, labels = next(iter(datamodule.train_dataloader()))
    >>> images.shape, labels.shape
    (torch.Size([32, 1, 8, 8]), torch.Size([32]))
"""

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_stable.data._resumable import SplitDataModule

__all__ = ["DigitsDataModule", "read_digits"]


def read_digits() -> TensorDataset:
    """Return all images, float32 of shape (1797, 1, 8, 8) in [0, 1], and labels, int64 in 0..9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).div(16).unsqueeze(1)  # ink is 0..16
    return TensorDataset(images, torch.from_numpy(digits.target).to(torch.int64))


class DigitsDataModule(SplitDataModule):
    """scikit-learn's digits with a fixed stratified split and a resumable training order.

    A batch is ``(images, labels)``: float32 of shape (N, 1, 8, 8) in [0, 1], and int64 of shape (N,) in 0..9. The
    training order is a function of ``seed`` and the epoch; it resumes in the middle of an epoch and gives every process
    its own part, with ``Trainer(use_distributed_sampler=...)`` either way. There is no third split: test and predict
    read the validation images.

    Args:
        batch_size: Images in a batch of one process. In training the incomplete batch of an epoch is left out.
        num_workers: Worker processes of each loader; the data is in memory, so 0 is the fastest.
        seed: Seed of the split and of the training order.
        validation_share: Share of the images held out, in (0, 1); 0.2 are 360 of 1797.

    Raises:
        ValueError: If a setting is out of range, or there is no whole training batch for every process.
    """

    classes = 10
    image_shape = (1, 8, 8)

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, seed: int = 0, validation_share: float = 0.2
    ) -> None:
        super().__init__(batch_size, num_workers, seed, validation_share)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the held-out images: there is no third split."""
        return self.val_dataloader()

    @override
    def _load_splits(self) -> tuple[TensorDataset, TensorDataset]:
        from sklearn.model_selection import train_test_split

        images, labels = read_digits().tensors
        parts = train_test_split(
            range(len(labels)), test_size=self.validation_share, stratify=labels.numpy(), random_state=self.seed
        )
        train, validation = (torch.tensor(sorted(part)) for part in parts)
        return TensorDataset(images[train], labels[train]), TensorDataset(images[validation], labels[validation])
