"""A small image classifier, trained with cross-entropy and AdamW: the module that the image templates name.

Use it to try a plugin on real images in seconds, or as a pattern for a module of your own. It configures an optimizer
and no scheduler, so a schedule callback owns the learning rate; the rate stands in one place, ``lr``. To train with
another optimizer, name one at the top of the config (``optimizer: {class_path: ..., init_args: ...}``): LightningCLI
then takes it instead, and ``lr`` and ``weight_decay`` here are not used.

Example:
    >>> import torch
    >>> from lightning_stable.recipes.image_classifier import ImageClassifier
    >>> classifier = ImageClassifier(width=16)
    >>> classifier(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
"""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

__all__ = ["ImageClassifier"]

_ARCHITECTURES = ("conv", "mlp")


class ImageClassifier(LightningModule):
    """A convolutional network or a multi-layer perceptron over square images.

    ``conv``: three 3x3 convolutions with width, 2 width and 2 width channels, the last two of stride 2, each with
    group normalisation (no batch statistics: the same under any number of processes) and GELU, then a linear layer.
    ``mlp``: two hidden layers of ``width`` units with GELU. Batches are ``(images, labels)`` of shapes
    (N, in_channels, image_size, image_size) and (N,).

    Logs ``train_loss`` for each step, ``val_loss`` and ``val_accuracy`` (or ``test_...``) for each evaluation: the loss
    in nats, the accuracy as the share of images that are right.

    Args:
        in_channels: Channels of an image.
        image_size: Height and width of an image, in pixels.
        num_classes: Number of classes.
        width: Channels of the first convolution, or units of a hidden layer.
        architecture: ``"conv"`` or ``"mlp"``.
        lr: Learning rate of AdamW; its peak, when a schedule is in charge.
        weight_decay: Decoupled weight decay of AdamW, on all parameters.
        pretrained: Checkpoint of another run of this module, with the same sizes, whose weights to begin with. A
            checkpoint of this run holds its own weights and needs that file no more.

    Raises:
        ValueError: If a setting is out of range, or the checkpoint is not of such a module.
        FileNotFoundError: If there is no such checkpoint.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 8,
        num_classes: int = 10,
        width: int = 32,
        architecture: Literal["conv", "mlp"] = "conv",
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, image_size=image_size, width=width)
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {num_classes!r}.")
        if architecture not in _ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture!r}.")
        self.save_hyperparameters(ignore=["pretrained"])
        self.lr = lr
        self.weight_decay = weight_decay
        build = _conv if architecture == "conv" else _mlp
        self.network = build(in_channels, image_size, num_classes, width)
        # Micro average: the plain share of right images. One object a stage, since each holds its own counts.
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        if pretrained is not None:
            self._load_weights(pretrained)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, of shape (N, num_classes)."""
        logits: Tensor = self.network(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch, in nats."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(labels))
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._evaluate("val", self.val_accuracy, batch)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._evaluate("test", self.test_accuracy, batch)

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor] | list[Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Return the class probabilities, of shape (N, num_classes), of images with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return torch.softmax(self(images), dim=-1)

    @override
    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over the parameters that require gradients."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return AdamW(trainable, lr=self.lr, weight_decay=self.weight_decay)

    def _load_weights(self, path: str) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True).get("state_dict", {})
        problems = [name for name, tensor in self.state_dict().items() if _shape(state.get(name)) != tensor.shape]
        if problems:
            raise ValueError(
                f"ImageClassifier: pretrained={path!r} has no weights for {problems[0]!r} of shape "
                f"{tuple(self.state_dict()[problems[0]].shape)}, but {_shape(state.get(problems[0]))}. Give the "
                "checkpoint of a run of this module, and the sizes that it had."
            )
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(labels))
        # Logged as the metric object: the host adds up its counts over batches and processes, and resets it.
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))


def _conv(in_channels: int, image_size: int, num_classes: int, width: int) -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
        return [convolution, nn.GroupNorm(1, channels_out), nn.GELU()]

    side = -(-image_size // 4)  # two strides of 2, each rounding up
    return nn.Sequential(
        *block(in_channels, width, 1),
        *block(width, 2 * width, 2),
        *block(2 * width, 2 * width, 2),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, num_classes),
    )


def _mlp(in_channels: int, image_size: int, num_classes: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(in_channels * image_size * image_size, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, num_classes),
    )


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size!r}.")
