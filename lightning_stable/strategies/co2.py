r"""CO2: local steps between workers, with the exchange of weights hidden behind the next round of steps.

Use it where workers are joined by a link so slow that averaging gradients, or waiting for an average of the weights,
takes a good part of the time: as long as a round of local steps takes longer than one exchange, a run is as fast as one
without communication. Where the link is fast, plain DDP learns more from each sample. It costs copies of the
parameters: anchor and message buffer, a momentum if there is one, and with variant="corrected" where the round began.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import CO2Strategy
    >>> strategy = CO2Strategy(local_steps=24, warmup_steps=100)
    >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
"""

from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from lightning_stable.functional._settings import check_fraction, check_positive
from lightning_stable.functional.co2 import CO2State, init_co2, update_co2
from lightning_stable.strategies.local_update import LocalUpdateStrategy

__all__ = ["CO2Strategy"]


class CO2Strategy(LocalUpdateStrategy):
    r"""Exchange movements of whole rounds, one round late (arXiv 2401.16265).

    At the end of round :math:`t` a worker launches the mean of its movement :math:`\Delta_t` and takes the outer step
    with the mean that was launched a round ago,

    .. math:: m \leftarrow \operatorname{clip}(\beta m + \bar\Delta_{t-1} / \Lambda), \qquad a \leftarrow a - \alpha m

    on the anchor :math:`a`, which is equal on all workers, and goes on from :math:`a` (variant "paper") or from
    :math:`a - \Delta_t` (variant "corrected", ours: same traffic, same overlap, its own last round is kept).

    Args:
        local_steps: Optimizer steps of a round; or pairs (first step, local steps); or "auto" to measure an exchange
            and take the fewest steps that hide it.
        outer_lr: Outer learning rate :math:`\alpha`, above 0.
        outer_momentum: Outer momentum :math:`\beta`, in [0, 1).
        momentum_clip: Largest size of an entry of :math:`m`, in the units of the weights; ``None`` for no limit.
        staleness_penalty: :math:`\Lambda`: a number above 0, or "gap" for 1 + (last outer movement / largest so far),
            our variant, since the paper's formula could not be read.
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
        outer_momentum: float = 0.0,
        momentum_clip: float | None = None,
        staleness_penalty: float | Literal["gap"] = 1.0,
        **settings: Any,
    ) -> None:
        if "delayed" in settings:
            raise ValueError("CO2Strategy takes no delayed: its exchange always travels during the next round.")
        super().__init__(local_steps=local_steps, delayed=True, **settings)
        check_positive("outer_lr", outer_lr, "the outer learning rate")
        check_fraction("outer_momentum", outer_momentum, "the share of the outer momentum that is kept")
        if momentum_clip is not None:
            check_positive("momentum_clip", momentum_clip, "the largest size of an entry of the outer momentum")
        if staleness_penalty != "gap":
            check_positive("staleness_penalty", staleness_penalty, "'gap', or what the late movement is divided by")
        self.outer_lr = outer_lr
        self.outer_momentum = outer_momentum
        self.momentum_clip = momentum_clip
        self.staleness_penalty = staleness_penalty

    @override
    def init_outer(self, anchor: list[Tensor]) -> CO2State:
        return init_co2(anchor, outer_momentum=self.outer_momentum)

    @override
    def update_outer(self, state: CO2State, anchor: list[Tensor], delta: list[Tensor], learning_rate: Any) -> CO2State:
        return update_co2(
            state,
            anchor,
            delta,
            outer_lr=self.outer_lr,
            outer_momentum=self.outer_momentum,
            momentum_clip=self.momentum_clip,
            staleness_penalty=self.staleness_penalty,
        )
