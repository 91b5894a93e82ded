r"""Weight average with a stability-plasticity balanced coefficient, for training on a sequence of tasks.

Use it when later data overwrites what earlier data taught and a fixed decay is hard to choose. Try
:class:`~lightning_stable.callbacks.EMA` first: in our own measurements (see the card) a well chosen fixed decay was
as good or better. Cost: four extra copies of the weights that train while a step is taken (shadow, the gradients of
two steps, the weights before it), so it is meant for adapters and small models.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import BalancedEMA
    >>> trainer = Trainer(callbacks=[BalancedEMA(form="derived")], logger=False, enable_checkpointing=False)
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_stable.callbacks._averaging import AveragedWeights
from lightning_stable.callbacks._worker_state import freezes_variance
from lightning_stable.functional.balanced_ema import FORMS, BalancedEMAState, update_balanced_ema
from lightning_stable.functional.ema import check_decay

__all__ = ["BalancedEMA"]


class BalancedEMA(AveragedWeights):
    r"""Average the weights with the balanced coefficient of Large Continual Instruction Assistant (arXiv 2410.10868).

    .. math:: \theta^*_t = \beta_t\,\theta^*_{t-1} + (1 - \beta_t)\,\theta_t

    after each optimizer step, with one :math:`\beta_t` for each tensor that trains, from the change of the gradient
    and the distance of the weights from their average (equations: :mod:`lightning_stable.functional.balanced_ema`).
    Logs ``balanced_ema/coefficient``, the mean :math:`\beta_t`, and ``balanced_ema/fallback_rate``, the share of
    tensors for which the formula gave no number in (0, 1).

    Gradients are those that the optimizer step starts from: accumulated, unscaled, synchronised, not yet clipped.

    Args:
        form: ``"derived"`` for the equation, ``"released"`` for the authors' code.
        fallback_decay: :math:`\beta_t` where the formula gives none, in [0, 1).
        start_step: As for :class:`~lightning_stable.callbacks.EMA`.
        buffers: As for :class:`~lightning_stable.callbacks.EMA`, but ``"copy"`` only: buffers have no gradient.
        device: As for :class:`~lightning_stable.callbacks.EMA`.
        dtype: As for :class:`~lightning_stable.callbacks.EMA`.
        validate_with: As for :class:`~lightning_stable.callbacks.EMA`.
        finish_with: As for :class:`~lightning_stable.callbacks.EMA`.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy, several
            optimizers, a strategy that exchanges momenta in the place of gradients, or a second callback that averages
            weights.
    """

    def __init__(
        self,
        form: str = "derived",
        fallback_decay: float = 0.99,
        start_step: int = 0,
        buffers: str = "copy",
        device: str | None = None,
        dtype: str | None = None,
        validate_with: str = "ema",
        finish_with: str = "ema",
    ) -> None:
        super().__init__(
            start_step=start_step,
            buffers=buffers,
            device=device,
            dtype=dtype,
            validate_with=validate_with,
            finish_with=finish_with,
        )
        if form not in FORMS:
            raise ValueError(f"form={form!r} is unknown. Choose one of {', '.join(map(repr, FORMS))}.")
        if buffers != "copy":
            raise ValueError(f"buffers={buffers!r} is not possible: the coefficient comes from gradients. Use 'copy'.")
        check_decay("fallback_decay", fallback_decay)
        self.form = form
        self.fallback_decay = fallback_decay
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._last_gradients: dict[str, Tensor] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"BalancedEMA does not work with {len(trainer.optimizers)} optimizers: which gradient led to which "
                "weights is not known. Use EMA, or one optimizer."
            )
        if freezes_variance(trainer):
            raise ValueError(
                f"BalancedEMA does not work with {type(trainer.strategy).__name__}, which shows each process its own "
                "gradients: with coefficients of their own, processes of equal weights would have different averages. "
                "Use EMA."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._shadow is None:
            return
        names, live = self._live(pl_module)
        self._before = {name: tensor.detach().clone() for name, tensor in zip(names, live, strict=True)}
        self._gradients = {
            name: tensor.grad.detach().clone()
            for name, tensor in zip(names, live, strict=True)
            if tensor.grad is not None
        }

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._before, self._gradients = {}, {}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = self._updates
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._updates != taken:
            coefficients = self._coefficients
            fallback = torch.tensor(self.fallback_decay, dtype=coefficients.dtype, device=coefficients.device)
            pl_module.log("balanced_ema/coefficient", coefficients.mean())
            pl_module.log("balanced_ema/fallback_rate", (coefficients == fallback).float().mean())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gradients": dict(self._last_gradients)}

    @override
    def reset(self) -> None:
        super().reset()
        self._before, self._gradients, self._last_gradients = {}, {}, {}

    @override
    def worker_tensors(self) -> list[Tensor]:
        """Return the average, and the gradients that the next coefficients come from.

        Workers have coefficients of their own, so the mean of their averages is what they agree on, and not the average
        that one coefficient for all would have given.
        """
        return [*super().worker_tensors(), *self._last_gradients.values()]

    @override
    def _take_over(self, state: dict[str, Any], pl_module: LightningModule) -> None:
        super()._take_over(state, pl_module)
        present = dict(pl_module.named_parameters())
        self._last_gradients = {name: value.to(present[name].device) for name, value in state["gradients"].items()}

    @override
    def _average(self, shadow: list[Tensor], live: list[Tensor], names: list[str]) -> None:
        state = BalancedEMAState(shadow, self._past_gradients(names, live), self._updates)
        state, self._coefficients = update_balanced_ema(
            state,
            live,
            [self._before.get(name, tensor) for name, tensor in zip(names, live, strict=True)],
            [self._gradients.get(name) for name in names],
            form=self.form,
            fallback=self.fallback_decay,
        )
        self._last_gradients = dict(zip(names, state.gradients or [], strict=True))
        self._before, self._gradients = {}, {}

    def _past_gradients(self, names: list[str], live: list[Tensor]) -> list[Tensor] | None:
        """Return the gradients of the step before; not-a-number where there was none, which gives the fallback."""
        if not self._last_gradients:
            return None
        pairs = [(self._last_gradients.get(name), tensor) for name, tensor in zip(names, live, strict=True)]
        return [
            old if old is not None and old.shape == tensor.shape else torch.full_like(tensor, torch.nan)
            for old, tensor in pairs
        ]
