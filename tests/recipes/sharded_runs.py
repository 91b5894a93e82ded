"""A job of two processes: the causal language model divided by FSDP2, or whole under DDP."""

from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_stable.callbacks import WarmupStableDecay
from lightning_stable.data.text import TextDataModule
from lightning_stable.recipes.causal_lm import CausalLM
from lightning_stable.testing.harness import QUIET
from lightning_stable.testing.workers import processes

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def train(path: str, sharded: bool, steps: int, ckpt_path: str | None = None) -> dict[str, Any]:
    """Train in each of two processes, and save at the end; return which blocks are divided, and the loss."""
    seed_everything(1)
    module = CausalLM(TINY, lr=1e-2)
    # Not the default sizes, which would divide a model over machines and its layers within one.
    sizes = {"data_parallel_size": processes(), "tensor_parallel_size": 1}
    strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=False) if sharded else "ddp"
    trainer = Trainer(
        **{**QUIET, "devices": processes(), "strategy": strategy, "max_steps": steps},
        callbacks=[WarmupStableDecay(warmup=1, decay=2)],
        gradient_clip_val=1.0,
        limit_val_batches=0,
    )
    trainer.fit(module, TextDataModule(sequence_length=32, batch_size=4, max_bytes=100_000), ckpt_path=ckpt_path)
    trainer.save_checkpoint(path)
    divided = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    parts = sum(isinstance(part, torch.distributed.fsdp.FSDPModule) for part in module.modules())
    return {"divided": divided, "parts": parts, "loss": float(trainer.callback_metrics["train_loss"])}
