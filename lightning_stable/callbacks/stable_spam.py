r"""Stable-SPAM's treatment of gradients, for any optimizer: clipped spikes, steady norms, moments that start anew.

Use it where gradients spike and training diverges or stalls: low-bit weights, half precision, large learning rates.
With gradients that are calm it changes little but the step size. After it every tensor's gradient has a norm near 1
(``norm="unit"``), which Adam, Lion and the like do not notice; take ``norm="history"`` for SGD. Cost: some passes over
the gradients for each optimizer step, a few numbers a tensor.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.callbacks import StableSPAM
    >>> trainer = Trainer(callbacks=[StableSPAM()], logger=False, enable_checkpointing=False)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_stable.callbacks._gradients import GradientTransform, OptimizerStep
from lightning_stable.callbacks._reports import report
from lightning_stable.callbacks._worker_state import freezes_variance
from lightning_stable.functional._settings import check_count, check_positive
from lightning_stable.functional.stable_spam import (
    NORMS,
    StableSPAMInfo,
    StableSPAMState,
    check_gamma,
    init_stable_spam,
    update_stable_spam,
)

__all__ = ["StableSPAM"]


@dataclass
class _Track:
    """What is known of one optimizer's gradients.

    Attributes:
        names: Of the parameters, in the order of ``state``.
        state: Their statistics.
        updates: Optimizer steps taken.
        betas: The first beta of each parameter group as it was configured; ``None`` where a group has none.
        chosen: The names of the last step and their places in ``state``; ``None`` for all in order.
        has_moments: Whether the optimizer was seen to keep an entry that can be reset.
    """

    names: list[str] = field(default_factory=list)
    state: StableSPAMState = field(default_factory=lambda: init_stable_spam(0))
    updates: int = 0
    betas: list[Any] = field(default_factory=list)
    chosen: tuple[list[str], Tensor | None] = ([], None)
    has_moments: bool = False


class StableSPAM(GradientTransform):
    r"""Clip spiked entries, normalise each tensor's gradient and reset moments (arXiv 2502.17055).

    Before each optimizer step, for each tensor on its own (equations:
    :mod:`lightning_stable.functional.stable_spam`): entries above a running average of the largest entry are scaled
    down to it, then the gradient gets the norm :math:`\hat\mu / \sqrt{\hat\nu}` from running averages of the norm and
    its square. The gradient is the one an optimizer step starts from: accumulated, unscaled, synchronised, not yet
    clipped. Clipping by global norm acts on the result, whose norm is about the root of the number of tensors with
    ``norm="unit"``.

    Every ``reset_every_n_steps`` updates the optimizer's moments are zeroed and its step count restarts, so that the
    next gradient is the first of new moments. Differs from the released code, which at a reset makes an update from
    the old moments and drops that gradient, and restarts its own statistics' bias correction with Adam's. Entries that
    are neither zeroed nor counted, such as NAdam's ``mu_product``, go on.

    Logs ``stable_spam/norm``, the global gradient norm before, and with ``clip`` ``stable_spam/clip_share``, the share
    of entries that were clipped, and ``stable_spam/threshold``, the mean threshold. Several optimizers log under names
    that end in ``/0``, ``/1`` and so on. They go straight to the Trainer's loggers, at these steps only; nothing is
    read from an accelerator in between.

    Args:
        clip: Whether spiked entries are scaled down.
        norm: ``"unit"``, ``"history"`` for a norm of :math:`\hat\mu` (keeps the usual size of gradients; for SGD), or
            ``None`` for none.
        gamma1: Decay of the average norm :math:`\mu`, in [0, 1).
        gamma2: Decay of the average squared norm :math:`\nu`, in [0, 1).
        gamma3: Decay of the average largest entry, in [0, 1).
        eps: Added to :math:`\sqrt{\hat\nu}`.
        reset_every_n_steps: Updates of an optimizer from one reset of its moments to the next; ``None`` for none.
        reset_entries: The entries of the optimizer's state that are zeroed. ``"step"`` in a parameter group is, too.
        total_steps: Updates over which a cosine from 1 to ``final_scale`` multiplies ``gamma1`` and the first of an
            optimizer's betas, which are put back at the end of the fit; ``None`` for no such scaling.
        final_scale: The factor at the end of ``total_steps`` and after, in (0, 1].
        log_every_n_steps: Updates from one log to the next.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit for a sharded strategy, LBFGS, or,
            where moments are to be reset, SGD without momentum or a strategy that freezes them; in training for sparse
            gradients, or an optimizer that has none of ``reset_entries`` beside a step count.
    """

    def __init__(
        self,
        clip: bool = True,
        norm: str | None = "unit",
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        eps: float = 1e-8,
        reset_every_n_steps: int | None = 1000,
        reset_entries: Sequence[str] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "step"),
        total_steps: int | None = None,
        final_scale: float = 0.5,
        log_every_n_steps: int = 50,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is unknown. Choose 'unit', 'history' or None (null in YAML).")
        for name, gamma in (("gamma1", gamma1), ("gamma2", gamma2), ("gamma3", gamma3)):
            check_gamma(name, gamma)
        check_positive("eps", eps, "added to a gradient norm. 1e-8 is usual")
        if reset_every_n_steps is not None:
            check_count("reset_every_n_steps", reset_every_n_steps, 1, "optimizer steps")
        if isinstance(reset_entries, str) or not all(isinstance(entry, str) for entry in reset_entries):
            raise ValueError(f"reset_entries={reset_entries!r} is not a list of names, such as ['exp_avg', 'step'].")
        if total_steps is not None:
            check_count("total_steps", total_steps, 1, "optimizer steps")
        check_positive("final_scale", final_scale, "a factor of at most 1. 0.5 is usual")
        if final_scale > 1:
            raise ValueError(f"final_scale={final_scale!r} is above 1: it is what momentum is reduced to. Try 0.5.")
        check_count("log_every_n_steps", log_every_n_steps, 1, "optimizer steps")
        self.clip = clip
        self.norm = norm
        self.gamma1 = gamma1
        self.gamma2 = gamma2
        self.gamma3 = gamma3
        self.eps = eps
        self.reset_every_n_steps = reset_every_n_steps
        self.reset_entries = tuple(reset_entries)
        self.total_steps = total_steps
        self.final_scale = final_scale
        self.log_every_n_steps = log_every_n_steps
        self._tracks: dict[str, _Track] = {}

    # ------------------------------------------------------------------ hooks, in the host's order

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.reset_every_n_steps is not None and freezes_variance(trainer):
            raise ValueError(
                f"StableSPAM(reset_every_n_steps={self.reset_every_n_steps}) does not work with "
                f"{type(trainer.strategy).__name__}, which freezes the variance that a reset would forget for good. "
                "Set reset_every_n_steps=None."
            )
        for optimizer in trainer.optimizers:
            bare = isinstance(optimizer, SGD) and not any(group["momentum"] for group in optimizer.param_groups)
            if bare and self.reset_every_n_steps is not None:
                # The one optimizer that is known to have nothing to reset: told now, not at the first reset.
                raise ValueError(self._nothing_to_reset(optimizer))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {
                key: {**track.state._asdict(), "names": list(track.names), "updates": track.updates}
                | {"betas": list(track.betas)}
                for key, track in self._tracks.items()
            }
        }

    # ------------------------------------------------------------------ for users

    @override
    def reset(self) -> None:
        self._tracks = {}

    # ------------------------------------------------------------------ for strategies whose workers differ

    # The counts of updates beside the averages.
    takes_state_of_rank_zero = True

    def worker_tensors(self) -> list[Tensor]:
        """Return the running averages, those of each worker's own gradients."""
        return [value for track in self._tracks.values() for value in track.state if value.is_floating_point()]

    # ------------------------------------------------------------------ helpers

    @override
    def _take_over(self, state: dict[str, Any]) -> None:
        for key, saved in state["optimizers"].items():
            statistics = StableSPAMState(*(saved[name] for name in StableSPAMState._fields))
            self._tracks[key] = _Track(list(saved["names"]), statistics, saved["updates"], list(saved["betas"]))

    @override
    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for key, optimizer in enumerate(trainer.optimizers):
            track = self._tracks.setdefault(str(key), _Track())
            track.has_moments = False
            # A checkpoint's groups hold betas that are scaled already; its state has the configured ones.
            track.betas += [_first_beta(group) for group in optimizer.param_groups[len(track.betas) :]]

    @override
    def _finish(self, trainer: Trainer) -> None:
        for key, optimizer in enumerate(trainer.optimizers):
            track = self._tracks.get(str(key))
            if track is not None:
                self._scale_betas(optimizer, track, 1.0)
                # The next fit's optimizers are new ones.
                track.betas = []

    @override
    def _transform(self, step: OptimizerStep) -> None:
        track = self._tracks.setdefault(step.key, _Track())
        self._reset_moments(step.optimizer, track)
        scale = self._scale(track.updates)
        self._scale_betas(step.optimizer, track, scale)
        gradients = step.gradients
        places = _places(track, list(step.parameters), gradients[0].device)
        state, info = update_stable_spam(
            gradients,
            track.state if places is None else StableSPAMState(*(value[places] for value in track.state)),
            gamma1=self.gamma1 * scale,
            gamma2=self.gamma2,
            gamma3=self.gamma3,
            clip=self.clip,
            norm=self.norm,
            eps=self.eps,
        )
        if places is not None:
            pairs = zip(track.state, state, strict=True)
            state = StableSPAMState(*(old.index_copy(0, places, new) for old, new in pairs))
        track.state = state
        track.updates += 1
        if track.updates % self.log_every_n_steps == 0:
            self._log(step, info)

    def _log(self, step: OptimizerStep, info: StableSPAMInfo) -> None:
        """Log what one update did."""
        values = {"stable_spam/norm": torch.linalg.vector_norm(info.norms)}
        if self.clip:
            sizes = torch.tensor([gradient.numel() for gradient in step.gradients], device=info.clipped.device)
            values["stable_spam/clip_share"] = (info.clipped * sizes).sum() / sizes.sum()
            known = torch.isfinite(info.thresholds)
            total = torch.where(known, info.thresholds, 0.0).sum()
            values["stable_spam/threshold"] = total / known.sum().clamp(min=1)
        report(step.trainer, {step.name(name): value for name, value in values.items()}, step.trainer.global_step)

    def _scale(self, updates: int) -> float:
        """Return the factor of the update after ``updates`` others."""
        if self.total_steps is None:
            return 1.0
        wave = 0.5 * (1.0 + math.cos(math.pi * min(1.0, updates / self.total_steps)))
        return self.final_scale + (1.0 - self.final_scale) * wave

    def _scale_betas(self, optimizer: Optimizer, track: _Track, scale: float) -> None:
        """Set the first beta of each group to its configured value times ``scale``."""
        if self.total_steps is None:
            return
        # Groups may be added in the middle of a fit.
        track.betas += [_first_beta(group) for group in optimizer.param_groups[len(track.betas) :]]
        for group, beta in zip(optimizer.param_groups, track.betas, strict=False):
            if beta is not None:
                group["betas"] = (beta * scale, *group["betas"][1:])

    def _reset_moments(self, optimizer: Optimizer, track: _Track) -> None:
        """Zero the moments where that is due."""
        if self.reset_every_n_steps is None or track.updates == 0:
            return
        due = track.updates % self.reset_every_n_steps == 0
        if track.has_moments and not due:
            return
        states = [
            optimizer.state[p] for group in optimizer.param_groups for p in group["params"] if p in optimizer.state
        ]
        if not track.has_moments and (due or any(states)):
            # Looked at as early as there is something to see, so that a long run does not fail at its first reset.
            moments = set(self.reset_entries) - {"step"}
            if not any(moments & state.keys() for state in states):
                raise ValueError(self._nothing_to_reset(optimizer))
            track.has_moments = True
        if due:
            groups = [group for group in optimizer.param_groups if "step" in self.reset_entries]
            for holder, entries in [*((s, self.reset_entries) for s in states), *((g, ("step",)) for g in groups)]:
                for entry in entries:
                    _zero(holder, entry)

    def _nothing_to_reset(self, optimizer: Optimizer) -> str:
        """Return the message for an optimizer without moments that are known."""
        held = sorted({str(entry) for state in optimizer.state.values() for entry in state})
        return (
            f"StableSPAM(reset_every_n_steps={self.reset_every_n_steps}) is to reset the moments of "
            f"{type(optimizer).__name__}, which keeps {', '.join(held) or 'no state'}, and none of "
            f"{', '.join(entry for entry in self.reset_entries if entry != 'step') or 'no entry'}. Name its moments in "
            "reset_entries, or set reset_every_n_steps=None."
        )


def _places(track: _Track, names: list[str], device: torch.device) -> Tensor | None:
    """Return where the statistics of these parameters are, ``None`` for all in order; new ones are added."""
    if track.state.maximum.device != device:
        track.state = StableSPAMState(*(value.to(device) for value in track.state))
        track.chosen = ([], None)
    if track.chosen[0] == names:
        return track.chosen[1]
    known = {name: place for place, name in enumerate(track.names)}
    new = [name for name in names if name not in known]
    if new:
        known |= {name: len(track.names) + place for place, name in enumerate(new)}
        fresh = init_stable_spam(len(new), device)
        track.names += new
        track.state = StableSPAMState(*(torch.cat(pair) for pair in zip(track.state, fresh, strict=True)))
    places = None if names == track.names else torch.tensor([known[name] for name in names], device=device)
    track.chosen = (names, places)
    return places


def _first_beta(group: dict[str, Any]) -> Any:
    """Return the first beta of a parameter group, ``None`` if it has none."""
    return group["betas"][0] if group.get("betas") else None


def _zero(holder: dict[str, Any], entry: str) -> None:
    """Set an entry to 0 in place: a tensor or a number."""
    value = holder.get(entry)
    if isinstance(value, Tensor):
        value.zero_()
    elif isinstance(value, (int, float)):
        holder[entry] = type(value)(0)
