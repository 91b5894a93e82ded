"""What PrecisionFallback watches: the loss, saturated operands and logged values, read without waiting for the device.

What a step measured stays on the device until the next step has been handed to it. All values of a step make one small
tensor, so that processes need one exchange; whether a logged value is new is part of it, since it need not be new on
all of them.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_stable._glue.quiet import is_quiet
from lightning_stable.callbacks._host import gradient_scaler
from lightning_stable.callbacks._worker_state import trains_apart
from lightning_stable.functional._simulated_layers import Quantized
from lightning_stable.functional.numerics_monitor import OPERANDS, can_saturate
from lightning_stable.functional.precision_fallback import saturated_share
from lightning_stable.functional.simulated import LayerQuantization

__all__ = ["LOSS", "SATURATION", "Signals"]

LOSS, SATURATION = "loss", "saturation"


class Signals:
    """The signals of one run.

    Args:
        names: :data:`LOSS`, :data:`SATURATION`, and names of logged values.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.logged = [name for name in names if name not in (LOSS, SATURATION)]
        self._missing = set(self.logged)
        self._pending: Tensor | None = None
        self._last: Tensor | None = None
        self._loss: Tensor | None = None
        self._shares: list[Tensor] = []
        self._module: LightningModule | None = None
        self._watched: list[tuple[LayerQuantization, Callable[..., None]]] = []
        self._in_batch = False

    # ------------------------------------------------------------------ watching

    def watch(self, pl_module: LightningModule, layers: Mapping[str, LayerQuantization]) -> None:
        """Look at the operands of these layers, if saturation is a signal.

        Raises:
            ValueError: If none of them can saturate.
        """
        if SATURATION not in self.names:
            return
        quantizers = [getattr(layer, operand) for layer in layers.values() for operand in OPERANDS]
        if not any(each is not None and can_saturate(each) for each in quantizers):
            raise ValueError(
                f"PrecisionFallback(monitor={self.names}): saturation would always be 0, since every operand that the "
                f"{len(layers)} watched layers quantize has a scale that is fitted to its largest entry. Watch 'loss' "
                "or a logged value."
            )
        self._module = pl_module
        for name, layer in layers.items():
            observer = partial(self._observe, cast(Quantized, pl_module.get_submodule(name)))
            layer.observers.append(observer)
            self._watched.append((layer, observer))

    def unwatch(self) -> None:
        """Look no more, and forget the step that was not finished."""
        for layer, own in self._watched:
            layer.observers = [observer for observer in layer.observers if observer is not own]
        self._watched, self._module, self._in_batch = [], None, False
        self.forget()

    def forget(self) -> None:
        """Forget what was measured of a step that is not over."""
        self._loss, self._shares = None, []

    def begin_batch(self) -> None:
        """Count the passes from here on."""
        self._in_batch = True

    def end_batch(self) -> None:
        """Count no passes until the next batch."""
        self._in_batch = False

    def add_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """Count a backward pass."""
        if LOSS in self.names:
            value = loss.detach().float().mean()
            scaler = gradient_scaler(trainer)
            value = value if scaler is None else value / scaler.get_scale()
            self._loss = value if self._loss is None else self._loss + value

    def _observe(self, part: Quantized, _: str, operand: str, exact: Tensor, quantized: Tensor) -> None:
        quantizer = getattr(part.quantization, operand)
        # Not in validations, nor in passes that other callbacks add.
        if quantizer is None or not self._in_batch or self._module is None or is_quiet(self._module):
            return
        if can_saturate(quantizer):
            before, after = (part.matrix(operand, x, quantizer) for x in (exact, quantized))
            self._shares.append(saturated_share(before, after, quantizer))

    # ------------------------------------------------------------------ reading

    def end_step(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Close an optimizer step, and return what the one before it measured."""
        found = self._numbers(self._pending)
        self._pending = self._measure(trainer, pl_module)
        self.forget()
        return found

    def read_logged(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return the logged values that are new, at once; for moments at which the device is waited for anyway."""
        if not self.logged:
            return {}
        return self._numbers(self._measure(trainer, pl_module, logged_only=True))

    def missing(self) -> list[str]:
        """Return the names of logged values that were not logged so far."""
        return sorted(self._missing)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, logged_only: bool = False) -> Tensor | None:
        """Return each signal's mean over processes with a new value, and whether there is one: shape (2, signals)."""
        if not self.names:
            return None
        device = pl_module.device
        nothing = torch.full((), math.nan, device=device)
        own: dict[str, Tensor] = {}
        if not logged_only:
            own = {LOSS: nothing if self._loss is None else self._loss.to(device)}
            # In high precision nothing is quantized, so nothing saturates.
            own[SATURATION] = torch.stack(self._shares).amax().to(device) if self._shares else torch.zeros_like(nothing)
        logged = trainer.callback_metrics if self.logged else {}
        self._missing -= logged.keys()
        values, there = [], []
        for name in self.names:
            value = own.get(name) if name in (LOSS, SATURATION) else logged.get(name)
            there.append(value is not None and not (name == LOSS and self._loss is None))
            values.append(nothing if value is None else value.detach().to(device, torch.float32).mean())
        present, now = torch.tensor(there, device=device), torch.stack(values)
        is_logged = torch.tensor([name in self.logged for name in self.names], device=device)
        last = nothing.expand(len(self.names)) if self._last is None else self._last.to(device)
        # A value is logged again and again until there is another one.
        new = present & ~(is_logged & (now == last))
        self._last = torch.where(present & is_logged, now, last)
        found, counts = torch.where(new, now, 0.0), new.float()
        if trainer.world_size > 1 and not trains_apart(trainer):
            summed = cast(Tensor, trainer.strategy.reduce(torch.stack([found, counts]), reduce_op="sum"))
            found, counts = summed[0] / summed[1].clamp(min=1), (summed[1] > 0).float()
        return torch.stack([found, counts])

    def _numbers(self, measured: Tensor | None) -> dict[str, float]:
        """Read what was measured."""
        if measured is None:
            return {}
        values, new = measured.tolist()
        return {name: value for name, value, is_new in zip(self.names, values, new, strict=True) if is_new}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured and not read, and the values that were logged last."""
        return {
            "names": list(self.names),
            "pending": None if self._pending is None else self._pending.tolist(),
            "last": None if self._last is None else self._last.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: If it is of other signals.
        """
        if state["names"] != self.names:
            raise ValueError(
                f"The checkpoint's PrecisionFallback has monitor={state['names']}, and this one "
                f"monitor={self.names}. Resume with the checkpoint's."
            )
        self._pending = None if state["pending"] is None else torch.tensor(state["pending"])
        self._last = None if state["last"] is None else torch.tensor(state["last"])
        last = zip(self.names, state["last"] or [], strict=False)
        self._missing = set(self.logged) - {name for name, value in last if not math.isnan(value)}
