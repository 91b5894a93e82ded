"""Small models with adapters, trained for a few steps, for the tests of exports."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stable.peft.adapters import Adapters
from lightning_stable.testing.harness import QUIET

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
GPT2 = {
    **{"model_type": "gpt2", "vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    **{"bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
INPUTS = torch.arange(64).reshape(4, 16) % 48


class Finetune(LightningModule):
    """A model of a folder, and a parameter beside it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = load(folder).train()
        self.head = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss + self.head.weight.sum() ** 2

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=2e-2)


class Run(NamedTuple):
    """A run that is over.

    Attributes:
        checkpoint: Its checkpoint.
        base: The folder of the model that it started from.
        logits: What the trained model says to the inputs.
        module: The trained module.
    """

    checkpoint: Path
    base: Path
    logits: Tensor
    module: LightningModule


def load(folder: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), **options)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(INPUTS).logits
    return logits.float()


def make_base(folder: Path, config: dict[str, Any] = LLAMA, **save: Any) -> Path:
    """Write a model with weights that are not near zero, so that an adapter in the wrong place shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    seed_everything(1, verbose=False)
    dtype = save.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(str(folder), **save)
    return folder


def train(
    folder: Path, base: Path, config: dict[str, Any], init: str = "default", steps: int = 3, **options: Any
) -> Run:
    """Train adapters for a few steps, and keep a checkpoint in ``folder``."""
    cls = options.pop("cls", Finetune)
    seed_everything(2, verbose=False)
    module = cls(str(base))
    data = DataLoader(torch.randint(0, 48, (24, 12)), batch_size=2)
    adapters = Adapters(config, init, **{"init_batches": 4, **options})
    trainer = Trainer(max_steps=3, callbacks=[adapters], **QUIET)
    trainer.fit(module, data)
    path = folder / f"{init}.ckpt"
    trainer.save_checkpoint(path)
    return Run(path, base, logits_of(module.model), module)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return how far two outputs are apart, relative to the second."""
    return float((found - wanted).norm() / wanted.norm())
