"""What the tests of adapters train: small modules with a base that a seed gives again, and short runs of them."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_stable.peft.adapters import Adapters
from lightning_stable.testing.harness import QUIET

INITS = (
    "default",
    "gaussian",
    "orthogonal",
    "mica",
    "olora",
    "pissa",
    "lora_ga",
    "eva",
    "corda",
    "loldu",
    "svfit",
)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
TARGETS = {"llama": ["q_proj", "k_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "mlp": ["first", "second"]}


class Mlp(nn.Module):
    """Two layers to adapt, with a normalisation that has buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.norm = nn.BatchNorm1d(20)
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(self.first(x)).relu()))


class Net(LightningModule):
    """A module whose base is the same in every process and run: a pretrained one, so to say."""

    def __init__(self, kind: str = "mlp", lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kind, self.lr = kind, lr
        self.seen: list[Tensor] = []
        with torch.random.fork_rng():
            torch.manual_seed(5)
            if kind == "mlp":
                self.model: nn.Module = Mlp()
                self.head = nn.Linear(16, 1)
            else:
                from transformers import AutoConfig, AutoModelForCausalLM

                self.model = AutoModelForCausalLM.from_config(
                    AutoConfig.for_model(**(LLAMA if kind == "llama" else GPT2))
                )
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x)) if self.kind == "mlp" else self.model(input_ids=x, use_cache=False).logits

    def loss(self, batch: Any) -> Tensor:
        if self.kind == "mlp":
            return nn.functional.mse_loss(self(batch[0]), batch[1])
        logits = self(batch["input_ids"])[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.trainer.training and self.trainer.optimizers:
            self.seen.append(batch[0].clone() if self.kind == "mlp" else batch["input_ids"].clone())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0] if self.kind == "mlp" else batch["input_ids"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Samples(Dataset[Any]):
    """Samples for a kind of module, the same ones in every process."""

    def __init__(self, kind: str, size: int = 48) -> None:
        generator = torch.Generator().manual_seed(3)
        self.kind = kind
        if kind == "mlp":
            self.x = torch.randn(size, 12, generator=generator) * torch.logspace(0.5, -1, 12)
            self.y = self.x[:, :1].sin() + self.x[:, 1:2]
        else:
            self.x = torch.randint(1, 32, (size, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        if self.kind == "mlp":
            return self.x[index], self.y[index]
        return {"input_ids": self.x[index], "labels": self.x[index]}


def loader(kind: str = "mlp", size: int = 48, **settings: Any) -> DataLoader[Any]:
    return DataLoader(Samples(kind, size), **{"batch_size": 4, "shuffle": True, **settings})


def adapters(init: str, kind: str = "mlp", **settings: Any) -> Adapters:
    config = {"r": 4, "target_modules": TARGETS[kind], **settings.pop("config", {})}
    return Adapters(config, init=init, **{"init_batches": 3, **settings})


def fit(
    module: Net, *callbacks: Callback, steps: int = 10, seed: int = 1, data: Any = None, **settings: Any
) -> Trainer:
    path = settings.pop("ckpt_path", None)
    torch.manual_seed(seed)
    trainer = Trainer(max_steps=steps, callbacks=list(callbacks), **{**QUIET, **settings})
    trainer.fit(module, loader(module.kind) if data is None else data, ckpt_path=path)
    return trainer


@torch.no_grad()
def outputs(module: nn.Module, kind: str) -> Tensor:
    """Return what a module computes for a fixed batch, in eval mode, and leave it in its mode."""
    training = module.training
    module.eval()
    x = Samples(kind).x[:6]
    found = module(x) if isinstance(module, Net) or kind == "mlp" else module(input_ids=x, use_cache=False).logits
    module.train(training)
    return found


def load_all(jobs: list[dict[str, str]], folder: str) -> None:
    """Load checkpoints onto untouched bases, each in two ways, and write what the modules compute."""
    from lightning_stable.peft import load_adapters, load_from_checkpoint

    torch.set_num_threads(1)
    torch.manual_seed(12345)
    found = {}
    for job in jobs:
        torch.randn(7)  # another state of the generator for each
        plain = load_adapters(Net(job["kind"]), job["path"])
        built = load_from_checkpoint(Net, job["path"])
        found[job["path"]] = outputs(plain, job["kind"]), outputs(built, job["kind"])
    torch.save(found, Path(folder) / "found.pt")
