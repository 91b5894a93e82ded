"""Run the validation of a module inside training, once more, and keep what it logs to oneself."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_stable._glue.batches import eval_mode, fresh_loaders, to_device
from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable._glue.progress import progress

__all__ = ["LoggedValue", "evaluate_validation"]


class LoggedValue(NamedTuple):
    """What a module logged under one name over a pass.

    Attributes:
        value: The reduced value, a scalar.
        weight: The number of samples it stands for on this process.
        reduce_fx: How the module asked to reduce it: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``.
        sync_dist: Whether the module asked to reduce it over processes.
    """

    value: Tensor
    weight: int
    reduce_fx: str
    sync_dist: bool


def evaluate_validation(trainer: Trainer, pl_module: LightningModule) -> dict[str, LoggedValue]:
    """Validate ``pl_module`` as it is now, and return what it logged instead of logging it.

    Runs the module's own ``validation_step`` and validation hooks over the Trainer's validation dataloaders, without
    gradients, in eval mode, under the run's precision. Random state, train flags and the torchmetrics that the module
    logs are afterwards as they were before a pass. Other callbacks' hooks do not run.

    Args:
        trainer: A Trainer in the middle of a fit.
        pl_module: Its module.

    Returns:
        The logged values by name; with several dataloaders, with the host's ``/dataloader_idx_N`` suffix.
    """
    loaders = _fresh_loaders(trainer)
    several = len(loaders.flattened) > 1 and loaders._mode == "sequential"
    recorder = _Recorder(several)
    wrap = MethodWrap(pl_module, "log", recorder.log)
    try:
        with torch.no_grad(), isolate_rng(), eval_mode(pl_module):
            pl_module.on_validation_start()
            pl_module.on_validation_epoch_start()
            for batch, batch_idx, dataloader_idx in _shown(trainer, loaders):
                moved = to_device(trainer, pl_module, batch, dataloader_idx)
                recorder.position(moved, dataloader_idx)
                _step(trainer, pl_module, moved, batch_idx, dataloader_idx if several else None)
            recorder.position(None, None)
            pl_module.on_validation_epoch_end()
            found = recorder.results()
            pl_module.on_validation_end()
            return found
    finally:
        recorder.reset_metrics()
        wrap.undo()
        # What the module prepares for a validation, it has prepared again for the host's own.
        pl_module.on_validation_start()


class _Recorder:
    """Stands in for ``LightningModule.log`` during a pass."""

    def __init__(self, several: bool) -> None:
        self._several = several
        self._values: dict[str, list[tuple[Tensor, int]]] = {}
        self._metrics: dict[str, Metric] = {}
        self._asked: dict[str, tuple[str, bool]] = {}
        self._batch: Any = None
        self._dataloader_idx: int | None = None

    def position(self, batch: Any, dataloader_idx: int | None) -> None:
        self._batch, self._dataloader_idx = batch, dataloader_idx

    def log(self, _original: Callable[..., None], name: str, value: Any, *_args: Any, **kwargs: Any) -> None:
        if self._several and self._dataloader_idx is not None and kwargs.get("add_dataloader_idx", True):
            name = f"{name}/dataloader_idx_{self._dataloader_idx}"
        reduce_fx = kwargs.get("reduce_fx", "mean")
        self._asked[name] = (getattr(reduce_fx, "__name__", str(reduce_fx)), bool(kwargs.get("sync_dist", False)))
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        scalar = torch.as_tensor(value).detach().float()
        self._values.setdefault(name, []).append((scalar, kwargs.get("batch_size") or self._batch_size()))

    def results(self) -> dict[str, LoggedValue]:
        found = {name: self._reduced(name, pairs) for name, pairs in self._values.items()}
        for name, metric in self._metrics.items():
            # torchmetrics has reduced over processes here: the mean of equal values is safe, and the host asks for one.
            found[name] = LoggedValue(metric.compute().detach(), 1, "mean", True)
        return found

    def reset_metrics(self) -> None:
        for metric in self._metrics.values():
            metric.reset()

    def _reduced(self, name: str, pairs: list[tuple[Tensor, int]]) -> LoggedValue:
        reduce_fx, sync_dist = self._asked[name]
        values = torch.stack([value for value, _ in pairs])
        weights = torch.tensor([weight for _, weight in pairs], device=values.device)
        reduced = {
            "sum": lambda: values.sum(),
            "min": lambda: values.min(),
            "max": lambda: values.max(),
        }.get(reduce_fx, lambda: (values * weights).sum() / weights.sum())()
        return LoggedValue(reduced, int(weights.sum()), reduce_fx, sync_dist)

    def _batch_size(self) -> int:
        return 1 if self._batch is None else int(extract_batch_size(self._batch))


def _fresh_loaders(trainer: Trainer) -> CombinedLoader:
    """Return the Trainer's validation loaders with iterators of their own; the host's are in its private loop."""
    loaders = fresh_loaders(cast(Any, trainer).fit_loop.epoch_loop.val_loop._combined_loader)
    loaders.limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    return loaders


def _shown(trainer: Trainer, loaders: CombinedLoader) -> Iterator[Any]:
    """Iterate over the loaders, and show it."""
    return progress(trainer, iter(loaders), "Validation of the other weights", sum(loaders.limits or [math.inf]))


def _step(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
    """Run the module's validation step and its batch hooks, with the arguments that the host gives them."""
    position = (batch_idx,) if dataloader_idx is None else (batch_idx, dataloader_idx)
    takes_index = is_param_in_hook_signature(pl_module.validation_step, "batch_idx", min_args=2)
    pl_module.on_validation_batch_start(batch, *position)
    output = trainer.strategy.validation_step(batch, *(position if takes_index else position[1:]))
    pl_module.on_validation_batch_end(output, batch, *position)
