r"""SlowMo: local steps between workers, with a slow momentum over the averaged movements.

Use it as :class:`~lightning_stable.strategies.LocalSGDStrategy`, where rounds are so long that their averages point in
the same direction from one to the next. It costs three copies of the parameters.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import SlowMoStrategy
    >>> strategy = SlowMoStrategy(local_steps=12, outer_momentum=0.2)
    >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
"""

from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_stable.functional._settings import check_fraction, check_positive
from lightning_stable.functional.slowmo import SlowMoState, init_slowmo, update_slowmo
from lightning_stable.strategies.local_update import LocalUpdateStrategy

__all__ = ["SlowMoStrategy"]


class SlowMoStrategy(LocalUpdateStrategy):
    r"""Take an outer step with momentum at the end of each round (arXiv 1910.00643).

    .. math:: m \leftarrow \beta m + \bar\Delta_t / \gamma_t, \qquad a \leftarrow a - \alpha \gamma_t m

    with the learning rate :math:`\gamma_t` of the last local step of round :math:`t`, first parameter group.

    Args:
        local_steps: Optimizer steps of a round; or pairs (first step, local steps); or, with ``delayed``, "auto".
        outer_lr: Outer learning rate :math:`\alpha`, above 0.
        outer_momentum: Slow momentum :math:`\beta`, in [0, 1).
        delayed: Let the mean travel during the next round, instead of waiting for it.
        settings: ``variant``, ``workers``, ``comm_dtype``, ``warmup_steps``, ``final_merge``, ``timeout`` and what
            else :class:`~lightning_stable.strategies.local_update.LocalUpdateStrategy` takes.

    Raises:
        ValueError: At construction if a setting is not allowed; at the start of a fit if the module, its optimizers or
            the processes cannot be worked with.
        RuntimeError: In training if a rank dies, stalls or goes another way; the message names it.
    """

    def __init__(
        self,
        *,
        local_steps: int | list[tuple[int, int]] | Literal["auto"] = 24,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.2,
        delayed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(local_steps=local_steps, delayed=delayed, **settings)
        check_positive("outer_lr", outer_lr, "the outer learning rate")
        check_fraction("outer_momentum", outer_momentum, "the share of the slow momentum that is kept")
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum

    @override
    def init_outer(self, anchor: list[Tensor]) -> SlowMoState:
        return init_slowmo(anchor)

    @override
    def update_outer(
        self, state: SlowMoState, anchor: list[Tensor], delta: list[Tensor], learning_rate: Any
    ) -> SlowMoState:
        if learning_rate is None:
            raise ValueError(
                "SlowMoStrategy scales its momentum by the learning rate of the first parameter group, which has none: "
                "it is None. Use an optimizer with a learning rate, or LocalSGDStrategy."
            )
        return update_slowmo(
            state,
            anchor,
            delta,
            learning_rate=float(learning_rate),
            outer_lr=self.outer_lr,
            outer_momentum=self.outer_momentum,
        )
