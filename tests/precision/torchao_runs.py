"""What the tests of the precision plugins on torchao train, in one process and in two."""

import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stable.precision._torchao import TorchaoPrecision
from lightning_stable.precision.float8 import Float8Precision
from lightning_stable.precision.int8 import Int8Precision
from lightning_stable.testing.harness import QUIET
from lightning_stable.testing.workers import processes

STEPS = 24
PLUGINS: dict[str, Callable[..., TorchaoPrecision]] = {"float8": Float8Precision, "int8": Int8Precision}
# The kinds of layer that torchao makes.
LOW = {"float8": "Float8Linear", "int8": "Int8MixedPrecisionTrainingLinear"}


class Mlp(LightningModule):
    """A regressor of widths that kernels take, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU())
        self.head = nn.Linear(32, 1)
        self.losses: list[float] = []
        self.kinds: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.kinds.append(type(self.net[0]).__name__)
        loss = nn.functional.mse_loss(self(batch[0]).float(), batch[1].float())
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.kinds.append(f"validated {type(self.net[0]).__name__}")
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class ShardedMlp(Mlp):
    """Shards its blocks and one single layer by FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self.net, "_get_fsdp_state"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            fully_shard(self, mesh=mesh)


def batches(rank: int = 0, world: int = 1) -> DataLoader:
    """Return the same batches of 16 samples each time, or a process's share of each."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16 * STEPS, 16, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + x[:, :1]
    return DataLoader(TensorDataset(x[rank::world], y[rank::world]), batch_size=16 // world)


def trainer_of(plugin: Any, **settings: Any) -> Trainer:
    defaults = {**QUIET, "max_steps": STEPS, "num_sanity_val_steps": 0, "plugins": [plugin] if plugin else None}
    return Trainer(**{**defaults, **settings})


def train(plugin: Any, module: Mlp | None = None, **settings: Any) -> Mlp:
    module = Mlp() if module is None else module
    trainer_of(plugin, **settings).fit(module, batches())
    return module


class ByHand(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def by_hand(convert: Callable[[nn.Module], Any], steps: int = STEPS) -> ByHand:
    """Train in a plain loop a module that torchao has converted."""
    module = Mlp()
    # As the plugin's default filter: all but the head.
    convert(module.net)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for (x, y), _ in zip(batches(), range(steps), strict=False):
        loss = nn.functional.mse_loss(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return ByHand(losses, copy.deepcopy(module.state_dict()))


def ddp_job(name: str, **settings: Any) -> dict[str, Any]:
    """Run in each of two processes: train under DDP."""
    os.chdir(tempfile.mkdtemp())
    module = Mlp()
    trainer = trainer_of(PLUGINS[name](**settings), max_steps=6, strategy="ddp", devices=processes())
    trainer.fit(module, batches(int(os.environ["RANK"]), processes()))
    kinds = [type(layer).__name__ for layer in module.modules() if isinstance(layer, nn.Linear)]
    return {"losses": module.losses, "weights": module.state_dict(), "during": module.kinds, "after": kinds}


def fsdp_job(name: str, path: str, **settings: Any) -> dict[str, Any]:
    """Run in each of two processes: train with FSDP2, save, and go on from there with new objects."""
    os.chdir(tempfile.mkdtemp())

    def fit(steps: int, ckpt_path: str | None = None) -> tuple[Mlp, Trainer]:
        module = ShardedMlp()
        sizes = {"data_parallel_size": processes(), "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=False)
        trainer = trainer_of(PLUGINS[name](**settings), max_steps=steps, strategy=strategy, devices=processes())
        trainer.fit(module, batches(int(os.environ["RANK"]), processes()), ckpt_path=ckpt_path)
        return module, trainer

    module, trainer = fit(6)
    trainer.save_checkpoint(path)
    kinds = [type(layer).__name__ for layer in module.modules() if isinstance(layer, nn.Linear)]
    return {"losses": module.losses, "during": module.kinds, "after": kinds, "resumed": fit(8, path)[0].kinds}
