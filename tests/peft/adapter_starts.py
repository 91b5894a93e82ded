"""How adapters stand when training begins."""

from typing import Any

import torch
from adapter_runs import Net, adapters, fit, outputs
from lightning.pytorch import Callback, LightningModule, Trainer


class AtStart(Callback):
    """Keeps what the module is when training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outputs = outputs(pl_module, pl_module.kind)
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.train = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
        self.numbers = torch.get_rng_state()


def started(init: str, kind: str = "mlp", module: Net | None = None, **settings: Any) -> tuple[Net, AtStart]:
    """Return a module with its adapters as they start, and what was seen of it then."""
    module, start = module or Net(kind), AtStart()
    fit(module, adapters(init, kind, **settings), start, steps=1)
    return module, start
