"""The model: a small convolutional network for small images."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer


class VisionModule(LightningModule):
    """Classify images.

    It configures an optimizer and no scheduler: what changes the learning rate in a run is a callback of the config.

    Args:
        classes: Number of classes.
        channels: Channels of an image.
        width: Channels of the first convolution.
        lr: Learning rate of AdamW; its peak, where a schedule is in charge.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(
        self, classes: int = 10, channels: int = 1, width: int = 16, lr: float = 0.01, weight_decay: float = 1e-4
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        # Group normalisation: no statistics of batches, which differ between processes and averages of weights.
        self.network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(1, width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(1, 2 * width),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),  # images of any size
            nn.Flatten(),
            nn.Linear(8 * width, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, of shape (N, classes)."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        inputs, labels = batch
        loss = cross_entropy(self(inputs), labels)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the probability of each class."""
        return torch.softmax(self(batch[0]), dim=-1)

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over what trains."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return AdamW(trainable, lr=self.lr, weight_decay=self.weight_decay)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self(inputs)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        values = {f"{stage}_loss": cross_entropy(logits, labels), f"{stage}_accuracy": accuracy}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(labels))
