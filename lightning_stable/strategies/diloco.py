r"""DiLoCo: many local steps between workers, with an outer Nesterov SGD over the averaged movements.

Use it for long rounds of an adaptive inner optimizer such as AdamW. It costs three copies of the parameters.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import DiLoCoStrategy
    >>> strategy = DiLoCoStrategy(local_steps=50)
    >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
"""

from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_stable.functional._settings import check_fraction, check_positive
from lightning_stable.functional.diloco import DiLoCoState, init_diloco, update_diloco
from lightning_stable.strategies.local_update import LocalUpdateStrategy

__all__ = ["DiLoCoStrategy"]


class DiLoCoStrategy(LocalUpdateStrategy):
    r"""Take an outer step of SGD with Nesterov momentum at the end of each round (arXiv 2311.08105).

    .. math:: m \leftarrow \mu m + \bar\Delta_t, \qquad a \leftarrow a - \alpha (\bar\Delta_t + \mu m)

    Args:
        local_steps: Optimizer steps of a round; or pairs (first step, local steps); or, with ``delayed``, "auto".
        outer_lr: Outer learning rate :math:`\alpha`, above 0.
        outer_momentum: Outer momentum :math:`\mu`, in [0, 1).
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
        outer_momentum: float = 0.3,
        delayed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(local_steps=local_steps, delayed=delayed, **settings)
        check_positive("outer_lr", outer_lr, "the outer learning rate")
        check_fraction("outer_momentum", outer_momentum, "the share of the outer momentum that is kept")
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum

    @override
    def init_outer(self, anchor: list[Tensor]) -> DiLoCoState:
        return init_diloco(anchor)

    @override
    def update_outer(
        self, state: DiLoCoState, anchor: list[Tensor], delta: list[Tensor], learning_rate: Any
    ) -> DiLoCoState:
        return update_diloco(state, anchor, delta, outer_lr=self.outer_lr, outer_momentum=self.outer_momentum)
