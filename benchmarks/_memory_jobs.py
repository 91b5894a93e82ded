"""What the two workers of ``co2_memory.py`` run: a fit of a large stack of layers that measures its own memory."""

import gc
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_stable.strategies import CO2Strategy, DiLoCoStrategy, LocalSGDStrategy, SlowMoStrategy

__all__ = ["fit"]

TAU, STEPS, MEASURED = 3, 10, 8
STRATEGIES: dict[str, Any] = {
    "DDP": lambda: DDPStrategy(process_group_backend="gloo"),
    "LocalSGD": lambda: LocalSGDStrategy(local_steps=TAU),
    "SlowMo": lambda: SlowMoStrategy(local_steps=TAU),
    "DiLoCo": lambda: DiLoCoStrategy(local_steps=TAU),
    "CO2": lambda: CO2Strategy(local_steps=TAU),
    "CO2, paper, momentum 0.5": lambda: CO2Strategy(local_steps=TAU, variant="paper", outer_momentum=0.5),
    "CO2, corrected, momentum 0.5": lambda: CO2Strategy(local_steps=TAU, variant="corrected", outer_momentum=0.5),
    "CO2, bfloat16 messages": lambda: CO2Strategy(local_steps=TAU, comm_dtype="bfloat16"),
}


class Stack(LightningModule):
    """Square linear layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output: Tensor = self.layers(batch)
        return output.square().mean()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Memory(Callback):
    """Measures the memory of this process."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == TAU:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        if trainer.global_step == MEASURED:
            trainer.optimizers[0].zero_grad()
            self.found = {"tensors": _tensor_bytes(), "resident": _status("VmRSS")}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["peak"] = _status("VmHWM")


def fit(method: str, layers: int, width: int) -> dict[str, float]:
    """Run a fit in a worker; return its bytes of each kind and those of the parameters."""
    gc.collect()  # host and module refer to each other: the fit before is still in memory
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module, memory = Stack(layers, width), Memory()
    settings = {"strategy": STRATEGIES[method](), "num_nodes": 2} if method in STRATEGIES else {"strategy": "auto"}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        callbacks=[memory],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, DataLoader(torch.randn(2 * (STEPS + 1), width), batch_size=2))  # type: ignore[arg-type] # map-style
    copy = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return {**memory.found, "copy": copy}


def _tensor_bytes() -> float:
    """Return the bytes of all storages that tensors known to Python have, each once."""
    gc.collect()
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        # isinstance would ask lazy modules for their class, and some import on it.
        if issubclass(type(each), Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))


def _status(name: str) -> float:
    """Return an entry of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))
