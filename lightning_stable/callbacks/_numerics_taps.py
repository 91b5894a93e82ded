"""Where NumericsMonitor reads operands: at converted layers through their observers, at all others by hooks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_stable._glue.quiet import is_quiet
from lightning_stable.functional._simulated_layers import Quantized
from lightning_stable.functional.numerics_monitor import add_statistics, empty_statistics, operand_statistics
from lightning_stable.functional.quantize import Quantizer, quantize
from lightning_stable.functional.simulated import LayerQuantization, matches, quantized_kind, quantized_layers

__all__ = ["NumericsTaps"]

_MOST_NAMES = 12


class NumericsTaps:
    """Adds up the statistics of each operand that is watched, on the device.

    Args:
        operands: Which operands are watched.
        include: Patterns of layers' names.
        exclude: Patterns of those to leave out.
        quantizers: For each operand what it would be quantized by where a layer is not converted; empty for none.

    Attributes:
        rows: Layer and operand of each row of the statistics.
        formats: What each row is quantized to.
        statistics: Shape (rows, SIZE).
        seen: Whether anything was added since the statistics were last emptied.
    """

    def __init__(
        self,
        operands: Sequence[str],
        include: Sequence[str],
        exclude: Sequence[str],
        quantizers: dict[str, Quantizer],
    ) -> None:
        self._operands = tuple(operands)
        self._include = tuple(include)
        self._exclude = tuple(exclude)
        self._quantizers = quantizers
        self._undo: list[Callable[[], None]] = []
        self._forward = False
        self.forget()

    def forget(self) -> None:
        """Let go of the module."""
        self.close()
        self._module: LightningModule | None = None
        self._converted: dict[str, LayerQuantization] = {}
        self._plain: dict[str, nn.Module] = {}
        self._places: dict[tuple[str, str], int] = {}
        self.rows: list[tuple[str, str]] = []
        self.formats: list[str] = []
        self.statistics = torch.empty(0)
        self.seen = False

    def attach(self, pl_module: LightningModule) -> None:
        """Find the layers to watch; there are none where layers are converted but all formats are ``None``.

        Raises:
            ValueError: If there is none otherwise; the message says which there are.
        """
        self.forget()
        self._module = pl_module
        states = quantized_layers(pl_module)
        # One that quantizes nothing is as any other layer.
        quantizing = {name: state for name, state in states.items() if state.quantizes}
        self._converted = {name: state for name, state in quantizing.items() if self._wanted(name)}
        layers = {
            name: part for name, part in pl_module.named_modules() if name and quantized_kind(type(part)) is not None
        }
        if self._quantizers:
            self._plain = {n: part for n, part in layers.items() if self._wanted(n) and n not in self._converted}
        for name in layers:
            for operand in self._operands:
                quantizer = self._quantizer(name, operand)
                if quantizer is not None:
                    self._places[name, operand] = len(self.rows)
                    self.rows.append((name, operand))
                    self.formats.append(_format_of(quantizer))
        idle = bool(states) and not quantizing and not self._quantizers
        if not self.rows and not idle:
            raise ValueError(self._nothing(pl_module, list(layers)))
        self.empty(pl_module.device)

    def empty(self, device: torch.device) -> None:
        """Begin to add up anew."""
        self.statistics = empty_statistics(len(self.rows), device)
        self.seen = False

    # ------------------------------------------------------------------ an optimizer step that is watched

    def open(self) -> None:
        """Put observers and hooks on."""
        if self._undo:
            return
        for name, state in self._converted.items():
            observer = partial(self._observe, name)
            state.observers.append(observer)
            self._undo.append(partial(_drop, state, observer))
        for name, part in self._plain.items():
            handle = part.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)
            self._undo.append(handle.remove)

    def close(self) -> None:
        """Take them off."""
        for undo in self._undo:
            undo()
        self._undo, self._forward = [], False

    def watch(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a training step whose forward passes are watched."""
        self.open()
        before, self._forward = self._forward, True
        try:
            return step(*args, **kwargs)
        finally:
            self._forward = before

    def _watches(self, operand: str) -> bool:
        """Tell whether what runs now is part of a training step that is watched, and not of another callback's pass."""
        if self._module is None or is_quiet(self._module):
            return False
        # Gradients come when the step has returned its loss.
        return bool(self._undo) and (self._forward or operand == "gradients")

    def _observe(self, layer: str, _: str, operand: str, exact: Tensor, quantized: Tensor) -> None:
        """Take what a converted layer shows."""
        quantizer = getattr(self._converted[layer], operand)
        if quantizer is None or not self._watches(operand):
            return
        part = self._part(layer)
        before, after = (part.matrix(operand, x, quantizer) for x in (exact, quantized))
        self._add(layer, operand, before, after, quantizer)

    def _after_forward(self, layer: str, part: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Take the operands of a layer that is not converted."""
        if not self._watches("activations"):
            return
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        self._quantize(layer, part, "activations", x)
        self._quantize(layer, part, "weights", part.weight)
        if "gradients" in self._operands and isinstance(output, Tensor) and output.requires_grad:
            # Not a hook on the module's backward pass, which would put nodes of its own into the graph.
            cast(Any, output).register_hook(partial(self._after_backward, layer, part))

    def _after_backward(self, layer: str, part: nn.Module, gradient: Tensor) -> None:
        if self._watches("gradients"):
            self._quantize(layer, part, "gradients", gradient)

    @torch.no_grad()
    def _quantize(self, layer: str, part: nn.Module, operand: str, exact: Any) -> None:
        quantizer = self._quantizers.get(operand)
        if quantizer is None or (layer, operand) not in self._places or not isinstance(exact, Tensor):
            return
        if exact.is_floating_point():
            matrix = _as_converted(part).matrix(operand, exact.detach(), quantizer)
            self._add(layer, operand, matrix, quantize(matrix, quantizer), quantizer)

    def _add(self, layer: str, operand: str, exact: Tensor, quantized: Tensor, quantizer: Quantizer) -> None:
        place = self._places.get((layer, operand))
        if place is not None:
            new = operand_statistics(exact, quantized, quantizer)
            add_statistics(self.statistics[place], new.to(self.statistics.device, self.statistics.dtype))
            self.seen = True

    # ------------------------------------------------------------------ which layers

    def _part(self, name: str) -> Quantized:
        assert self._module is not None  # noqa: S101  observers are on only while there is one
        return cast(Quantized, self._module.get_submodule(name))

    def _wanted(self, name: str) -> bool:
        return matches(name, self._include) and not matches(name, self._exclude)

    def _quantizer(self, name: str, operand: str) -> Quantizer | None:
        """Return how an operand of a layer is, or would be, quantized; ``None`` if it is not watched."""
        if name in self._converted:
            own: Quantizer | None = getattr(self._converted[name], operand)
            return own
        return self._quantizers.get(operand) if name in self._plain else None

    def _nothing(self, pl_module: LightningModule, names: list[str]) -> str:
        shown = ", ".join(map(repr, names[:_MOST_NAMES])) or "none"
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        if not quantized_layers(pl_module) and not self._quantizers:
            return (
                f"NumericsMonitor finds no converted layer in {type(pl_module).__name__}. Train with "
                "SimulatedPrecision, or give the format to try on its linear and convolutional layers, as in "
                f"format='e4m3'. There are {shown}{more}."
            )
        return (
            f"NumericsMonitor finds no layer to watch in {type(pl_module).__name__} that matches "
            f"include={list(self._include)} and none of exclude={list(self._exclude)}, with operands "
            f"{list(self._operands)}. Linear and convolutional layers are {shown}{more}."
        )


def _drop(state: LayerQuantization, observer: Callable[..., None]) -> None:
    state.observers = [other for other in state.observers if other is not observer]


def _as_converted(part: nn.Module) -> Quantized:
    """Return a layer as if it were converted, to ask it for its operands as matrices; the layer stays what it is."""
    kind = quantized_kind(type(part))
    assert kind is not None  # noqa: S101  others are not watched
    view = kind.__new__(kind)
    # The same attributes under another class. Not a copy, which layers with parametrizations refuse.
    object.__setattr__(view, "__dict__", part.__dict__)
    return view


def _format_of(quantizer: Quantizer) -> str:
    """Return format and scaling in one word."""
    return quantizer.format if quantizer.scaling == "none" else f"{quantizer.format} {quantizer.scaling}"
