"""What every callback that keeps averaged weights shares: their life through fits, validation and checkpoints."""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable._glue.method_wrap import MethodWrap
from lightning_stable.callbacks._evaluate import LoggedValue, evaluate_validation
from lightning_stable.callbacks._host import refuse_company, refuse_sharded, run_first
from lightning_stable.callbacks._weights import WeightSwap, floating_buffers, named_tensors, read_weights, tied_names
from lightning_stable.functional._settings import check_choice, parse_device, parse_floating_dtype
from lightning_stable.functional.ema import init_ema

__all__ = ["AveragedWeights"]


class AveragedWeights(Callback, ABC):
    """Keep a shadow of the weights, average into it after each optimizer step, and run with it where asked.

    A subclass says how one average is taken (:meth:`_average`); its public arguments are documented there.

    Tracked are the parameters that train, and with ``buffers="average"`` the floating-point buffers; all else is the
    live module's. A parameter that begins to train later joins with its value at the start of that epoch. The shadow
    goes on over several fits of the same module and starts anew with another module.
    """

    def __init__(
        self,
        *,
        start_step: int,
        buffers: str,
        device: str | None,
        dtype: str | None,
        validate_with: str,
        finish_with: str,
    ) -> None:
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step={start_step!r} is not a number of optimizer steps from 0 on.")
        check_choice("buffers", buffers, ("copy", "average"))
        check_choice("validate_with", validate_with, ("ema", "live", "both"))
        check_choice("finish_with", finish_with, ("ema", "live"))
        self.start_step = start_step
        self.buffers = buffers
        self.device = parse_device(device)
        self.dtype = parse_floating_dtype(dtype)
        self.validate_with = validate_with
        self.finish_with = finish_with

        self._module: weakref.ref[LightningModule] | None = None
        self._parameters: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        self._shadow: dict[str, Tensor] | None = None
        self._updates = 0
        self._last_step = 0
        self._swap = WeightSwap()
        self._save_wrap: MethodWrap | None = None
        self._restored: dict[str, Any] | None = None
        self._live_values: dict[str, LoggedValue] = {}
        self._validating = False

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _average(self, shadow: list[Tensor], live: list[Tensor], names: list[str]) -> None:
        """Take one average of ``live`` into ``shadow``, in place."""

    def _due(self, previous_step: int, step: int) -> bool:
        """Tell whether an average is due after the optimizer steps from ``previous_step`` to ``step``."""
        return True

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_sharded(trainer, self, "its weights are sharded over processes")
        others = (AveragedWeights, WeightAveraging, StochasticWeightAveraging)
        refuse_company(trainer, self, others, "each would validate and finish with its own average")
        run_first(trainer, self)
        self._refuse_live_monitors(trainer)
        if self._module is None or self._module() is not pl_module:
            self.reset()
            self._module = weakref.ref(pl_module)
        self._restored = None
        self._undo_wrap()
        self._save_wrap = MethodWrap(pl_module, "on_save_checkpoint", self._save_validated_weights)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.reset()  # what an earlier fit of this object left
        state = checkpoint["callbacks"].get(self.state_key, {})
        if "live" not in state:
            return
        # The module was given the checkpoint's state_dict, which may be the average: training needs the live weights.
        present = named_tensors(pl_module)
        missing = sorted(state["live"].keys() - present.keys())
        if missing:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} averaged weights that this module does not have, the first is "
                f"{missing[0]!r} of {len(missing)}. Resume with the module that was trained."
            )
        with torch.no_grad():
            for name, value in state["live"].items():
                present[name].copy_(value)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._aliases = tied_names(pl_module)
        if self._restored is not None:
            self._take_over(self._restored, pl_module)
            self._restored = None
        elif self._shadow is not None:
            # The fit before may have ended on the average: the module holds it, and training goes on from there.
            shadow = self.averaged()
            self._swap.release()
            self._place(shadow, pl_module)
        # What the shadow holds stays tracked, even if it no longer trains.
        held = self._shadow or {}
        self._parameters = {name: value for name, value in pl_module.named_parameters() if name in held}
        self._track(pl_module)
        if self._shadow is None and trainer.global_step >= self.start_step:
            self._begin(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            # After every hook that unfreezes at the start of an epoch, before its first update.
            self._track(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, previous = trainer.global_step, self._last_step
        if step == previous:
            return
        self._last_step = step
        if step < self.start_step:
            return
        if self._shadow is None:
            self._begin(pl_module)
        elif self._due(previous, step):
            names, live = self._live(pl_module)
            self._average(list(self._shadow.values()), live, names)
            self._updates += 1

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or self._shadow is None or self.validate_with == "live":
            return
        if self._swap.active:
            # A sanity check before a further fit: the module is on the average that the last one ended with.
            return
        if self.validate_with == "both":
            self._live_values = evaluate_validation(trainer, pl_module)
        _, live = self._live(pl_module)
        self._swap.swap_in(live, list(self._shadow.values()))
        self._validating = True

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, logged in self._live_values.items():
            base, mark, index = name.partition("/dataloader_idx_")
            pl_module.log(
                f"{base}_live{mark}{index}",
                logged.value,
                batch_size=logged.weight,
                reduce_fx=logged.reduce_fx,
                sync_dist=logged.sync_dist,
                add_dataloader_idx=False,  # the name has it
            )
        self._live_values = {}

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_validation()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._shadow is None:
            rank_zero_warn(
                f"{type(self).__name__}(start_step={self.start_step}) never began: training ended at optimizer step "
                f"{trainer.global_step}. The module keeps its live weights. Set start_step lower to get an average."
            )
        elif self.finish_with == "ema":
            _, live = self._live(pl_module)
            self._swap.swap_in(live, list(self._shadow.values()))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._live_values = {}
        self._end_validation()
        self._undo_wrap()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Beside the wrap, for checkpoints that other callbacks save after an exception has taken the wrap off.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.state.finished:
            self._write_validated_weights(checkpoint)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo_wrap()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._shadow is None:
            return {"updates": 0}
        module = self._module() if self._module is not None else None
        live: list[Tensor] = []
        if self._swap.active:
            live = self._swap.live_values()
        elif module is not None:
            live = self._live(module)[1]
        return {
            "updates": self._updates,
            "shadow": self.averaged(),
            "live": {name: value.detach() for name, value in zip(self._shadow, live, strict=True)},
            "aliases": dict(self._aliases),
        }

    # ------------------------------------------------------------------ for users

    @staticmethod
    def load_weights(
        path: str | os.PathLike[str], which: str = "ema", into: nn.Module | None = None, prefix: str = ""
    ) -> dict[str, Tensor]:
        """Read the averaged or the live weights from a checkpoint, without a Trainer.

        Args:
            path: A full checkpoint that was saved with EMA or BalancedEMA in the Trainer.
            which: ``"ema"`` or ``"live"``.
            into: A plain module to load them into, strictly.
            prefix: Take only the names that begin with it, without it: ``"model."`` for the submodule ``model``.

        Returns:
            The weights by name, on the CPU.

        Raises:
            ValueError: If ``which`` is unknown, the checkpoint holds no average, or no name begins with ``prefix``.
        """
        return read_weights(path, which, into, prefix)

    @property
    def updates(self) -> int:
        """Averages taken so far."""
        return self._updates

    def averaged(self) -> dict[str, Tensor]:
        """Return the averaged values by name, wherever they are at present; none before the average began."""
        shadow = self._shadow or {}
        return dict(zip(shadow, self._swap.other_values(), strict=True)) if self._swap.active else dict(shadow)

    def reset(self) -> None:
        """Forget the average: the next fit starts a new one from the module's weights then."""
        self._swap.release()
        self._shadow = None
        self._updates = 0
        self._parameters = {}

    # ------------------------------------------------------------------ for strategies whose workers differ

    def worker_tensors(self) -> list[Tensor]:
        """Return the average, which is that of the mean weights once it is itself averaged over workers."""
        return list((self._shadow or {}).values())

    @property
    def holds_live_weights(self) -> bool:
        """Whether the module runs with the average, and the live weights are kept here."""
        return self._swap.active

    # ------------------------------------------------------------------ helpers

    def _live(self, pl_module: LightningModule) -> tuple[list[str], list[Tensor]]:
        """Return the names and the live tensors that are tracked, in the order of the shadow."""
        tracked = self._parameters
        if self.buffers == "average":
            # Looked up each time: modules may replace a buffer by another tensor.
            tracked = {**tracked, **floating_buffers(pl_module)}
        names = list(tracked if self._shadow is None else self._shadow)
        return names, [tracked[name] for name in names]

    def _track(self, pl_module: LightningModule) -> None:
        """Add the parameters that have begun to train."""
        new = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point() and name not in self._parameters
        }
        self._parameters |= new
        if self._shadow is not None:
            fresh = {name: parameter for name, parameter in new.items() if name not in self._shadow}
            self._shadow |= dict(
                zip(fresh, init_ema(list(fresh.values()), self.device, self.dtype).shadow, strict=True)
            )

    def _begin(self, pl_module: LightningModule) -> None:
        """Start the average at the present weights."""
        names, live = self._live(pl_module)
        if not names:
            raise ValueError(
                f"{type(self).__name__} found no parameter of {type(pl_module).__name__} that trains "
                "(requires_grad is False for all of them), so there is nothing to average."
            )
        self._shadow = dict(zip(names, init_ema(live, self.device, self.dtype).shadow, strict=True))
        self._updates = 0

    def _take_over(self, state: dict[str, Any], pl_module: LightningModule) -> None:
        """Go on with the average of a checkpoint."""
        self._updates = state["updates"]
        if "shadow" not in state:
            rank_zero_info(f"{type(self).__name__}: the checkpoint was saved before the average began.")
            return
        self._place(state["shadow"], pl_module)

    def _place(self, shadow: dict[str, Tensor], pl_module: LightningModule) -> None:
        """Continue an average with the parameters as they are now, on this run's device and in its precision."""
        present = named_tensors(pl_module)
        kept = {n: v for n, v in shadow.items() if n in present and present[n].shape == v.shape}
        if len(kept) != len(shadow):
            names = ", ".join(sorted(shadow.keys() - kept.keys()))
            rank_zero_info(f"{type(self).__name__}: averages begin anew for what was replaced since: {names}")
        self._shadow = {
            name: value.detach().to(
                device=self.device or present[name].device, dtype=self.dtype or present[name].dtype, copy=True
            )
            for name, value in kept.items()
        }

    def _save_validated_weights(self, original: Callable[..., None], checkpoint: dict[str, Any]) -> None:
        """Stand in for the module's ``on_save_checkpoint``, which the host calls for weights-only checkpoints too."""
        self._write_validated_weights(checkpoint)
        original(checkpoint)

    def _write_validated_weights(self, checkpoint: dict[str, Any]) -> None:
        """Let a checkpoint's ``state_dict`` be the weights that validation measures, whoever saves it."""
        if self._shadow is None or (self.validate_with == "live" and not self._swap.active):
            return
        validated = self.averaged()
        if self.validate_with == "live":
            validated = dict(zip(self._shadow, self._swap.live_values(), strict=True))
        weights = checkpoint["state_dict"]
        for alias, name in self._aliases.items():
            if alias in weights and name in validated:
                weights[alias] = validated[name].detach().to(weights[alias].dtype)

    def _end_validation(self) -> None:
        """Give the module its live weights back after a validation, and leave those that a fit ended with."""
        if self._validating:
            self._swap.swap_out()
            self._validating = False

    def _refuse_live_monitors(self, trainer: Trainer) -> None:
        """Raise if a checkpoint would be chosen by the live weights and hold the average."""
        for callback in trainer.checkpoint_callbacks:
            monitor = getattr(callback, "monitor", None) or ""
            if self.validate_with == "both" and monitor.partition("/")[0].endswith("_live"):
                raise ValueError(
                    f"{type(callback).__name__}(monitor={monitor!r}) would choose by the live weights and save the "
                    f"average. Monitor {monitor.replace('_live', '', 1)!r}, or set {type(self).__name__}"
                    "(validate_with='live')."
                )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only means something in this process."""
        return {**vars(self), "_module": None, "_save_wrap": None}

    def _undo_wrap(self) -> None:
        """Take the wrap off the module."""
        if self._save_wrap is not None:
            self._save_wrap.undo()
            self._save_wrap = None
