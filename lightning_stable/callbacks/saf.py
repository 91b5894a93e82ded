r"""SAF: sharpness-aware training for free, for any classifier whose dataset has indices.

Use it as SAM's cheap relative when each sample comes back unchanged epoch after epoch: it keeps the predictions of a
sample near those of some epochs before. On streams and under strong random augmentation use MESA or SAM. Cost: nearly
none in time; main memory for the records of ``lag_epochs`` epochs, in each process, which is in the checkpoint too.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import SAF
    >>> trainer = Trainer(callbacks=[SAF(start_epoch=5, lag_epochs=3)], logger=False, enable_checkpointing=False)
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_stable.callbacks._closure import repeated_batch
from lightning_stable.callbacks._loss import LossTerm
from lightning_stable.callbacks._records import PastRecords, RecordTable, available_memory
from lightning_stable.callbacks._sample_ids import SampleIds
from lightning_stable.functional._settings import check_count, parse_floating_dtype
from lightning_stable.functional.trajectory_loss import soften, softened_divergence

__all__ = ["SAF"]

_INSTEAD = "MESA needs no records and works on any stream."


class SAF(LossTerm):
    r"""Add the trajectory loss between each sample's predictions some epochs ago and now (arXiv 2205.14083).

    .. math:: L \leftarrow L + \lambda\,\tau^2\,\frac1B \sum_i
        \mathrm{KL}\bigl(\mathrm{softmax}(z_i^{(e-\tilde E)}/\tau) \,\|\, \mathrm{softmax}(z_i^{(e)}/\tau)\bigr)

    with :math:`e` the epoch and :math:`B` the batch size. A sample without a record of that epoch counts as 0. Records
    are keyed by the index that the train loader's sampler drew, gathered over processes at each step, so a sample finds
    its record whichever process sees it next, and saved in the checkpoint.

    Args:
        logits: Dotted name of the submodule whose output are the logits, of shape (batch, ..., classes), or an object
            that holds them as ``.logits``. ``None``: the last ``nn.Linear`` whose output feeds the loss.
        lam: Weight :math:`\lambda` of the term; 0 switches the callback off.
        temperature: :math:`\tau`.
        start_epoch: First epoch with the term, counted from 0.
        lag_epochs: :math:`\tilde E`, how many epochs lie between the record and now.
        store_dtype: What the softened log-probabilities are stored in.
        top_k: Store this many classes of each prediction, and all others as one; ``None`` stores all.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for manual optimisation, a sharded
            strategy, an unknown submodule, or a train loader without lasting indices; in the first step if no head is
            found or the records would not fit into memory; in training if samples repeat within an epoch.
    """

    log_name = "saf"

    def __init__(
        self,
        logits: str | None = None,
        lam: float = 0.3,
        temperature: float = 5.0,
        start_epoch: int = 5,
        lag_epochs: int = 3,
        store_dtype: str = "float16",
        top_k: int | None = None,
    ) -> None:
        super().__init__(logits=logits, lam=lam, temperature=temperature, start_epoch=start_epoch)
        check_count("lag_epochs", lag_epochs, 1, "epochs")
        if lag_epochs > start_epoch:
            raise ValueError(
                f"start_epoch={start_epoch} is less than lag_epochs={lag_epochs}: the term compares with a record of "
                "lag_epochs epochs before. Set start_epoch to lag_epochs or more, or lower lag_epochs."
            )
        if top_k is not None:
            check_count("top_k", top_k, 1, "classes")
        self.lag_epochs = lag_epochs
        self.store_dtype = parse_floating_dtype(store_dtype) or torch.float16
        self.top_k = top_k
        self._ids = SampleIds("SAF", _INSTEAD)
        self._module: weakref.ref[LightningModule] | None = None
        self._table: RecordTable | None = None
        self._restored: dict[str, Any] | None = None
        self._fresh: tuple[list[int], Tensor] | None = None
        self._repeats = 0
        self._tolerant_epoch = -1

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._restored = None
        if stage == "fit" and (self._module is None or self._module() is not pl_module):
            self._table = None
            self._module = weakref.ref(pl_module)
        if stage == "fit" and self.lam != 0:
            # As early as this: a module may ask for the loaders when it configures its optimizers.
            self._ids.attach(trainer)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._table = None  # what an earlier fit of this object left

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.lam == 0:
            return
        self._ids.check(trainer)
        super().on_train_start(trainer, pl_module)
        self._fresh = None
        if self._restored is not None:
            self._table = self._take_over(self._restored)
        elif trainer.current_epoch == 0 or (self._table and self._table.epochs.shape[1] != self._ids.samples):
            self._table = None
        self._restored = None
        # A loader that cannot resume in the middle of an epoch begins it again, which repeats samples.
        begun = self._table is not None and bool((self._table.epochs == trainer.current_epoch).any())
        self._tolerant_epoch = trainer.current_epoch if begun else -1

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._repeats = 0
        self._ids.next_epoch()
        recorded = self._ids.samples if self._table is None else self._table.epochs.shape[1]
        if recorded != self._ids.samples:
            raise ValueError(
                f"SAF: the train loader of epoch {trainer.current_epoch} has {self._ids.samples} samples, and the "
                f"records are of {recorded}. The dataset has to stay the same in a fit. {_INSTEAD}"
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.lam != 0:
            self._ids.next_batch(batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._fresh is None or self._table is None:
            return
        ids, log_probs = self._fresh
        self._fresh = None
        if trainer.world_size > 1:
            everyones = gather_all_tensors(torch.tensor(ids, device=log_probs.device))
            ids = torch.cat(everyones).tolist()
            log_probs = torch.cat(gather_all_tensors(log_probs.contiguous()))
        self._repeats += self._table.put(trainer.current_epoch, ids, log_probs.cpu())
        # The host's distributed sampler fills the last places of an epoch up with samples from its beginning.
        if self._repeats > trainer.world_size - 1 and trainer.current_epoch != self._tolerant_epoch:
            raise ValueError(
                f"SAF: {self._repeats} samples of epoch {trainer.current_epoch} came more than once, so their records "
                f"are not of one epoch. The sampler has to draw each index at most once an epoch. {_INSTEAD}"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._ids.undo()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._ids.undo()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._table is None else {**self._table.state_dict(), "temperature": float(self.temperature)}

    # ------------------------------------------------------------------ the term

    @override
    def _prepare(self, trainer: Trainer, pl_module: LightningModule, step: Callable[[], Any]) -> PastRecords | None:
        # Read before this epoch's own record takes the place.
        if trainer.current_epoch < self.start_epoch or self._table is None:
            return None
        return self._table.get(trainer.current_epoch - self.lag_epochs, self._ids.current, pl_module.device)

    @override
    def _term(self, trainer: Trainer, pl_module: LightningModule, logits: Tensor, prepared: Any) -> Tensor | None:
        log_probs = soften(logits, self.temperature)
        if repeated_batch(pl_module) is None:
            self._check(trainer, logits)
            if trainer.current_epoch >= self.start_epoch - self.lag_epochs:
                self._fresh = (self._ids.current, log_probs.detach())
        if prepared is None:
            return None
        divergence = softened_divergence(prepared.log_probs, prepared.regroup(log_probs))
        return self.temperature**2 * torch.where(prepared.present, divergence, 0).mean()

    def _check(self, trainer: Trainer, logits: Tensor) -> None:
        """Make the table if there is none, and raise ``ValueError`` if these logits do not fit it."""
        ids, shape = self._ids.current, tuple(logits.shape[1:])
        if len(ids) != len(logits):
            raise ValueError(
                f"SAF: {self._tap.name!r} put out {len(logits)} predictions for a batch of {len(ids)} samples, so they "
                "cannot be told apart. Name the submodule with one prediction for each sample with the argument logits."
            )
        if self._table is None:
            self._table = self._make_table(trainer, shape)
        if self._table.shape != shape:
            raise ValueError(
                f"SAF: the logits of a sample have the shape {shape}, and the records were made with "
                f"{self._table.shape}. Samples of one shape are needed, and a resumed run needs the same head. "
                f"{_INSTEAD}"
            )

    def _make_table(self, trainer: Trainer, shape: tuple[int, ...]) -> RecordTable:
        """Make room for the records, and say how much it is.

        Raises:
            ValueError: If there are no more classes than ``top_k``, or the memory is not there.
        """
        if self.top_k is not None and self.top_k >= shape[-1]:
            raise ValueError(
                f"top_k={self.top_k} is not less than the {shape[-1]} classes of {self._tap.name!r}. Set it to None to "
                "store all classes."
            )
        settings = (self.lag_epochs, self._ids.samples, shape, self.store_dtype, self.top_k)
        needed, free = RecordTable.bytes_needed(*settings), available_memory()
        each = f"{self._ids.samples} samples, {self.lag_epochs} epochs, shape {shape}, {self.store_dtype}"
        if free is not None and needed * trainer.num_devices > free:
            raise ValueError(
                f"SAF's records need {needed / 2**20:.1f} MiB of main memory in each of {trainer.num_devices} "
                f"process(es) ({each}), and {free / 2**20:.1f} MiB are free. Lower lag_epochs, set top_k, such as "
                f"top_k=10, or choose a smaller store_dtype. {_INSTEAD}"
            )
        rank_zero_info(f"SAF: the records take {needed / 2**20:.1f} MiB of main memory in each process ({each}).")
        return RecordTable(*settings)

    def _take_over(self, state: dict[str, Any]) -> RecordTable:
        """Go on with the records of a checkpoint.

        Raises:
            ValueError: If they are of another dataset or of other settings.
        """
        table = RecordTable.from_state_dict(state)
        pairs = {
            "samples": (table.epochs.shape[1], self._ids.samples),
            "lag_epochs": (table.slots, self.lag_epochs),
            "temperature": (state["temperature"], self.temperature),
            "store_dtype": (table.log_probs.dtype, self.store_dtype),
            "top_k": (table.top_k, self.top_k),
        }
        other = [f"{name}={then} ({now} here)" for name, (then, now) in pairs.items() if then != now]
        if other:
            raise ValueError(
                f"The checkpoint's SAF made its records with {', '.join(other)}. Resume with the same data and "
                "settings."
            )
        return table

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**super().__getstate__(), "_module": None, "_ids": SampleIds("SAF", _INSTEAD)}
