"""Run a module over some training batches before training, quietly, and gather what initialisers start from."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_stable._glue.batches import eval_mode, to_device
from lightning_stable._glue.progress import progress
from lightning_stable._glue.quiet import QuietPass, own_loss
from lightning_stable.peft._fresh_loaders import undisturbed_batches
from lightning_stable.peft._ranks import Ranks

__all__ = ["DataPass", "Loss", "PassReport", "mean_gradients"]

Loss = Callable[[LightningModule, Any], Tensor | None]


class PassReport(NamedTuple):
    """What a pass over data took.

    Attributes:
        batches: Batches of this process.
        seconds: Time.
        peak_bytes: By how much it raised the most memory in use at once: of the CUDA device over what was in use
            before, else of this process over its peak before.
    """

    batches: int
    seconds: float
    peak_bytes: int


class DataPass:
    """Runs the training step, or a loss of the user's, over some batches, and leaves no trace of it.

    Args:
        owner: The class that is named in messages.
        trainer: The Trainer, before its strategy is set up.
        pl_module: Its module, on the device.
        batches: Batches for each process at most.
        evaluate: In eval mode; otherwise as the module is.
        loss: What to run in place of the training step.
    """

    def __init__(
        self,
        owner: str,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        batches: int,
        evaluate: bool = True,
        loss: Loss | None = None,
    ) -> None:
        self.owner = owner
        self.ranks = Ranks(trainer)
        self.report = PassReport(0, 0.0, 0)
        self._trainer = trainer
        self.module = pl_module
        self._batches = batches
        self._evaluate = evaluate
        self._loss = loss
        if loss is None and not pl_module.automatic_optimization:
            raise ValueError(
                f"{owner} runs training_step before training, and that of {type(pl_module).__name__} steps its "
                "optimizers itself (automatic_optimization=False). Name a function of module and batch that returns "
                "the loss: init_loss='package.module.function'."
            )

    def run(self, before: Callable[[Any], None], after: Callable[[Tensor], bool], *, gradients: bool) -> None:
        """Call ``before`` with each batch and ``after`` with its loss, until that is ``True`` or the batches are over.

        Raises:
            ValueError: If there is no batch, a batch has no loss, or the training step cannot run here.
        """
        start, done = time.monotonic(), 0
        device = self._trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before_bytes = _peak(device)
        with self._quiet() as batches, torch.set_grad_enabled(gradients):
            told = f"{self.owner}: first batches"
            shown = progress(self._trainer, islice(batches, self._batches), told, self._batches, delay=0)
            for number, batch in enumerate(shown):
                moved = to_device(self._trainer, self.module, batch)
                before(moved)
                done += 1
                if after(self._loss_of(moved, number, gradients)):
                    break
            else:
                self._say_short(done)
        self.report = PassReport(done, time.monotonic() - start, _peak(device) - before_bytes)

    @contextmanager
    def _quiet(self) -> Iterator[Iterator[Any]]:
        with ExitStack() as stack:
            batches = stack.enter_context(undisturbed_batches(self.owner, self._trainer))
            stack.enter_context(isolate_rng())
            stack.enter_context(QuietPass()(self.module))
            # Hooks are not called within compiled code.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._evaluate:
                stack.enter_context(eval_mode(self.module))
            yield batches

    def _loss_of(self, batch: Any, number: int, gradients: bool) -> Tensor:
        name = type(self.module).__name__
        # Half precision with a gradient scaler would lose small gradients here: it has float32 weights to run with.
        scaled = getattr(self._trainer.precision_plugin, "scaler", None) is not None
        try:
            with nullcontext() if scaled else self._trainer.precision_plugin.forward_context():
                loss = self._loss(self.module, batch) if self._loss else own_loss(self.module, batch, number)
        except Exception as error:
            raise ValueError(
                f"{self.owner}: running {name} on batch {number} to start the adapters failed, before optimizers "
                f"exist: {type(error).__name__}: {error}. If training_step needs what is made later, name a function "
                "of module and batch that returns the loss: init_loss='package.module.function'."
            ) from error
        if loss is None:
            raise ValueError(
                f"{self.owner}: {name}.training_step returned no loss for batch {number}, so there is nothing to start "
                "the adapters from. Return the loss, or name a function of module and batch that does: "
                "init_loss='package.module.function'."
            )
        if gradients and not loss.requires_grad:
            raise ValueError(
                f"{self.owner}: the loss of batch {number} does not depend on the layers to adapt. Is it detached, or "
                "computed under no_grad? Name another by init_loss."
            )
        return loss

    def _say_short(self, done: int) -> None:
        if done == 0:
            raise ValueError(
                f"{self.owner}: the training data gave no batch to start the adapters from. Give a train dataloader "
                "that is not empty, or an init that needs no data, such as 'pissa'."
            )
        trainer: Any = self._trainer
        if done < self._batches and not trainer.fast_dev_run and not trainer.overfit_batches:
            rank_zero_warn(
                f"{self.owner}: the training data has {done} batches, fewer than init_batches={self._batches}: the "
                "adapters start from those."
            )


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mean_gradients(data: DataPass, weights: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of the loss by each weight, the mean over all batches of all processes.

    One gradient is on the device at a time: each is added to a float32 sum on the CPU as soon as it is there. Only
    these weights have gradients; ``.grad`` and ``requires_grad`` are afterwards as before.

    Raises:
        ValueError: If a weight got no gradient or one that is not finite, naming it.
    """
    sums = {name: torch.zeros(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
    data.ranks.together(lambda: _sum_gradients(data, weights, sums))
    batches = sum(data.ranks.every(data.report.batches))
    for name in list(sums):
        gradient = data.ranks.total(sums.pop(name)).div_(batches)
        why = None
        # The extremes are not finite where any value is not, and take no memory.
        if not bool(torch.stack(torch.aminmax(gradient)).isfinite().all()):
            why = "holds values that are not finite. Take a precision with more range for the start, such as bf16-mixed"
        elif not bool(gradient.any()):
            why = "is 0: the batches did not reach the layer. Leave it out of target_modules, or give more init_batches"
        if why is not None:
            raise ValueError(f"{data.owner}: the gradient of layer {name!r} over {batches} batches {why}.")
        yield name, gradient


def _sum_gradients(data: DataPass, weights: dict[str, nn.Parameter], sums: dict[str, Tensor]) -> None:
    flags = [(parameter, parameter.requires_grad) for parameter in data.module.parameters()]
    grads = {name: weight.grad for name, weight in weights.items()}
    handles = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, weight in weights.items():
            weight.requires_grad_(True)
            weight.grad = None
            handles.append(cast(Any, weight).register_post_accumulate_grad_hook(_adding_to(sums[name])))

        def backward(loss: Tensor) -> bool:
            loss.backward()  # type: ignore[no-untyped-call]
            return False

        data.run(lambda _batch: None, backward, gradients=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for name, weight in weights.items():
            weight.grad = grads[name]


def _adding_to(total: Tensor) -> Callable[[Tensor], None]:
    def take(weight: Tensor) -> None:
        if weight.grad is not None:
            total.add_(weight.grad.to(total))
            weight.grad = None

    return take
