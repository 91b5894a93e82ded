r"""Local SGD: workers make steps of their own, and their weights are averaged every so many steps.

Use it where averaging gradients at every step costs more time than it is worth, and the link carries one copy of the
weights every ``local_steps`` steps without hurry. A list of (first step, local steps) makes rounds shorter or longer as
training goes on; rounds longer than the run, with ``final_merge``, merge once, at the end. It costs two copies of the
parameters.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import LocalSGDStrategy
    >>> strategy = LocalSGDStrategy(local_steps=[(0, 4), (1000, 16)])
    >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
"""

from typing import Any, Literal, NamedTuple

from torch import Tensor
from typing_extensions import override

from lightning_stable.functional.local_sgd import update_local_sgd
from lightning_stable.strategies.local_update import LocalUpdateStrategy

__all__ = ["LocalSGDStrategy"]


class _NoState(NamedTuple):
    """An average remembers nothing."""


class LocalSGDStrategy(LocalUpdateStrategy):
    r"""Average the workers' weights at the end of each round (arXiv 1805.09767; one merge at the end: 2507.06542).

    .. math:: a \leftarrow a - \bar\Delta_t = \tfrac{1}{N} \sum_i x^i_t

    Args:
        local_steps: Optimizer steps of a round; or pairs (first step, local steps); or, with ``delayed``, "auto".
        delayed: Let the average travel during the next round, instead of waiting for it.
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
        delayed: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(local_steps=local_steps, delayed=delayed, **settings)

    @override
    def init_outer(self, anchor: list[Tensor]) -> _NoState:
        return _NoState()

    @override
    def update_outer(self, state: _NoState, anchor: list[Tensor], delta: list[Tensor], learning_rate: Any) -> _NoState:
        update_local_sgd(anchor, delta)
        return state
