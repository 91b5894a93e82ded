"""Adapt the module of a run that begins: checks, data, injection and start, in the order in which they have to come."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_stable.peft._beside import marks_beside
from lightning_stable.peft._checkpoint import fingerprints
from lightning_stable.peft._config import DATA_INITS, SHIFTING_INITS, plain_config
from lightning_stable.peft._data_pass import DataPass, Loss, PassReport
from lightning_stable.peft._initialise import Start, eva_config, gather, hold_bases, start_layers
from lightning_stable.peft._inject import ADAPTER, inject, let_inputs_need_gradients, matching, take_out, trained_names
from lightning_stable.peft._options import residual_format
from lightning_stable.peft._quantized import check_quantizable
from lightning_stable.peft._ranks import Ranks
from lightning_stable.peft._record import Record, keep
from lightning_stable.peft._targets import Target, check_names, check_targets, find_model, find_targets

__all__ = ["Wish", "adapt", "convert_first", "keeps_half"]


@dataclass(frozen=True)
class Wish:
    """What the user asks for; the arguments are those of :class:`~lightning_stable.peft.adapters.Adapters`."""

    owner: str
    config: Any
    init: str
    model: str | None
    trainable: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batches: int = 8
    evaluate: bool = True
    loss: Loss | None = None

    def record(self) -> Record:
        """Return what the adapters asked for are told from others by."""
        asked = plain_config(self.config)
        trainable, residual = list(self.trainable), residual_format(self.options)
        return Record(init=self.init, config=asked, asked=asked, trainable=trainable, residual=residual)


def keeps_half(trainer: Trainer) -> bool:
    """Tell whether the whole module gets the precision of the run, so that adapters in float32 would not stay so."""
    return isinstance(trainer.precision_plugin, (HalfPrecision, DoublePrecision))


def convert_first(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give the module the precision of the run, where the host casts the whole of it later, too.

    So factors are rounded before the base is shifted by them, not after.
    """
    if keeps_half(trainer):
        trainer.precision_plugin.convert_module(pl_module)


def adapt(wish: Wish, trainer: Trainer, pl_module: LightningModule) -> None:
    """Put adapters into the module, started as asked, and freeze the rest.

    Raises:
        ValueError: If that cannot be done right; nothing but the precision and the device is changed then.
    """
    owner, ranks = wish.owner, Ranks(trainer)
    convert_first(trainer, pl_module)
    config, record = copy.deepcopy(wish.config), wish.record()
    model = find_model(owner, pl_module, wish.model)
    check_names(owner, pl_module, wish.model, config)
    targets = find_targets(owner, model, config)
    check_targets(owner, pl_module, model, targets, wish.init)
    kept = matching(owner, pl_module, wish.trainable)
    if record.residual:
        check_quantizable(owner, record.residual, targets, config, kept)
    _warn_of_dropout(wish, targets)
    trainer.strategy.model_to_device()
    let_inputs_need_gradients(model)
    if wish.init in DATA_INITS:
        ranks.same(pl_module)
    record.base = fingerprints(targets)
    norm = _norm(targets) if record.residual else 0.0
    start, report = Start({}, {}, {}), None
    if wish.init in DATA_INITS:
        start, report = _from_data(wish, trainer, pl_module, model, targets, config)
    if wish.init == "eva":
        eva_config(config, model, targets, start.ranks)
        record.base = {name: mark for name, mark in record.base.items() if start.ranks[name]}
    record.rest = marks_beside(pl_module, targets)
    record.flags = {name: each.requires_grad for name, each in pl_module.named_parameters(remove_duplicate=False)}
    try:
        layers = inject(pl_module, model, config, trainable=kept, seed=wish.seed, upcast=not keeps_half(trainer))
        record.shift = start_layers(wish.init, layers, start, wish.seed, wish.options, ranks)
    except Exception:
        # All factors are there before the first base is shifted, so plain layers are the untouched ones.
        take_out(pl_module, model, record.flags)
        raise
    record.scaling = {
        name: float(layer.scaling[ADAPTER])
        for name, layer in layers.items()
        if ADAPTER in getattr(layer, "scaling", {})
    }
    record.config = plain_config(config)
    record.trained = trained_names(pl_module)
    text = _told(wish, pl_module, layers, report)
    if record.residual:
        record.held, lost = hold_bases(layers, record.residual, ranks)
        text += (
            f" Bases are held in {record.residual} now, 4.5 bits a weight: at the start the adapted weights are off by "
            f"{lost / norm:.2%} of their norm."
        )
    keep(model, record)
    rank_zero_info(f"{owner}: {text}")


def _from_data(
    wish: Wish,
    trainer: Trainer,
    pl_module: LightningModule,
    model: nn.Module,
    targets: dict[str, Target],
    config: Any,
) -> tuple[Start, PassReport]:
    data = DataPass(wish.owner, trainer, pl_module, batches=wish.batches, evaluate=wish.evaluate, loss=wish.loss)
    start = gather(wish.init, data, model, targets, config, wish.seed, wish.options)
    return start, data.report


def _norm(targets: dict[str, Target]) -> float:
    """Return the norm of all weights together."""
    weights = [cast(Tensor, target.layer.weight).detach() for target in targets.values()]
    return math.hypot(*(float(torch.linalg.vector_norm(weight.float())) for weight in weights))


def _warn_of_dropout(wish: Wish, targets: dict[str, Target]) -> None:
    dropout = max(target.dropout for target in targets.values())
    if dropout > 0 and wish.init in SHIFTING_INITS:
        rank_zero_warn(
            f"{wish.owner}: lora_dropout={dropout} with init={wish.init!r}, whose adapters hold a part of the weights "
            "from the start: in train mode dropout takes from that part, and the module computes what it did on "
            "average only. Set lora_dropout to 0, unless that is meant."
        )


def _told(wish: Wish, pl_module: LightningModule, layers: dict[str, Any], report: PassReport | None) -> str:
    """Say in one line what was adapted, how much trains, and what the pass over data took."""
    found = sorted(
        {rank for layer in layers.values() for rank in getattr(layer, "r", {}).values() if isinstance(rank, int)}
    )
    ranks = f" of rank {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''}" if found else ""
    total = sum(parameter.numel() for parameter in pl_module.parameters())
    train = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
    count = "1 layer has" if len(layers) == 1 else f"{len(layers)} layers have"
    text = f"{count} adapters{ranks}, started by {wish.init!r}. "
    text += f"{train:,} of {total:,} parameters train ({train / total:.2%})."
    if report is not None:
        mib = report.peak_bytes / 2**20
        text += (
            f" {report.batches} batches in {report.seconds:.1f} s, which raised the peak of memory by {mib:,.0f} MiB."
        )
    return text
