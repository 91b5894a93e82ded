"""Score the samples of several tasks with few passes through a module: accuracy, loss, a metric, or a function."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_stable._glue.quiet import loss_of, run_training_step
from lightning_stable.callbacks._head import HeadTap, list_heads
from lightning_stable.callbacks._samples import find_labels
from lightning_stable.callbacks._task_subsets import Chunk

__all__ = ["TaskScore", "refuse_own_steps"]

# What a position is labelled that is not to be counted, as torch's cross-entropy has it.
_IGNORED = -100


class TaskScore:
    """How the samples of a task are turned into one number.

    Args:
        score: ``"accuracy"``, ``"loss"``, a torchmetrics metric, a function ``(pl_module, batch)`` that returns
            one value a sample or their mean, or its dotted path.
        higher_is_better: Whether more is better; ``None`` where the score itself says so.
        logits: Dotted name of the submodule that puts the logits out; ``None``: the module's ``forward``.
        labels: Where a batch has its labels; ``None``: in the usual place.

    Attributes:
        name: What the score is called.
        higher_is_better: Whether more is better.

    Raises:
        ValueError: If there is no such score.
    """

    def __init__(self, score: Any, higher_is_better: bool | None, logits: str | None, labels: str | None) -> None:
        self._function: Callable[..., Any] | None = None
        self._metric: Metric | None = None
        self._labels = labels
        self._tap = HeadTap("StabilityGap", logits)
        self._named = logits is not None
        self._seen = False
        found = _resolve(score)
        if isinstance(found, Metric):
            self._metric, self.name = found.clone(), type(found).__name__
            own = found.higher_is_better
        elif isinstance(found, str):
            self.name, own = found, found == "accuracy"
        else:
            self._function, self.name = found, getattr(found, "__name__", type(found).__name__)
            own = None
        if higher_is_better is None and own is None:
            raise ValueError(
                f"StabilityGap cannot tell whether a higher {self.name} is better. Say so: higher_is_better=True or "
                "False."
            )
        self.higher_is_better = bool(own if higher_is_better is None else higher_is_better)

    def attach(self, pl_module: LightningModule) -> None:
        """Put the hook on the named submodule, if there is one.

        Raises:
            ValueError: If the module has no such submodule, or its training step would have to run and steps the
                optimizers itself.
        """
        steps = self.name == "loss" or (
            self._named and not is_overridden("validation_step", pl_module, LightningModule)
        )
        if steps:
            refuse_own_steps(pl_module, "score='loss'" if self.name == "loss" else "logits=... without validation_step")
        if self._named:
            self._tap.attach(pl_module)

    def detach(self) -> None:
        """Take it off."""
        self._tap.detach()
        self._seen = False

    @property
    def runs_step(self) -> bool:
        """Whether a step of the module runs, and not its ``forward`` or a function alone."""
        return self._named or self.name == "loss"

    @property
    def joined(self) -> bool:
        """Whether samples of several tasks may share a pass; a mean over a pass is of one task."""
        return self._function is None and self.name != "loss"

    def metrics(self, tasks: Sequence[int], device: torch.device) -> dict[int, Metric]:
        """Return an empty metric for each task, if the score is a metric."""
        return {} if self._metric is None else {task: self._metric.clone().to(device) for task in tasks}

    def add(
        self,
        pl_module: LightningModule,
        chunk: Chunk,
        classes: dict[int, Tensor] | None,
        metrics: dict[int, Metric],
        sums: Tensor,
    ) -> None:
        """Add the scores of the samples of a chunk to those of their tasks; a metric is updated instead.

        Args:
            pl_module: The module, ready to be evaluated.
            chunk: Samples on its device.
            classes: For each task the classes that compete; ``None``: all.
            metrics: The metric of each task, from :meth:`metrics`.
            sums: The sum so far, by task.
        """
        if not self.joined:
            for task, first, last in chunk.parts:
                sums[task] += self._value(pl_module, chunk.batch, last - first) * (last - first)
            return
        labels = find_labels(chunk.batch, self._labels, "StabilityGap")
        logits = self._logits(pl_module, chunk.batch, labels)
        if classes is not None:
            logits = torch.cat([_restricted(logits[first:last], classes[task]) for task, first, last in chunk.parts])
        if not metrics:
            sums.index_add_(0, chunk.owners, _right(logits, labels))
            return
        for task, first, last in chunk.parts:
            metrics[task].update(logits[first:last], labels[first:last])

    def _value(self, pl_module: LightningModule, batch: Any, samples: int) -> Tensor:
        """Return the mean over a batch of one task."""
        if self._function is None:
            return _loss(run_training_step(pl_module, batch))
        returned = self._function(pl_module, batch)
        if not isinstance(returned, (Tensor, int, float)):
            raise ValueError(  # noqa: TRY004  a function that does not fit, not a wrong type
                f"StabilityGap: score {self.name!r} returned {type(returned).__name__}. It has to return a tensor with "
                "one value for each sample, or their mean."
            )
        value = torch.as_tensor(returned).detach().float()
        if value.numel() not in (1, samples):
            raise ValueError(
                f"StabilityGap: score {self.name!r} returned a tensor of shape {tuple(value.shape)} for {samples} "
                "samples. It has to return one value for each sample, or their mean."
            )
        return value.mean()

    def _logits(self, pl_module: LightningModule, batch: Any, labels: Tensor) -> Tensor:
        """Return the logits of a batch."""
        if self._named:
            with self._tap.recording() as record:
                _run_evaluation_step(pl_module, batch)
            return self._tap.logits(record)
        inputs = _inputs(batch, labels)
        try:
            output = pl_module(**inputs) if isinstance(inputs, Mapping) else pl_module(inputs)
        except Exception as error:
            raise ValueError(
                f"StabilityGap: {type(pl_module).__name__}.forward could not be called with what a batch has beside "
                f"its labels ({type(error).__name__}: {error}). Name the submodule that computes the logits with the "
                f"argument logits, or give score='loss' or a function. {list_heads(pl_module)}"
            ) from error
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2 or logits.shape[-1] < 2:
            shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
            raise ValueError(
                f"StabilityGap: {type(pl_module).__name__}.forward returned {type(output).__name__}{shape}, not logits "
                "of shape (samples, ..., classes). Name the submodule that computes them with the argument logits, or "
                f"give score='loss' or a function. {list_heads(pl_module)}"
            )
        if not self._seen:
            _refuse_shifted(batch, labels)
            self._seen = True
        return logits


def _run_evaluation_step(pl_module: LightningModule, batch: Any) -> None:
    """Run the module's validation step, or the training step of a module without one."""
    if not is_overridden("validation_step", pl_module, LightningModule):
        run_training_step(pl_module, batch)
        return
    further = {}
    if is_param_in_hook_signature(pl_module.validation_step, "dataloader_idx"):
        further["dataloader_idx"] = 0
    takes_index = is_param_in_hook_signature(pl_module.validation_step, "batch_idx", min_args=2)
    pl_module.validation_step(*((batch, 0) if takes_index else (batch,)), **further)


def refuse_own_steps(pl_module: LightningModule, what: str) -> None:
    """Raise ``ValueError`` if running the training step would train: the module steps its optimizers itself."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"StabilityGap: {what} runs the module's training step on held-out samples, and under manual optimisation "
            f"that of {type(pl_module).__name__} would train on them. Give score='accuracy' with a module whose "
            "forward returns the logits, or a function."
        )


def _refuse_shifted(batch: Any, labels: Tensor) -> None:
    """Raise ``ValueError`` if the labels are the inputs: a language model's, which its loss shifts by one position."""
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(inputs, Tensor) and inputs.shape == labels.shape and bool((inputs == labels).all()):
        raise ValueError(
            "StabilityGap: the labels are the inputs, so this is a language model whose loss compares each position "
            "with the next. Accuracy without that shift means nothing: give score='loss' or a function."
        )


def _loss(output: Any) -> Tensor:
    loss = loss_of(output)
    if loss is None:
        raise ValueError(
            "StabilityGap(score='loss') needs the loss that training_step returns, and it returned "
            f"{type(output).__name__}. Give a function as score."
        )
    return loss.detach().float()


def _resolve(score: Any) -> Any:
    """Return a score as a metric, a function, or one of the names."""
    if score in ("accuracy", "loss") or not isinstance(score, str):
        if not isinstance(score, (str, Metric)) and not callable(score):
            raise ValueError(f"score={score!r} is {_ALLOWED}")
        return score
    module, _, name = score.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"score={score!r} could not be imported: {error}. It is {_ALLOWED}") from error
    if isinstance(found, type) and issubclass(found, Metric):
        try:
            found = found()
        except Exception as error:
            raise ValueError(
                f"score={score!r} cannot be built without arguments ({type(error).__name__}: {error}). Give an "
                "instance, or in YAML its class_path and init_args."
            ) from error
    if found is None or not callable(found):
        raise ValueError(f"score={score!r} is {_ALLOWED}")
    return found


_ALLOWED = (
    "not a score. Give 'accuracy', 'loss', a torchmetrics metric, a function (pl_module, batch) that returns one value "
    "a sample, or its dotted path."
)


def _inputs(batch: Any, labels: Tensor) -> Any:
    """Return what of a batch goes into the module's ``forward``: all but the labels, or the first entry."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if value is not labels}
    return batch[0] if isinstance(batch, (list, tuple)) else batch


def _restricted(logits: Tensor, classes: Tensor) -> Tensor:
    """Return logits of which only those of some classes can win."""
    restricted = torch.full_like(logits, -torch.inf)
    restricted[..., classes] = logits[..., classes]
    return restricted


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each sample the share of its labels that the highest logit names."""
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"StabilityGap: labels of shape {tuple(labels.shape)} and type {labels.dtype} do not name a class for "
            f"logits of shape {tuple(logits.shape)}. Give score='loss', a metric or a function."
        )
    right = (logits.argmax(-1) == labels).float()
    if labels.ndim == 1:
        return right
    counted = (labels != _IGNORED).float()
    return (right * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
