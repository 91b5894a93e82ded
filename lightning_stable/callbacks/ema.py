r"""Exponential moving average of the weights, for any LightningModule.

Use it when the last weights are noisy: large learning rates, small batches, data that changes. The average is a
better model for no change to training. Do not expect gains where the rate has decayed to nearly nothing. Cost: one
extra copy of the weights that train, one fused pass over them for each optimizer step, and for
``validate_with="both"`` a second pass over the validation data.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import EMA
    >>> trainer = Trainer(callbacks=[EMA(decay=0.99)], logger=False, enable_checkpointing=False)
"""

from torch import Tensor
from typing_extensions import override

from lightning_stable.callbacks._averaging import AveragedWeights
from lightning_stable.functional.ema import EMAState, check_decay, ema_decay, update_ema

__all__ = ["EMA"]


class EMA(AveragedWeights):
    r"""Keep an exponential moving average of the weights (arXiv 2306.16817).

    .. math:: \bar\theta \leftarrow \beta\,\bar\theta + (1 - \beta)\,\theta

    after every ``every_n_steps``-th optimizer step. The average of the first step is the weights themselves (those at
    ``start_step``). It resumes exactly, goes on over several fits of the same module, and is the same on every
    process under DDP.

    A checkpoint's ``state_dict`` holds the weights that validation measured: the average, unless
    ``validate_with="live"``. Full checkpoints hold both sets (see ``load_weights``).

    Args:
        decay: :math:`\beta`, the share of the old average that is kept, in [0, 1).
        warmup: ``"power"`` for :math:`\beta_k = \min(\beta, 1 - (1 + k)^{-2/3})` with :math:`k` averages taken,
            ``None`` for a constant :math:`\beta`.
        every_n_steps: Optimizer steps from one average to the next.
        start_step: Optimizer step at which the average begins. Before it the live weights are used everywhere.
        buffers: ``"copy"`` runs the average with the live buffers, ``"average"`` averages floating-point buffers too
            (integer ones, such as BatchNorm's count, are always the live ones).
        device: Where the shadow lives, such as ``"cpu"``; ``None`` for beside the weights.
        dtype: Its precision, such as ``"float32"`` for bfloat16 weights; ``None`` for the weights' own.
        validate_with: ``"ema"``, ``"live"``, or ``"both"``: the plain metric names are the average's and those of the
            live weights end in ``_live``.
        finish_with: The weights the module has after the fit.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy or a second
            callback that averages weights.
    """

    def __init__(
        self,
        decay: float = 0.999,
        warmup: str | None = None,
        every_n_steps: int = 1,
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
        check_decay("decay", decay)
        ema_decay(decay, 0, warmup)
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} is not a positive number of optimizer steps.")
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps

    @override
    def _due(self, previous_step: int, step: int) -> bool:
        return step // self.every_n_steps > previous_step // self.every_n_steps

    @override
    def _average(self, shadow: list[Tensor], live: list[Tensor], names: list[str]) -> None:
        update_ema(EMAState(shadow, self._updates), live, self.decay, self.warmup)
