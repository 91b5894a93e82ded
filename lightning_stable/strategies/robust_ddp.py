"""RobustDDPStrategy: data-parallel training in which some workers may send wrong gradients.

Use it where a worker can go wrong without dying: broken memory, a bad accelerator, corrupt data on one machine, a
worker that is not trusted. It is DDP with another mean: one that ``f`` of the workers cannot move far. It does not help
against a worker that stops or sends nothing, nor against errors that all workers make. Cost: the traffic of DDP's
all-reduce, none of it hidden behind the backward pass, and two copies of the gradients for the length of a step.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from lightning_stable.strategies import RobustDDPStrategy
    >>> strategy = RobustDDPStrategy(aggregator="median", f=1)
    >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_stable.functional.robust_ddp import (
    RobustPlan,
    RobustRule,
    check_rule,
    check_workers,
    finite_workers,
    needs_pairs,
    plan_aggregation,
)
from lightning_stable.strategies._agreement import agree_on_model, take_from_rank_zero
from lightning_stable.strategies._slices import WorkerSlices
from lightning_stable.strategies._workers import Workers

__all__ = ["RobustDDPStrategy"]


class RobustDDPStrategy(DDPStrategy):
    """DDP with a robust aggregate of the workers' gradients in place of their mean.

    Once the backward pass of the last micro-batch is over, the accumulated gradients of all workers are aggregated;
    what follows (``on_before_optimizer_step``, clipping, the step) sees the aggregate, with the same bits on every
    worker. The loss that the host is given stays each worker's own. A worker whose gradient holds NaN or infinity is
    left out.
    See :mod:`lightning_stable.functional.robust_ddp` for the rules and their papers.

    Args:
        aggregator: "flag" (arXiv 2302.05865), "median" (1803.01498), "krum" (1703.02757), "nna" (2302.01772),
            "trimmed_mean" (1803.01498) or "geometric_median" (1912.13445).
        f: How many faulty workers to tolerate: less than half of them; with "krum" there have to be 2 f + 3 workers.
        krum_m: How many gradients "krum" averages; 1 is the paper's Krum, more is Multi-Krum.
        flag_rank: Dimensions of the subspace of "flag"; ``None``: half of the workers, rounded down, and one more.
        flag_iterations: Decompositions that "flag" takes to find its subspace.
        nna_rule: What follows the mixing of "nna": "trimmed_mean", "median", "krum" or "geometric_median".
        process_group_backend: As :class:`~lightning.pytorch.strategies.DDPStrategy` takes it.
        timeout: The same.
        start_method: The same.

    Raises:
        ValueError: At construction for a value out of range; at the start of a fit if there are too few workers for the
            rule, for a gradient scaler, LBFGS, SyncBatchNorm, sharded or complex parameters, or if the model differs
            between ranks; in the first step for sparse gradients.
        RuntimeError: In a step in which more than ``f`` workers' gradients are not finite.
    """

    def __init__(
        self,
        *,
        aggregator: Literal["flag", "median", "krum", "nna", "trimmed_mean", "geometric_median"] = "nna",
        f: int = 1,
        krum_m: int = 1,
        flag_rank: int | None = None,
        flag_iterations: int = 4,
        nna_rule: Literal["trimmed_mean", "median", "krum", "geometric_median"] = "trimmed_mean",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        self._rule = RobustRule(aggregator, f, krum_m, flag_rank, flag_iterations, nna_rule)
        check_rule(self._rule)
        self.aggregator = aggregator
        self.f = f
        self.krum_m = krum_m
        self.flag_rank = flag_rank
        self.flag_iterations = flag_iterations
        self.nna_rule = nna_rule
        self._workers: Workers | None = None
        self._reported: set[int] = set()

    # ------------------------------------------------------------------------------------------- the host's hooks

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._reported = set()
        if self._workers is None:
            rank_zero_info(f"{type(self).__name__}: there is only one worker, so it adds nothing to plain training.")
        elif any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise ValueError(
                f"{type(self).__name__} does not work with LBFGS: each worker would decide by its own loss how often "
                "to ask for a gradient, and they would wait for each other forever. Use SGD or AdamW."
            )
        else:
            rank_zero_info(
                f"{type(self).__name__}: {self.world_size} workers, of which f={self.f} may be faulty; "
                f"aggregator={self.aggregator!r}."
            )

    @override
    def configure_ddp(self) -> None:
        # No DDP around the module: it would average before anybody could look at the workers' own gradients.
        if self.world_size == 1:
            return
        self._check()
        name = type(self).__name__
        if self._timeout is None or self.cluster_environment is None:
            raise ValueError(f"{name} needs a timeout and a cluster environment; they are None.")
        self._workers = Workers(name, 1, self._timeout, self.cluster_environment.main_address, self.root_device)
        agree_on_model(self._module, self._workers)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if self._workers is not None:
            # The host's precision plugin calls the closure, and then the hooks and the clipping.
            closure = partial(self._robustly, self._workers, optimizer, closure)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._release()

    @override
    def teardown(self) -> None:
        self._release()
        super().teardown()

    # ------------------------------------------------------------------------------------------- one step

    def _robustly(self, workers: Workers, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        """Make this worker's gradients, and the workers' aggregate of them; return this worker's loss."""
        output = closure()
        self._aggregate(workers, optimizer)
        return output

    @torch.no_grad()
    def _aggregate(self, workers: Workers, optimizer: Optimizer) -> None:
        """Replace the gradients of an optimizer's parameters, and the module's buffers, by the workers' aggregate."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        gradients = [parameter.grad for parameter in parameters]
        self._refuse_sparse(gradients)
        there = torch.tensor([float(gradient is not None) for gradient in gradients], dtype=torch.float64)
        workers.position = f"the aggregate of the gradients of step {self._step}"
        with workers.guard():
            slices = WorkerSlices(parameters, gradients)
            own = slices.gram(self.root_device, pairs=needs_pairs(self._rule))
            gram, there = _sum(own, there.to(self.root_device))
        # Decided by every worker for itself, from the same numbers: an error comes to all, and none waits for another.
        plan = self._plan(gram)
        with workers.guard():
            aggregates = slices.combine(plan)
            _take_medians(self._module)
            _take_counters_of_rank_zero(self._module)
        _write(parameters, aggregates, there)
        workers.finished_rounds = self._step

    def _plan(self, gram: Tensor) -> RobustPlan:
        """Return how to aggregate, and say once of each worker that is left out."""
        lost = sorted(set(range(len(gram))) - set(finite_workers(gram)))
        ranks = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        if len(lost) > self.f:
            raise RuntimeError(
                f"{type(self).__name__}: the gradients of {ranks} are not finite in step {self._step}, which is more "
                f"than f={self.f} of {len(gram)} workers. If all go wrong at once the cause is training itself: lower "
                "the learning rate, clip gradients or check the data. Otherwise raise f, or take the faulty machines "
                "out."
            )
        if set(lost) - self._reported:
            rank_zero_warn(
                f"{type(self).__name__}: the gradients of {ranks} are not finite in step {self._step}. They are left "
                "out, in this step and whenever it happens again, without another word."
            )
            self._reported |= set(lost)
        return plan_aggregation(gram, self._rule)

    def _refuse_sparse(self, gradients: list[Tensor | None]) -> None:
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            raise ValueError(
                f"{type(self).__name__} does not work with sparse gradients. Build the embedding with sparse=False."
            )

    # ------------------------------------------------------------------------------------------- the rest

    def _check(self) -> None:
        """Raise ``ValueError`` for what does not work together, before anything is built."""
        name = type(self).__name__
        try:
            check_workers(self._rule, self.world_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise ValueError(
                f"{name} does not work with a gradient scaler, as precision='16-mixed' has: it looks for the scale at "
                "which gradients overflow, and here a worker with an overflow is a faulty one. Use 'bf16-mixed'."
            )
        for path, part in self._module.named_modules():
            if isinstance(part, nn.SyncBatchNorm):
                raise ValueError(  # noqa: TRY004  a setting that does not fit, not a wrong type
                    f"{name} keeps workers apart until their gradients are aggregated, but {path!r} is a "
                    "SyncBatchNorm, through which one faulty worker spoils all. Leave out sync_batchnorm: buffers are "
                    "aggregated."
                )
        for path, parameter in self._module.named_parameters():
            if isinstance(parameter, DTensor) or not parameter.is_floating_point():
                kind = "sharded" if isinstance(parameter, DTensor) else str(parameter.dtype)
                raise ValueError(
                    f"{name} aggregates whole gradients of real numbers, but parameter {path!r} is {kind}."
                )

    @property
    def _module(self) -> LightningModule:
        return cast(LightningModule, self.lightning_module)

    @property
    def _step(self) -> int:
        return self._module.trainer.global_step + 1

    def _release(self) -> None:
        if self._workers is not None:
            self._workers.close()
        self._workers = None


def _sum(*facts: Tensor) -> list[Tensor]:
    """Return the sums of tensors over all processes, on the CPU, with the same bits everywhere, in one collective."""
    flat = torch.cat([fact.flatten() for fact in facts])
    dist.all_reduce(flat)
    parts = torch.split(flat.cpu(), [fact.numel() for fact in facts])
    return [part.view(fact.shape) for part, fact in zip(parts, facts, strict=True)]


def _take_medians(module: nn.Module) -> None:
    """Replace each number in floating-point buffers by its median over the workers.

    NaN counts as larger than all: a few move the median no further than any other number could. Nobody is left out for
    it, and infinity is no fault: masks are made of it.
    """
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer.numel()]
    if buffers:
        workers = dist.get_world_size()
        median = RobustPlan(list(range(workers)), None, (workers - 1) // 2)
        torch._foreach_copy_(buffers, WorkerSlices(buffers, buffers).combine(median))


def _take_counters_of_rank_zero(module: nn.Module) -> None:
    """Replace buffers that are no floating-point numbers by rank 0's, as DDP does."""
    counters = [buffer for buffer in module.buffers() if not buffer.is_floating_point() and buffer.numel()]
    take_from_rank_zero(counters)


def _write(parameters: list[nn.Parameter], aggregates: list[Tensor], there: Tensor) -> None:
    """Give each parameter its gradient. Where no worker has one there is none: no decay or momentum moves it."""
    gradients, values = [], []
    for parameter, value, workers in zip(parameters, aggregates, there.tolist(), strict=True):
        if workers:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
            values.append(value)
    if gradients:
        torch._foreach_copy_(gradients, values)
