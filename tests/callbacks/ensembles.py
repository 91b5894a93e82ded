"""What the tests of LAE share: a quick one, and the loss of its ensemble by hand."""

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from tasks import SWITCHES
from torch import Tensor

from lightning_stable.callbacks.lae import LAE
from lightning_stable.testing.harness import QUIET, Net, Stream

SETTINGS: dict[str, Any] = {"parameters": ["body.*"], "decay": 0.6, "calibration_steps": 2, "task_steps": SWITCHES}


def quick(**settings: Any) -> LAE:
    return LAE(**{**SETTINGS, **settings})


def held_out() -> Stream:
    return Stream(2, seed=5)


def ensemble_loss(module: Net, offline: dict[str, Tensor], live: dict[str, Tensor] | None = None) -> float:
    """The loss on held-out samples by hand, with the larger probability of each class as the head's."""
    online = copy.deepcopy(module)
    online.load_state_dict({**module.state_dict(), **(live or {})})
    online.eval()
    slow = copy.deepcopy(online)
    slow.load_state_dict({**online.state_dict(), **offline})
    losses = []
    with torch.no_grad():
        for index in range(2):
            batch = held_out().batch(index)
            surest = [one.head(one.body(batch[0])).softmax(-1) for one in (online, slow)]
            logits = surest[0].maximum(surest[1]).log()
            handle = online.head.register_forward_hook(lambda *_, logits=logits: logits)
            losses.append(float(online.loss(batch)))
            handle.remove()
    return sum(losses) / 2


def plain_loss(module: Net) -> float:
    with torch.no_grad():
        return sum(float(copy.deepcopy(module).eval().loss(held_out().batch(index))) for index in range(2)) / 2


def validated(plugins: list[Any], module: LightningModule, ckpt_path: str | None = None) -> float:
    trainer = Trainer(**QUIET, devices=1, callbacks=plugins)
    return trainer.validate(module, held_out(), ckpt_path=ckpt_path, verbose=False)[0]["val_loss"]
