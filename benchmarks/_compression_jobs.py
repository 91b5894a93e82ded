"""What the two workers of ``compression.py`` run: fits of the small language model on the package's text.

A job runs in a worker of :mod:`_pair`. Every fit is a real ``Trainer.fit`` with ``num_nodes=2, devices=1``.
"""

import functools
import logging
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from typing_extensions import override

from lightning_stable.data.text import TextDataModule
from lightning_stable.recipes.causal_lm import CausalLM

__all__ = ["fit"]

LENGTH, BATCH, RISE, VALIDATION_WINDOWS = 128, 8, 20, 384
MODEL = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}


class Model(CausalLM):
    """The package's language model, with a learning rate that rises and falls by a cosine to zero.

    Args:
        steps: Optimizer steps of the fit.
        lr: Peak of the learning rate.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum.
    """

    def __init__(self, steps: int, lr: float, optimizer: str) -> None:
        super().__init__(MODEL, lr=lr)
        self.steps = steps
        self.optimizer = optimizer

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override] # no dictionary
        loss: Tensor = self(input_ids=batch[0], labels=batch[0]).loss
        return loss

    @override
    def configure_optimizers(self) -> Any:
        def factor(step: int) -> float:
            return min(1.0, (step + 1) / RISE) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

        optimizer: Optimizer = SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if self.optimizer == "adamw":
            optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class Recorder(Callback):
    """Writes down when each step ended, and what the link carried by then."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.sent: list[int] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        self.sent.append(_carried())


def fit(strategy: str, settings: dict[str, Any], optimizer: str, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """Train, and return the final loss and what was sent.

    Args:
        strategy: ``"ddp"``, ``"compressed_ddp"`` or ``"one_bit_adam"``.
        settings: Arguments of the strategy.
        optimizer: ``"adamw"`` or ``"sgd"``.
        seed: Of the initial weights and the samples.
        steps: Optimizer steps.
        lr: Peak of the learning rate.

    Returns:
        ``loss`` (nats a byte, on windows that were held out), ``counted`` and ``carried``, the bytes of a step as the
        strategy counts them and as the device of the link does (0 without one), and ``seconds`` of a step.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    train, held = _text()
    rank = int(os.environ["NODE_RANK"])
    seed_everything(seed, verbose=False)
    module, recorder, plugin = Model(steps, lr, optimizer), Recorder(), _strategy(strategy, settings)
    own = torch.Generator().manual_seed(2 * seed + rank)
    drawn = RandomSampler(train, replacement=True, num_samples=BATCH * steps, generator=own)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy=plugin,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[recorder],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=BATCH, sampler=drawn))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # In a ring of two processes an all-reduce sends the buffer once.
    counted = plugin.bytes_sent / steps if hasattr(plugin, "bytes_sent") else 4 * parameters
    pauses = sorted(late - early for early, late in zip(recorder.ends, recorder.ends[1:], strict=False))
    return {
        "loss": _evaluate(module, held),
        "counted": counted,
        "carried": (recorder.sent[-1] - recorder.sent[0]) / (steps - 1),
        "seconds": pauses[len(pauses) // 2],
        "parameters": parameters,
    }


def _strategy(name: str, settings: dict[str, Any]) -> Any:
    from lightning.pytorch.strategies import DDPStrategy

    from lightning_stable.strategies import CompressedDDPStrategy, OneBitAdamStrategy

    kinds = {"ddp": DDPStrategy, "compressed_ddp": CompressedDDPStrategy, "one_bit_adam": OneBitAdamStrategy}
    return kinds[name](process_group_backend="gloo", **settings)


@functools.cache
def _text() -> tuple[TensorDataset, Tensor]:
    """Return the windows to train on, and those held out."""
    datamodule = TextDataModule(sequence_length=LENGTH, batch_size=1, seed=0, max_bytes=2_000_000)
    datamodule.setup("fit")
    parts = []
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        windows: Any = loader.dataset
        parts.append(torch.stack([windows[index]["input_ids"] for index in range(len(windows))]))
    held = parts[1][:: max(1, len(parts[1]) // VALIDATION_WINDOWS)][:VALIDATION_WINDOWS]
    return TensorDataset(parts[0]), held


@torch.no_grad()
def _evaluate(module: Model, held: Tensor) -> float:
    module.eval()
    parts = torch.split(held, 64)
    return sum(float(module(input_ids=part, labels=part).loss) * len(part) for part in parts) / len(held)


def _carried() -> int:
    """Return the bytes that the worker's device of the link has sent."""
    device = os.environ.get("WORKER_DEVICE")
    return int(Path(f"/sys/class/net/{device}/statistics/tx_bytes").read_text()) if device else 0
