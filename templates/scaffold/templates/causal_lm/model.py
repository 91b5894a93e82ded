"""The model: a small causal language model of transformers, or one that was trained before."""

import math
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig


class LanguageModule(LightningModule):
    """Predict the next token.

    It configures an optimizer and no scheduler: what changes the learning rate in a run is a callback of the config.

    Args:
        pretrained: A folder that ``save_pretrained`` wrote, or a name on the hub; ``None`` begins with random weights.
        vocabulary: Number of tokens; 256 are the bytes.
        width: Width of the hidden layers.
        layers: Number of blocks.
        lr: Learning rate of AdamW; its peak, where a schedule is in charge.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        vocabulary: int = 256,
        width: int = 64,
        layers: int = 2,
        lr: float = 0.002,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        if pretrained is not None:
            model = AutoModelForCausalLM.from_pretrained(pretrained)
        else:
            config = LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=1024,
            )
            model = AutoModelForCausalLM.from_config(config)
        # Trained weights come in evaluation mode and maybe in half precision.
        self.network = model.float().train()

    def forward(self, **inputs: Tensor) -> Any:
        """Return the model's output: ``logits``, and ``loss`` if there are labels."""
        return self.network(**inputs, use_cache=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the predicted tokens."""
        loss = self(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_bits_per_token``."""
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_bits_per_token``."""
        self._evaluate("test", batch)

    def configure_optimizers(self) -> Optimizer:
        """Return AdamW over what trains; gains and biases do not decay."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW([group for group in groups if group["params"]], lr=self.lr, betas=(0.9, 0.95))

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        loss = self(**batch).loss
        values = {f"{stage}_loss": loss, f"{stage}_bits_per_token": loss / math.log(2)}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))
