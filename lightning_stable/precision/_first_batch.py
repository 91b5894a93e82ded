"""What a simulated precision looks at on the first batch: whether layers quantize, and how far gradients are off."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_stable._glue.quiet import QuietPass, own_loss
from lightning_stable.functional._simulated_layers import Quantized
from lightning_stable.functional.quantize import Quantizer, quantize
from lightning_stable.functional.simulated import LayerQuantization, quantized_layers
from lightning_stable.precision._parts import Part

__all__ = [
    "Compared",
    "FirstBatch",
    "Watch",
    "all_layers",
    "compare_gradients",
    "why_not_again",
]

# Below this cosine of the gradient to that in high precision the user is warned.
LOWEST_COSINE = 0.9


class _Seen(NamedTuple):
    """An operand that was quantized: whether it changed, and whether it would when quantized on its own."""

    changed: Tensor
    off_grid: Tensor


class Watch:
    """Looks at the operands of converted layers until :meth:`stop`."""

    def __init__(self, owner: str, module: nn.Module) -> None:
        self._owner = owner
        self._module = module
        self._layers = quantized_layers(module)
        self._seen: dict[tuple[str, str], list[_Seen]] = {}
        for state in self._layers.values():
            state.observers.append(self._look)

    def _look(self, name: str, operand: str, exact: Tensor, quantized: Tensor) -> None:
        layer = cast(Quantized, self._module.get_submodule(name))
        quantizer: Quantizer = getattr(layer.quantization, operand)
        matrix = layer.matrix(operand, exact, quantizer)
        # Rounded to the nearest, which draws no random numbers that training would miss.
        again = quantize(matrix, replace(quantizer, rounding="nearest"))
        seen = _Seen((exact != quantized).any(), (matrix != again).any())
        self._seen.setdefault((name, operand), []).append(seen)

    def stop(self) -> None:
        """Take the observers off."""
        for state in self._layers.values():
            state.observers[:] = [observer for observer in state.observers if observer != self._look]

    def judge(self) -> None:
        """Say which layers did not run, and fail if one ran without quantizing.

        Raises:
            ValueError: If an operand of a layer went into its product as it was, off the grid.
        """
        idle = []
        for name, state in self._layers.items():
            if not (state.enabled and state.quantizes):
                continue
            seen = {operand: found for (layer, operand), found in self._seen.items() if layer == name}
            if not seen:
                idle.append(name)
            for operand, found in seen.items():
                if state.outlier_threshold is not None and operand != "gradients":
                    continue  # all of it may be outliers
                if any(bool(each.off_grid) and not bool(each.changed) for each in found):
                    raise ValueError(
                        f"{self._owner}: layer {name!r} was converted, but its {operand} went into the product as they "
                        f"were, in {getattr(state, operand).format} no more than before. Something multiplies in its "
                        "place. Leave the layer out with exclude, or take away what replaces its forward."
                    )
        if idle:
            rank_zero_warn(
                f"{self._owner}: {', '.join(map(repr, idle))} did not run in the first batch, so nothing of it was "
                "quantized. If its weights are used by another module, which multiplies by them itself, that product "
                "stays exact: leave the layer out with exclude."
            )


class FirstBatch(Callback):
    """Checks the converted layers of a module on the first batch that it trains on.

    Args:
        owner: The class that is named in messages.
        forward_context: The precision's context for a forward pass.
        compare: Compare the gradient with that in high precision.
        parts: Told before and after each batch.
    """

    def __init__(
        self,
        owner: str,
        forward_context: Callable[[], Any],
        compare: bool,
        parts: Sequence[Part],
    ) -> None:
        self._owner = owner
        self._forward_context = forward_context
        self._compare = compare
        self._parts = parts
        self._watch: Watch | None = None
        self._done = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for part in self._parts:
            part.before_batch(trainer, pl_module, batch, batch_idx)
        if self._done:
            return
        why_not = why_not_again(pl_module)
        if self._compare and why_not is None:
            self._done = True
            self._report(pl_module, batch, batch_idx)
            return
        if self._compare:
            rank_zero_info(f"{self._owner}: the gradient is not compared with that in high precision: {why_not}.")
        self._watch = Watch(self._owner, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is not None:
            self._done = True
            self._watch.stop()
            self._watch.judge()
            self._watch = None
        for part in self._parts:
            part.after_batch(trainer, pl_module)

    def _report(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # What is compiled need not be compiled again for two passes.
        with torch.compiler.set_stance("force_eager"), QuietPass()(pl_module), self._forward_context():
            found = compare_gradients(self._owner, pl_module, lambda: own_loss(pl_module, batch, batch_idx))
        if found is None:
            rank_zero_info(f"{self._owner}: the first batch gives the quantized layers no gradient to compare.")
            return
        text = (
            f"{self._owner}: on the first batch the gradient of the quantized layers has a cosine of "
            f"{found.cosine:.4f} to that in high precision."
        )
        if found.without:
            text += (
                f" {found.without} of {found.parameters} parameters have none there: they are not trained on, or under "
                "reentrant checkpointing."
            )
        rank_zero_info(text)
        if not found.cosine >= LOWEST_COSINE:
            advice = _advice(quantized_layers(pl_module))
            rank_zero_warn(
                f"{text} Below {LOWEST_COSINE} training often suffers. {advice} Also take a format with more bits, a "
                "finer scaling, or leave sensitive layers out with exclude."
            )


def _advice(layers: Mapping[str, LayerQuantization]) -> str:
    """Say what to try first, of what is not so already."""
    states = layers.values()
    if any(state.gradients is not None for state in states):
        return "First of all keep gradients as they are (gradients=None)."
    if any(state.activations is not None for state in states) and any(state.weights is not None for state in states):
        return "Gradients are as they are: try weights and activations apart, with the other one as None."
    return "Only one operand is quantized already: it is that one."


class Compared(NamedTuple):
    """Two gradients of the converted layers.

    Attributes:
        cosine: Between them; not a number where one of them is zero or not finite.
        parameters: How many tensors the layers have that train.
        without: How many of them got no gradient.
    """

    cosine: float
    parameters: int
    without: int


def compare_gradients(owner: str, module: nn.Module, loss_of: Callable[[], Tensor | None]) -> Compared | None:
    """Compare the quantized gradient of the converted layers' parameters with the exact one.

    Both are of the same batch and random numbers, and touch no ``.grad``. The layers are watched on the way.

    Args:
        owner: The class that is named in errors.
        module: The module with converted layers.
        loss_of: Runs the module and returns its loss, or ``None`` where it skips the batch.

    Returns:
        What was found; ``None`` if there is no gradient.

    Raises:
        ValueError: If a layer does not quantize, or the gradient cannot be computed apart from training.
    """
    layers = quantized_layers(module)
    found = [p for name in layers for p in module.get_submodule(name).parameters(recurse=False) if p.requires_grad]
    weights = list(dict.fromkeys(found))
    with all_layers(layers, enabled=True):
        watch = Watch(owner, module)
        with isolate_rng():
            quantized = _gradients(owner, loss_of, weights)
        watch.judge()
    with all_layers(layers, enabled=False):
        exact = _gradients(owner, loss_of, weights)
    pairs = [(a, b) for a, b in zip(quantized, exact, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    sums = [torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]) for a, b in pairs]
    dot, left, right = torch.stack(sums).sum(0)
    return Compared(float(dot / (left.sqrt() * right.sqrt())), len(weights), len(weights) - len(pairs))


def _gradients(owner: str, loss_of: Callable[[], Tensor | None], weights: list[nn.Parameter]) -> list[Tensor | None]:
    with torch.enable_grad():
        loss = loss_of()
        if loss is None or not loss.requires_grad or not weights:
            return [None for _ in weights]
        try:
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(
                f"{owner} could not compute the gradient of the first batch apart from training, to compare it with "
                f"that in high precision. Set check_gradients=False. ({error})"
            ) from error
    return [None if gradient is None else gradient.float() for gradient in found]


@contextmanager
def all_layers(layers: Mapping[str, LayerQuantization], *, enabled: bool) -> Iterator[None]:
    """Let all layers quantize, or none, with nobody else watching."""
    before = {name: (state.enabled, state.observers) for name, state in layers.items()}
    try:
        for state in layers.values():
            state.enabled, state.observers = enabled, []
        yield
    finally:
        for name, state in layers.items():
            state.enabled, state.observers = before[name]


def why_not_again(pl_module: LightningModule) -> str | None:
    """Say why a module's training step cannot be run besides those that count; ``None`` if it can."""
    if not pl_module.automatic_optimization:
        return f"{type(pl_module).__name__} steps its optimizers itself (automatic_optimization=False)"
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        return f"{type(pl_module).__name__}.training_step takes dataloader_iter, which gives each batch once"
    return None
