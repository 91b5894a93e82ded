"""Run a module's training step beside the one that counts: nothing is logged, counted or left behind by it."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection

from lightning_stable._glue.method_wrap import MethodWrap, do_nothing

__all__ = ["QuietPass", "RandomState", "is_quiet", "loss_of", "own_loss", "quiet_depth", "run_training_step"]

# Modules in a quiet pass at present, with how many of them are within each other.
_quiet: WeakKeyDictionary[LightningModule, int] = WeakKeyDictionary()


def is_quiet(pl_module: LightningModule) -> bool:
    """Tell whether the training step that runs is one beside those that count, and not to be recorded."""
    return quiet_depth(pl_module) > 0


def quiet_depth(pl_module: LightningModule) -> int:
    """Return within how many quiet passes the training step runs, to tell a pass from one within it."""
    return _quiet.get(pl_module, 0)


def run_training_step(pl_module: LightningModule, batch: Any, batch_idx: int = 0) -> Any:
    """Run the module's own training step on a batch, with the arguments that the host would give, beside the host."""
    return pl_module.training_step(batch, batch_idx) if _takes_index(pl_module) else pl_module.training_step(batch)


def loss_of(output: Any) -> Tensor | None:
    """Return the loss within what a training step returned, ``None`` if it skips."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def own_loss(pl_module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor | None:
    """Return the loss of the module's own training step on a batch, without what callbacks add to it.

    ``None`` if the step skips the batch.
    """
    step = vars(pl_module).get("training_step")
    if step is None or hasattr(step, "method_wrap"):
        step = type(pl_module).training_step.__get__(pl_module)
    # Containers of its own, in case the step takes them apart.
    batch = tree_map(lambda leaf: leaf, batch)
    return loss_of(step(batch, batch_idx) if _takes_index(pl_module) else step(batch))


class RandomState(NamedTuple):
    """The state of the random number generators that a training step may draw from.

    Attributes:
        cpu: torch's default generator.
        device: The current CUDA device's generator, if the module is on one.
        python: Python's ``random``.
        numpy: NumPy's global generator, if NumPy is loaded.
    """

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """Read the present state."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
        )

    def restore(self, device: torch.device) -> None:
        """Put the generators back to it."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class QuietPass:
    """What makes a further pass through a LightningModule leave no trace.

    ``self.log`` does nothing, torchmetrics are stood in for by clones, and buffers and random numbers are afterwards
    what they were before. Gradients are the caller's.

    Args:
        training: The pass is trained on: buffers, such as batch statistics, and random numbers move on.
    """

    def __init__(self, *, training: bool = False) -> None:
        self._training = training
        # By identity, beside the metric itself: a metric's own hash follows its state.
        self._clones: dict[int, tuple[Metric | MetricCollection, Metric | MetricCollection]] = {}

    @contextmanager
    def __call__(self, pl_module: LightningModule) -> Iterator[None]:
        """Make what runs inside quiet."""
        random_state = None if self._training else RandomState.capture(pl_module.device)
        metrics = list(_metrics(pl_module))
        buffers = [
            (part, name, buffer, buffer.detach().clone())
            for part in (() if self._training else pl_module.modules())
            for name, buffer in part.named_buffers(recurse=False)
        ]
        depth = quiet_depth(pl_module)
        _quiet[pl_module] = depth + 1
        wraps = [MethodWrap(pl_module, name, do_nothing) for name in ("log", "on_before_backward", "on_after_backward")]
        try:
            for parent, name, metric in metrics:
                setattr(parent, name, self._clone(metric))
            yield
        finally:
            if random_state is not None:
                random_state.restore(pl_module.device)
            _quiet[pl_module] = depth
            for wrap in reversed(wraps):
                wrap.undo()
            for parent, name, metric in metrics:
                setattr(parent, name, metric)
            _put_back(buffers)

    def _clone(self, metric: Metric | MetricCollection) -> Metric | MetricCollection:
        """Return the stand-in for a metric, made once and empty each time."""
        if id(metric) not in self._clones:
            self._clones[id(metric)] = (metric, metric.clone())
        clone = self._clones[id(metric)][1]
        clone.reset()
        return clone


@torch.no_grad()
def _put_back(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Give buffers their values back and their places."""
    for part, name, buffer, value in buffers:
        buffer.copy_(value)  # all of them: batch normalisation writes without a trace in the tensor's version
        if getattr(part, name) is not buffer:
            setattr(part, name, buffer)  # the module put another tensor in its place


def _takes_index(pl_module: LightningModule) -> bool:
    return bool(is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2))


def _metrics(module: nn.Module) -> Iterator[tuple[nn.Module, str, Metric | MetricCollection]]:
    """Yield the outermost metrics within a module, in each place that they have."""
    within: list[str] = []
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, (Metric, MetricCollection)) and not any(path.startswith(outer) for outer in within):
            within.append(f"{path}.")
            parent, _, name = path.rpartition(".")
            yield module.get_submodule(parent), name, part
